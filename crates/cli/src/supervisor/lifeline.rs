//! The child's end of the lifeline: a pipe on stdin that its supervisor holds open, and down which its orders come. However
//! the supervisor ends, even by SIGKILL, the kernel closes the pipe, and the child ends at once.

use std::io::{BufRead, BufReader, Read};

use rustix::process::{Signal, getpid, kill_process};
use settings::Telemetry;

use super::orders::Order;
use crate::telemetry;

/// Longest order, in bytes; a longer one is cut and not understood.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// Watches stdin from now on, in a thread of its own, and hands on the orders. `on` must not wait for long: while it
/// does, the end of the supervisor goes unseen.
///
/// # Errors
/// When the thread cannot be started.
pub fn hold(on: impl FnMut(Order) + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name("lifeline".into()).spawn(move || watch(on)).map(drop)
}

/// For a process that is told what to log and nothing else.
pub fn obey(order: Order) {
    match order {
        Order::Log { level } => telemetry::set_level(&Telemetry { log_level: level, ..Telemetry::default() }),
        Order::Configure { .. } => tracing::debug!("an order that is not for this process"),
    }
}

fn watch(mut on: impl FnMut(Order)) {
    let mut stdin = BufReader::new(std::io::stdin().lock());
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut stdin).take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) => match serde_json::from_slice(&line) {
                Ok(order) => on(order),
                Err(error) => tracing::debug!(%error, "an order was not understood"),
            },
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    // Not `exit`: exit handlers of libraries may wait for threads that are busy, and nobody is left to wait for us.
    let _ = kill_process(getpid(), Signal::KILL);
    std::process::exit(1);
}
