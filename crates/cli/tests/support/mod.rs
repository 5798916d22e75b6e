//! Shared by the test files of this crate.
#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod server;

use std::future::Future;
use std::time::Duration;

use cli::report::{Event, Line};
use cli::supervisor::Spec;
use rustix::process::{Pid, test_kill_process};

/// A shell that runs this script; `$0` is the script's own name, arguments start at `$1`.
pub(crate) fn shell(script: &str, args: &[String]) -> Spec {
    let mut all = vec!["-c".into(), script.into(), "sh".into()];
    all.extend(args.iter().map(Into::into));
    Spec { program: "/bin/sh".into(), args: all, secret: None }
}

/// A shell command that reports this event.
pub(crate) fn saying(event: &Event) -> String {
    let line = Line { pid: 1, rank: None, event: event.clone() };
    format!("echo '{}'", serde_json::to_string(&line).unwrap())
}

/// Runs a future on a runtime of its own; panics when it takes unreasonably long.
pub(crate) fn within_reason<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), future).await.expect("hangs") })
}

/// Whether a process with this id exists.
pub(crate) fn alive(pid: u32) -> bool {
    test_kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()).is_ok()
}

/// Waits until a process is gone.
pub(crate) async fn gone(pid: u32) {
    while alive(pid) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
