//! Signs of life: a rank without any is replaced by whoever started it.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use crate::Error;

/// How often a rank that takes work says that it goes on: [`crate::Report::Alive`].
pub const ALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// A thread that acts every [`ALIVE_INTERVAL`] until this is dropped.
pub(crate) struct Pulse {
    _held: Sender<()>,
}

impl Pulse {
    pub(crate) fn start(beat: impl Fn() + Send + 'static) -> Result<Self, Error> {
        let (held, dropped) = channel::<()>();
        let work = move || {
            while dropped.recv_timeout(ALIVE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                beat();
            }
        };
        let spawned = thread::Builder::new().name("pulse".into()).spawn(work);
        spawned.map(|_| Self { _held: held }).map_err(|source| Error::Start { what: "the pulse", source })
    }
}
