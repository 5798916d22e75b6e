//! Ctrl-C, SIGTERM and SIGHUP, turned into things everything else waits on.

use std::fs::File;
use std::sync::Arc;

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Exit code of a process ended by a second Ctrl-C, as shells report SIGINT.
const INTERRUPTED: i32 = 130;

/// What signals ask for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// To stop.
    pub stop: CancellationToken,
    /// To read the configuration again.
    pub reload: Arc<Notify>,
}

/// A token that is cancelled by SIGTERM, and by SIGINT when nobody supervises this process. A terminal sends Ctrl-C to
/// every process in the foreground: a supervised one leaves it to its supervisor. A second signal ends the process at
/// once, unless it is supervised: whoever signals a whole process group (systemd, `timeout`) is followed by the
/// supervisor's own SIGTERM, and the supervisor kills what does not end in time. SIGHUP, which a terminal that is closed sends
/// to all, does the same as SIGTERM here, and nothing in a supervised process.
///
/// # Errors
/// When the handlers or their thread cannot be set up.
pub fn stop_token(supervised: bool) -> anyhow::Result<CancellationToken> {
    Ok(start(supervised, false)?.stop)
}

/// As [`stop_token`], for a process that can read its configuration again: SIGHUP asks for that, unless it comes because
/// the terminal this process was started from is gone.
///
/// # Errors
/// As [`stop_token`].
pub fn stop_and_reload(supervised: bool) -> anyhow::Result<Asked> {
    start(supervised, true)
}

fn start(supervised: bool, reloads: bool) -> anyhow::Result<Asked> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("start the signal handler")?;
    // Registered before this returns: from here on no signal ends the process by default.
    let signals = {
        let _inside = runtime.enter();
        [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal)
    };
    let [interrupt, terminate, hangup] = signals;
    let signals = (interrupt?, terminate?, hangup?);
    let asked = Asked { stop: CancellationToken::new(), reload: Arc::new(Notify::new()) };
    let terminal = reloads && has_terminal();
    let (own, role) = (asked.clone(), Role { supervised, reloads, terminal });
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || runtime.block_on(relay(signals, role, &own)))
        .context("start the signal handler")?;
    Ok(asked)
}

#[derive(Clone, Copy)]
struct Role {
    supervised: bool,
    reloads: bool,
    /// Whether it was started from a terminal.
    terminal: bool,
}

/// Whether this process belongs to a terminal that is there.
fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}

async fn relay(signals: (Signal, Signal, Signal), role: Role, asked: &Asked) {
    let (mut interrupt, mut terminate, mut hangup) = signals;
    loop {
        let received = tokio::select! {
            received = interrupt.recv() => received.filter(|()| !role.supervised),
            received = terminate.recv() => received,
            received = hangup.recv() => received.filter(|()| !role.supervised).filter(|()| {
                let reload = role.reloads && (!role.terminal || has_terminal());
                if reload {
                    asked.reload.notify_one();
                }
                !reload
            }),
        };
        match received {
            Some(()) if asked.stop.is_cancelled() && !role.supervised => std::process::exit(INTERRUPTED),
            Some(()) => asked.stop.cancel(),
            None => {}
        }
    }
}
