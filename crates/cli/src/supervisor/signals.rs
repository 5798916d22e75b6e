//! Ctrl-C and SIGTERM, turned into a token everything else waits on.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code of a process ended by a second Ctrl-C, as shells report SIGINT.
const INTERRUPTED: i32 = 130;

/// A token that is cancelled by SIGTERM, and by SIGINT when nobody supervises this process. A terminal sends Ctrl-C to
/// every process in the foreground: a supervised one leaves it to its supervisor. A second signal ends the process at
/// once, unless it is supervised: whoever signals a whole process group (systemd, `timeout`) is followed by the
/// supervisor's own SIGTERM, and the supervisor kills what does not end in time.
///
/// # Errors
/// When the handlers or their thread cannot be set up.
pub fn stop_token(supervised: bool) -> anyhow::Result<CancellationToken> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("start the signal handler")?;
    // Registered before this returns: from here on no signal ends the process by default.
    let (interrupt, terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let token = CancellationToken::new();
    let cancelled = token.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || runtime.block_on(relay(interrupt, terminate, supervised, &cancelled)))
        .context("start the signal handler")?;
    Ok(token)
}

async fn relay(mut interrupt: Signal, mut terminate: Signal, supervised: bool, token: &CancellationToken) {
    loop {
        let received = tokio::select! {
            received = interrupt.recv() => received.filter(|()| !supervised),
            received = terminate.recv() => received,
        };
        match received {
            Some(()) if token.is_cancelled() && !supervised => std::process::exit(INTERRUPTED),
            Some(()) => token.cancel(),
            None => {}
        }
    }
}
