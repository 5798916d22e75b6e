//! What a router can be told anew while it serves.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::config::{HttpPatience, Limits};
use crate::discovery::Discovery;
use crate::pipeline::Shared;
use crate::room::Room;
use crate::{Config, Error};

/// An order to go on with another configuration. Of it are taken: the workers and their weights, the limits, the file of keys, how long
/// callers and groups are waited for, and the graces; all else stays as it was at the start.
#[derive(Debug)]
pub struct Change {
    /// The configuration from now on.
    pub config: Config,
    /// Told once it is in force, or why it is not; then all stays as it was.
    pub answer: oneshot::Sender<Result<(), Error>>,
}

/// The values that may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tuned {
    pub(crate) limits: Limits,
    pub(crate) http_patience: HttpPatience,
    /// Longest wait of an interrupted request for a group that goes on with it.
    pub(crate) resume_grace: Duration,
    pub(crate) withdraw_grace: Duration,
    pub(crate) drain_grace: Duration,
}

impl From<&Config> for Tuned {
    fn from(config: &Config) -> Self {
        let Config { limits, http_patience, resume_grace, withdraw_grace, drain_grace, .. } = *config;
        Self { limits, http_patience, resume_grace, withdraw_grace, drain_grace }
    }
}

/// The values in force, and the places for requests that belong to them.
#[derive(Debug)]
pub(crate) struct Tuning {
    now: RwLock<Tuned>,
    /// Of the file of keys in force.
    keys: Mutex<Option<PathBuf>>,
    room: Arc<Room>,
}

impl Tuning {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            now: RwLock::new(config.into()),
            keys: Mutex::new(config.access.keys.clone()),
            room: Room::new(config.limits),
        }
    }

    pub(crate) fn get(&self) -> Tuned {
        *self.now.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where requests are admitted, and wait for it.
    pub(crate) const fn room(&self) -> &Arc<Room> {
        &self.room
    }

    fn set(&self, tuned: Tuned) {
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = tuned;
        self.room.set(tuned.limits);
    }
}

/// Takes orders for as long as somebody may give one.
pub(crate) async fn keep_changing(
    shared: Arc<Shared>,
    discovery: Arc<Discovery>,
    mut changes: mpsc::Receiver<Change>,
) {
    while let Some(Change { config, answer }) = changes.recv().await {
        let outcome = apply(&shared, &discovery, &config);
        // Whoever asked may be gone; the change is made all the same.
        let _ = answer.send(outcome);
    }
}

/// Everything that can fail comes first, so that a change is made as a whole or not at all.
fn apply(shared: &Arc<Shared>, discovery: &Discovery, config: &Config) -> Result<(), Error> {
    let mut keys = shared.tuning.keys.lock().unwrap_or_else(PoisonError::into_inner);
    let file = match *keys == config.access.keys {
        true => None,
        false => Some(config.access.keys.as_deref().map(security::KeyFile::open).transpose()?),
    };
    discovery.set(config)?;
    if let Some(file) = file {
        file.iter().for_each(security::KeyFile::watch);
        shared.gate.set_keys(file);
        keys.clone_from(&config.access.keys);
    }
    shared.tuning.set(config.into());
    Ok(())
}
