//! One child: its reports, its end, and how it is stopped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::time::Duration;

use cli::report::{Event, Phase};
use cli::supervisor::child::spawn;
use cli::supervisor::{Exit, Spec, Told, Update};
use support::{alive, gone, saying, shell, within_reason};
use tokio::sync::mpsc;

/// Runs a script to its end without stopping it.
fn run(script: &str) -> (Vec<Event>, Exit) {
    within_reason(async {
        let (updates, mut inbox) = mpsc::channel(8);
        let _handle = spawn(&shell(script, &[]), 7, updates).unwrap();
        let mut said = Vec::new();
        loop {
            match inbox.recv().await.unwrap() {
                (7, Update::Said(line)) => said.push(line.event),
                (7, Update::Exited(exit)) => return (said, exit),
                other => panic!("{other:?}"),
            }
        }
    })
}

#[test]
fn reports_arrive_in_order_and_the_exit_is_last() {
    let events = [
        Event::Phase { phase: Phase::Loading, done: 1, total: 2 },
        Event::Rendezvous { address: "127.0.0.1:7".parse().unwrap() },
        Event::Ready { elapsed_ms: 3 },
    ];
    let script: Vec<_> = events.iter().map(saying).collect();
    let (said, exit) = run(&script.join(";"));
    assert_eq!(said, events);
    assert!(exit.status.success() && exit.told == Told::Nothing);
}

#[test]
fn lines_that_are_no_reports_are_skipped() {
    let ready = Event::Ready { elapsed_ms: 1 };
    let (said, _) = run(&format!("echo hello; echo '{{}}'; printf '\\377\\n'; {}", saying(&ready)));
    assert_eq!(said, [ready]);
}

#[test]
fn an_exit_tells_code_signal_and_error() {
    let (_, exit) = run("exit 3");
    assert!(exit.to_string().ends_with("exited with code 3"), "{exit}");
    let (_, exit) = run("kill -9 $$");
    assert!(
        exit.killed_by_others() && exit.to_string().ends_with("was killed by signal 9 (SIGKILL)"),
        "{exit}"
    );
    let (_, exit) = run(":");
    assert!(exit.to_string().ends_with("ended though nobody asked it to"), "{exit}");
    let failed = saying(&Event::Failed { error: "config.json: no hidden_size".into() });
    let (said, exit) = run(&format!("{failed}; exit 1"));
    assert!(said.is_empty() && exit.to_string().ends_with("failed: config.json: no hidden_size"), "{exit}");
}

/// A child that says it is ready, then waits; returned once it has said so.
async fn ready(script: &str) -> (cli::supervisor::Handle, mpsc::Receiver<((), Update)>) {
    let (updates, mut inbox) = mpsc::channel(8);
    let ready = saying(&Event::Ready { elapsed_ms: 0 });
    let script = script.replace("READY", &ready);
    let handle = spawn(&shell(&script, &[]), (), updates).unwrap();
    assert!(matches!(inbox.recv().await, Some(((), Update::Said(_)))));
    (handle, inbox)
}

async fn exit(inbox: &mut mpsc::Receiver<((), Update)>) -> Exit {
    match inbox.recv().await {
        Some(((), Update::Exited(exit))) => exit,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_child_that_is_asked_to_stop_may_finish() {
    within_reason(async {
        let (handle, mut inbox) = ready("trap 'exit 0' TERM; READY; while :; do read -r line; done").await;
        handle.stop(Duration::from_secs(10));
        let exit = exit(&mut inbox).await;
        assert!(exit.told == Told::Stop && exit.status.success(), "{exit}");
    });
}

#[test]
fn a_child_that_does_not_stop_in_time_is_killed() {
    within_reason(async {
        let (handle, mut inbox) = ready("trap '' TERM; READY; read -r line; while :; do sleep 1; done").await;
        handle.stop(Duration::from_millis(50));
        let exit = exit(&mut inbox).await;
        assert!(exit.told == Told::Kill && !exit.killed_by_others(), "{exit}");
    });
}

#[test]
fn stdin_stays_open_until_the_child_is_gone() {
    within_reason(async {
        // `read` returns at end of file; the child would then exit with 9 by itself.
        let (handle, mut inbox) = ready("trap 'exit 0' TERM; READY; read -r line; exit 9").await;
        handle.stop(Duration::from_secs(10));
        assert!(exit(&mut inbox).await.status.success());
    });
}

#[test]
fn a_dropped_handle_ends_the_child() {
    within_reason(async {
        let (handle, mut inbox) = ready("trap '' TERM; READY; while :; do sleep 1; done").await;
        let pid = handle.pid();
        assert!(alive(pid));
        drop(handle);
        assert_eq!(exit(&mut inbox).await.told, Told::Kill);
        gone(pid).await;
    });
}

#[test]
fn a_grandchild_that_keeps_stdout_open_does_not_hide_the_exit() {
    let (_, exit) = run("sleep 2 2>/dev/null & exit 4");
    assert!(exit.to_string().ends_with("exited with code 4"), "{exit}");
}

#[test]
fn a_program_that_is_not_there_is_named() {
    within_reason(async {
        let (updates, _inbox) = mpsc::channel(1);
        let spec = Spec { program: "/nonexistent/cohort".into(), args: Vec::new(), secret: None };
        let error = spawn(&spec, (), updates).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/cohort"), "{error}");
    });
}
