//! The ranks of a group live and die together.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use cli::report::{Event, Line};
use cli::supervisor::Spec;
use cli::supervisor::group::{Group, run};
use support::{saying, shell, within_reason};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use types::TpSize;

const WAIT: &str = "while :; do read -r line; done";

fn rendezvous() -> Event {
    Event::Rendezvous { address: "127.0.0.1:4321".parse().unwrap() }
}

const fn ready() -> Event {
    Event::Ready { elapsed_ms: 1 }
}

/// Rank 0 reports its rendezvous; every rank then runs its script with the rendezvous it was given as `$1`.
fn group(
    scripts: &[&'static str],
) -> Group<impl Fn(u32, Option<SocketAddr>) -> anyhow::Result<Spec> + use<>> {
    let scripts = scripts.to_vec();
    Group {
        size: TpSize::new(u32::try_from(scripts.len()).unwrap()).unwrap(),
        ranks: 0..u32::try_from(scripts.len()).unwrap(),
        leader_grace: Duration::from_secs(5),
        silence_max: Duration::from_secs(3600),
        spec: move |rank, address: Option<SocketAddr>| {
            let script = scripts[rank as usize].replace("READY", &saying(&ready())).replace("WAIT", WAIT);
            let meet = saying(&rendezvous());
            let script = if rank == 0 { format!("{meet}; {script}") } else { script };
            Ok(shell(&script, &[address.map(|a| a.to_string()).unwrap_or_default()]))
        },
    }
}

/// Runs a group; once `ranks_ready` ranks are ready, it is told to stop. Returns its result and what was said.
fn until_ready(scripts: &[&'static str], ranks_ready: usize) -> (anyhow::Result<()>, Vec<Line>) {
    within_reason(async {
        let stop = CancellationToken::new();
        let mut said = Vec::new();
        let mut ready_ranks = 0;
        let (_orders, given) = mpsc::channel(1);
        let result = run(&group(scripts), &stop, given, |line| {
            ready_ranks += usize::from(line.event == ready());
            if ready_ranks == ranks_ready {
                stop.cancel();
            }
            said.push(line);
        })
        .await;
        (result, said)
    })
}

#[test]
fn other_ranks_start_where_rank_0_waits_and_reports_carry_their_rank() {
    let follower = "test \"$1\" = 127.0.0.1:4321 || exit 5; trap 'exit 0' TERM; READY; WAIT";
    let (result, said) = until_ready(&["trap 'exit 0' TERM; READY; WAIT", follower, follower], 3);
    result.unwrap();
    let mut ranks: Vec<_> = said.iter().filter(|line| line.event == ready()).map(|line| line.rank).collect();
    ranks.sort_unstable();
    assert_eq!(ranks, [Some(0), Some(1), Some(2)]);
}

#[test]
fn a_rank_that_falls_silent_is_ended_and_named() {
    let beats = format!("while :; do {}; sleep 0.2; done", saying(&Event::Alive));
    let silent = within_reason(async {
        let both = group(&["trap 'exit 0' TERM; READY; BEATS", "READY; kill -STOP $$"]);
        let spec = |rank, address: Option<SocketAddr>| -> anyhow::Result<Spec> {
            let spec = (both.spec)(rank, address)?;
            let args = spec.args.iter().map(|arg| arg.to_str().unwrap().replace("BEATS", &beats).into());
            Ok(Spec { args: args.collect(), ..spec })
        };
        let group = Group {
            size: both.size,
            ranks: both.ranks.clone(),
            leader_grace: both.leader_grace,
            silence_max: Duration::from_secs(3),
            spec,
        };
        let (_orders, given) = mpsc::channel(1);
        run(&group, &CancellationToken::new(), given, |line| assert_ne!(line.event, Event::Alive)).await
    });
    assert_eq!(silent.unwrap_err().to_string(), "rank 1 of 2 gave no sign of life for 3 s");
}

#[test]
fn a_killed_rank_is_named_and_ends_the_group() {
    let (result, _) = until_ready(&["trap 'exit 0' TERM; READY; WAIT", "kill -9 $$"], 99);
    let error = result.unwrap_err().to_string();
    assert!(
        error.starts_with("rank 1 of 2 (pid ") && error.ends_with("was killed by signal 9 (SIGKILL)"),
        "{error}"
    );
}

#[test]
fn a_rank_that_fails_is_named_with_its_error() {
    let (result, _) = until_ready(
        &[
            "trap 'exit 0' TERM; WAIT",
            "echo '{\"pid\":1,\"event\":\"failed\",\"error\":\"no such file\"}'; exit 1",
        ],
        99,
    );
    let error = result.unwrap_err().to_string();
    assert!(error.starts_with("rank 1 of 2 (pid ") && error.ends_with("failed: no such file"), "{error}");
}

#[test]
fn the_killed_rank_is_the_cause_even_when_its_peers_fail_first() {
    // Rank 0 kills rank 1 and fails at once, as a rank does that has lost its peer.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pid");
    let script = "until test -s FILE; do sleep 0.01; done; kill -9 $(cat FILE); exit 1";
    let leader: &'static str =
        Box::leak(script.replace("FILE", &file.display().to_string()).into_boxed_str());
    let script = "echo $$ > FILE.new; mv FILE.new FILE; WAIT";
    let follower: &'static str =
        Box::leak(script.replace("FILE", &file.display().to_string()).into_boxed_str());
    let (result, _) = until_ready(&[leader, follower], 99);
    let error = result.unwrap_err().to_string();
    assert!(error.starts_with("rank 1 of 2"), "{error}");
}

#[test]
fn a_rank_that_ends_unasked_ends_the_group() {
    let (result, _) = until_ready(&["exit 0", "trap 'exit 0' TERM; WAIT"], 99);
    let error = result.unwrap_err().to_string();
    assert!(
        error.starts_with("rank 0 of 2") && error.ends_with("ended though nobody asked it to"),
        "{error}"
    );
}

#[test]
fn the_leader_stops_first_and_the_others_once_it_is_gone() {
    // The leader only ends when the follower is still there to be seen; a follower stopped first would take its file.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("follower");
    let leader: &'static str = Box::leak(
        format!("trap 'test -e {} && exit 0; exit 8' TERM; READY; WAIT", file.display()).into_boxed_str(),
    );
    let follower: &'static str = Box::leak(
        format!("touch {0}; trap 'rm {0}; exit 0' TERM; READY; WAIT", file.display()).into_boxed_str(),
    );
    let (result, _) = until_ready(&[leader, follower], 2);
    result.unwrap();
    assert!(!file.exists());
}
