//! A group that spans hosts: which ranks run where, and a group whose two hosts are two network namespaces.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};

use cli::hosts::Host;
use cli::report::{Event, Line};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use types::TpSize;

fn find(hosts: &[&str], index: Option<u32>, variables: &[(&str, &str)]) -> Result<Option<Host>, String> {
    let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let variable =
        |name: &str| variables.iter().find(|(of, _)| *of == name).map(|(_, value)| (*value).to_owned());
    Host::find(&hosts, index, variable).map_err(|error| error.to_string())
}

fn host(count: u32, index: u32, leader: &str) -> Result<Option<Host>, String> {
    Ok(Some(Host { count, index, leader: leader.to_owned() }))
}

const LWS: [(&str, &str); 3] =
    [("LWS_GROUP_SIZE", "4"), ("LWS_WORKER_INDEX", "2"), ("LWS_LEADER_ADDRESS", "group-0.group.ns")];

#[test]
fn hosts_come_from_flags_or_file_or_a_leader_worker_set() {
    assert_eq!(find(&[], None, &[]), Ok(None));
    assert_eq!(find(&["10.0.0.1"], None, &[]), Ok(None));
    assert_eq!(find(&["10.0.0.1", "b"], Some(1), &[]), host(2, 1, "10.0.0.1:7070"));
    assert_eq!(find(&["a:99", "b"], Some(0), &LWS), host(2, 0, "a:99"));
    assert_eq!(find(&["fd00::1", "b"], Some(0), &[]), host(2, 0, "[fd00::1]:7070"));
    assert_eq!(find(&["[fd00::1]:80", "b"], Some(0), &[]), host(2, 0, "[fd00::1]:80"));
    assert_eq!(find(&[], None, &LWS), host(4, 2, "group-0.group.ns:7070"));
    assert_eq!(find(&[], None, &[("LWS_GROUP_SIZE", "1")]), Ok(None));
}

#[test]
fn a_host_without_a_place_is_told_what_is_missing() {
    let refused = |result: Result<Option<Host>, String>| result.unwrap_err();
    let missing = refused(find(&["a", "b"], None, &[]));
    assert!(missing.contains("needs --host-index 0 to 1") && missing.contains("none was given"), "{missing}");
    let large = refused(find(&["a", "b"], Some(2), &[]));
    assert!(large.contains("not 2"), "{large}");
    let alone = refused(find(&[], None, &LWS[..2]));
    assert!(alone.contains("LWS_GROUP_SIZE=4 without LWS_LEADER_ADDRESS"), "{alone}");
    let words = refused(find(&[], None, &[("LWS_GROUP_SIZE", "many")]));
    assert!(words.contains("LWS_GROUP_SIZE=many"), "{words}");
    let of = find(&["a", "b"], Some(1), &[]).unwrap().unwrap();
    assert_eq!(of.ranks(TpSize::new(4).unwrap()).unwrap(), 2..4);
    let uneven = of.ranks(TpSize::new(3).unwrap()).unwrap_err().to_string();
    assert!(uneven.contains("3 ranks do not divide by 2 hosts"), "{uneven}");
}

/// Two network namespaces joined by a cable; gone when dropped.
struct Hosts {
    names: [String; 2],
}

const ADDRESSES: [&str; 2] = ["10.77.31.1", "10.77.31.2"];

impl Hosts {
    /// `Err` says why this system does not allow it.
    fn new() -> Result<Self, String> {
        let id = std::process::id();
        let names = ["a", "b"].map(|host| format!("cohort-{id}-{host}"));
        let [a, b] = &names;
        ip(&["netns", "add", a])?;
        // From here on whatever was made is taken down again.
        let hosts = Self { names: names.clone() };
        ip(&["netns", "add", b])?;
        let cable = [format!("co{id}a"), format!("co{id}b")];
        ip(&["link", "add", &cable[0], "netns", a, "type", "veth", "peer", "name", &cable[1], "netns", b])?;
        for ((host, cable), address) in names.iter().zip(&cable).zip(ADDRESSES) {
            ip(&["-n", host, "addr", "add", &format!("{address}/24"), "dev", cable])?;
            ip(&["-n", host, "link", "set", cable, "up"])?;
            ip(&["-n", host, "link", "set", "lo", "up"])?;
        }
        Ok(hosts)
    }

    fn cohort(&self, host: usize, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host], env!("CARGO_BIN_EXE_cohort")]).args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in &self.names {
            // One that was not made cannot be deleted.
            let _ = ip(&["netns", "del", host]);
        }
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(args).output().map_err(|error| format!("ip: {error}"))?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(format!("ip {}: {}", args.join(" "), told.trim())) }
}

/// One host's part of a group.
struct Part {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Part {
    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next report that `wanted` takes something from.
    fn until<T>(&mut self, wanted: impl Fn(&Line) -> Option<T>) -> T {
        loop {
            let mut text = String::new();
            self.lines.read_line(&mut text).unwrap();
            if text.is_empty() {
                let mut errors = String::new();
                self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
                panic!("the group ended: {errors}");
            }
            if let Some(found) = wanted(&serde_json::from_str(&text).unwrap()) {
                return found;
            }
        }
    }

    fn end(mut self) -> Option<i32> {
        let lifeline = self.child.stdin.take();
        let status = self.child.wait().unwrap();
        drop(lifeline);
        status.code()
    }
}

#[test]
fn a_group_over_two_hosts_computes_and_ends_in_good_order() {
    let hosts = match Hosts::new() {
        Ok(hosts) => hosts,
        Err(why) => {
            println!("skipped: network namespaces are not permitted here ({why})");
            return;
        }
    };
    let names = format!("--hosts={}:7070,{}", ADDRESSES[0], ADDRESSES[1]);
    let listen = format!("--listen={}:0", ADDRESSES[0]);
    let plan = ["--tensor-parallel=4", "--experts=expert", "--dispatch=all-to-all"];
    let start = |host: usize| {
        let index = format!("--host-index={host}");
        let mut args = vec!["group", "--supervised", "--log-level=error", "--device=cpu", &names, &index];
        args.extend(plan);
        args.extend((host == 0).then_some(listen.as_str()));
        Part::start(hosts.cohort(host, &args))
    };
    let (mut first, mut second) = (start(0), start(1));
    let worker: SocketAddr = first.until(|line| match line.event {
        Event::Listening { address } => Some(address),
        _ => None,
    });
    let ready = |rank| {
        move |line: &Line| {
            (line.rank == Some(rank) && matches!(line.event, Event::Ready { .. })).then_some(())
        }
    };
    second.until(ready(3));
    first.until(ready(0));
    let url = format!("--worker=http://{worker}");
    let told = hosts.cohort(1, &["debug", "collectives", "--json", &url]).output().unwrap();
    let told: Value = serde_json::from_slice(&told.stdout).unwrap_or_else(|_| panic!("{told:?}"));
    // The warm-up's tokens went through all four ranks, two on each host.
    let ranks = told["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 4, "{told}");
    for rank in ranks {
        assert!(rank["steps"].as_u64().unwrap() > 0, "{told}");
        assert_eq!(rank["rows"], told["tokens"], "{told}");
    }
    kill_process(Pid::from_child(&first.child), Signal::TERM).unwrap();
    assert_eq!(first.end(), Some(0));
    assert_eq!(second.end(), Some(0));
}
