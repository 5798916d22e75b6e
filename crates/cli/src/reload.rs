//! The cluster file, looked at while a process runs.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use settings::{Changed, Error, FILE_BYTES_MAX, Loaded, Role};
use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;

/// How often the files are looked at. Contents are compared, so links that are turned (as Kubernetes does with ConfigMaps)
/// count, and a file that was only touched does not.
const POLL: Duration = Duration::from_millis(500);

/// The contents of the files; `None` for one that cannot be read.
type Contents = Vec<Option<Vec<u8>>>;

/// Some files, and what they held when they were last taken.
#[derive(Debug)]
pub(crate) struct Watched {
    files: Vec<PathBuf>,
    taken: Contents,
    reload: Arc<Notify>,
}

impl Watched {
    /// Files that are taken as they are now; `reload` asks to take them whether they have changed or not.
    pub(crate) fn new(files: &[PathBuf], reload: Arc<Notify>) -> Self {
        Self { files: files.to_vec(), taken: contents(files), reload }
    }

    /// Returns when the files have changed, and not again between two looks: whoever writes one is done with it. At once when
    /// somebody asks.
    pub(crate) async fn changed(&mut self) {
        let mut looks = tokio::time::interval(POLL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = None;
        loop {
            tokio::select! {
                () = self.reload.notified() => {
                    self.taken = contents(&self.files);
                    return;
                }
                _ = looks.tick() => {}
            }
            let now = contents(&self.files);
            if now == self.taken {
                last = None;
            } else if last.as_ref() == Some(&now) {
                self.taken = now;
                return;
            } else {
                last = Some(now);
            }
        }
    }
}

fn contents(files: &[PathBuf]) -> Contents {
    files.iter().map(|path| content(path)).collect()
}

fn content(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// What became of a configuration that was read again.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// No key that this process uses has another value.
    Same,
    /// It goes on with these, and with the whole new configuration.
    Applied(Vec<Changed>, Box<Loaded>),
    /// It goes on with what it had, for these reasons.
    Refused(String),
}

/// What a process of `role` that runs with `running` makes of a configuration that was `loaded` again.
pub(crate) fn judge(running: &Loaded, loaded: Result<Loaded, Error>, role: Role) -> Outcome {
    let new = match loaded {
        Ok(new) => new,
        Err(error) => return Outcome::Refused(error.to_string()),
    };
    match running.changes(&new, role) {
        Ok(changed) if changed.is_empty() => Outcome::Same,
        Ok(changed) => Outcome::Applied(changed, Box::new(new)),
        Err(refused) => {
            let lines: Vec<String> = refused.iter().map(|complaint| format!("\n  {complaint}")).collect();
            Outcome::Refused(format!(
                "{} of the changed keys cannot change now:{}",
                lines.len(),
                lines.concat()
            ))
        }
    }
}

/// Changes in one line.
pub(crate) fn listed(changed: &[Changed]) -> String {
    changed.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What is said of a refusal.
pub(crate) fn refusal(why: &str) -> String {
    format!("the configuration was read again and is not used; the running one stays: {why}")
}
