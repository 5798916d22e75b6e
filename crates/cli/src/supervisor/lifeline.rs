//! The child's end of the lifeline: a pipe on stdin that its supervisor holds open and never writes to. However the
//! supervisor ends, even by SIGKILL, the kernel closes the pipe, and the child ends at once.

use std::io::Read;

use rustix::process::{Signal, getpid, kill_process};

/// Watches stdin from now on, in a thread of its own.
///
/// # Errors
/// When the thread cannot be started.
pub fn hold() -> std::io::Result<()> {
    std::thread::Builder::new().name("lifeline".into()).spawn(watch).map(drop)
}

fn watch() {
    let mut stdin = std::io::stdin().lock();
    let mut ignored = [0; 64];
    loop {
        match stdin.read(&mut ignored) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    // Not `exit`: exit handlers of libraries may wait for threads that are busy, and nobody is left to wait for us.
    let _ = kill_process(getpid(), Signal::KILL);
    std::process::exit(1);
}
