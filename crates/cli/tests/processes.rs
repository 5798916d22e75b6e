//! The binary itself, as a router without groups: signals, the lifeline, and how errors are told.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use cli::report::{Event, Line};
use rustix::process::{Pid, Signal, kill_process};

/// Nobody listens there; the router keeps trying.
const NO_GROUP: &str = "--workers=http://127.0.0.1:9";

fn cohort(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cohort"));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Neither the developer's settings nor their log filter belong to a test.
    command.env_clear();
    command
}

fn output(args: &[&str]) -> (Output, String) {
    let output = cohort(args).output().unwrap();
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    (output, errors)
}

/// A router that serves, and what it said last.
fn router(supervised: bool) -> Child {
    let mut args =
        vec!["router", NO_GROUP, "--grpc-listen=127.0.0.1:0", "--http-listen=off", "--log-level=error"];
    args.extend(supervised.then_some("--supervised"));
    let mut child = cohort(&args).spawn().unwrap();
    let mut said = String::new();
    if supervised {
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
        let line: Line = serde_json::from_str(&said).unwrap();
        assert!(matches!(line.event, Event::Serving(serving) if serving.grpc.port() != 0), "{said}");
    } else {
        BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut said).unwrap();
        assert!(said.starts_with("serving gRPC at 127.0.0.1:"), "{said}");
    }
    child
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// The end of a child whose lifeline stays open: `Child::wait` would close it.
fn end(child: &mut Child) -> ExitStatus {
    let lifeline = child.stdin.take();
    let status = child.wait().unwrap();
    drop(lifeline);
    status
}

#[test]
fn ctrl_c_ends_a_router_with_code_0() {
    let mut child = router(false);
    signal(&child, Signal::INT);
    assert_eq!(end(&mut child).code(), Some(0));
}

#[test]
fn sigterm_ends_a_supervised_router_with_code_0() {
    let mut child = router(true);
    signal(&child, Signal::TERM);
    assert_eq!(end(&mut child).code(), Some(0));
}

#[test]
fn a_supervised_router_leaves_ctrl_c_to_its_supervisor() {
    let mut child = router(true);
    signal(&child, Signal::INT);
    signal(&child, Signal::INT);
    // Had one of the two been taken as the order to stop, SIGTERM would be the second and end it with 130.
    signal(&child, Signal::TERM);
    assert_eq!(end(&mut child).code(), Some(0));
}

#[test]
fn a_supervised_router_ends_when_its_lifeline_is_cut() {
    let mut child = router(true);
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().signal(), Some(Signal::KILL.as_raw()));
}

#[test]
fn an_unsupervised_router_does_not_care_about_its_stdin() {
    let mut child = router(false);
    drop(child.stdin.take());
    assert_eq!(child.try_wait().unwrap(), None);
    signal(&child, Signal::TERM);
    assert_eq!(end(&mut child).code(), Some(0));
}

#[test]
fn a_port_in_use_is_named_with_its_flag() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (output, errors) = output(&["router", NO_GROUP, "--grpc-listen", &address, "--http-listen=off"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors.contains(&address) && errors.contains("--grpc-listen"), "{errors}");
}

#[test]
fn a_supervised_process_reports_its_error_on_stdout() {
    let mut child = cohort(&["router", "--supervised"]).spawn().unwrap();
    let mut said = String::new();
    child.stdout.as_mut().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(end(&mut child).code(), Some(1));
    let line: Line = serde_json::from_str(&said).unwrap();
    assert!(matches!(&line.event, Event::Failed { error } if error.contains("--workers")), "{said}");
}

#[test]
fn every_mistake_of_a_cluster_file_is_listed() {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    std::io::Write::write_all(&mut file, b"[group]\nkv_tokns = 1\nblock_size = 0\n").unwrap();
    let path = file.path().to_str().unwrap();
    let (output, errors) = output(&["config", "check", "--config", path]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors.contains("2 mistakes") && errors.contains("did you mean group.kv_tokens?"), "{errors}");
    assert!(errors.matches(path).count() == 2, "{errors}");
}

#[test]
fn a_shown_configuration_can_be_read_back() {
    let shown = cohort(&["config", "show"]).env("COHORT__GROUP__KV_TOKENS", "4096").output().unwrap().stdout;
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    std::io::Write::write_all(&mut file, &shown).unwrap();
    let again =
        cohort(&["config", "show", "--config", file.path().to_str().unwrap()]).output().unwrap().stdout;
    assert_eq!(again, shown);
    assert!(String::from_utf8(shown).unwrap().contains("group.kv_tokens = 4096\n"));
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let (output, errors) = output(&["generate", "--server", "127.0.0.1:9", "--prompt", "x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors.contains("nothing answers at http://127.0.0.1:9"), "{errors}");
}

#[test]
fn a_follower_without_a_rendezvous_says_what_it_needs() {
    let (output, errors) = output(&["worker", "--rank", "1", "--tensor-parallel", "2"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors.contains("rank 1 of 2 needs --rendezvous"), "{errors}");
}

#[test]
fn an_order_to_stop_ends_a_rank_that_still_waits_for_the_others() {
    let args = ["worker", "--tensor-parallel=2", "--device=cpu", "--supervised", "--log-level=error"];
    let mut child = cohort(&args).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let waits =
        |line: &str| matches!(serde_json::from_str(line), Ok(Line { event: Event::Rendezvous { .. }, .. }));
    assert!(lines.by_ref().any(|line| waits(&line.unwrap())), "rank 0 never waited");
    signal(&child, Signal::TERM);
    assert_eq!(end(&mut child).code(), Some(0));
}

#[test]
fn variables_do_not_reach_past_the_supervisor() {
    let mut child =
        cohort(&["router", "--supervised"]).env("COHORT__ROUTER__WORKERS", "http://a:1").spawn().unwrap();
    let mut said = String::new();
    child.stdout.as_mut().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("needs at least one worker group"), "{said}");
    assert_eq!(end(&mut child).code(), Some(1));
}

#[test]
fn a_model_without_weights_ends_up_with_an_error_naming_the_rank() {
    // An empty directory is enough for a router (token ids only), so it is the rank that fails.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let args = ["up", "--model", path, "--device=cpu", "--grpc-listen=127.0.0.1:0", "--http-listen=off"];
    let (output, errors) = output(&args);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors.contains("error: group 0") && errors.contains("rank 0 of 1"), "{errors}");
    assert!(errors.contains(path), "{errors}");
}
