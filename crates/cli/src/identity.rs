//! What shows that a process belongs to its cluster.

use security::{SECRET_VARIABLE, Secret};
use settings::Settings;

use crate::args::StartedBy;

/// The secret of this process's cluster: that of the file, else the one in its variable. A supervisor has read the file
/// for its children and hands on what it found.
///
/// # Errors
/// A file or variable that holds no secret.
pub(crate) fn secret(settings: &Settings, by: StartedBy) -> anyhow::Result<Option<Secret>> {
    if let (StartedBy::User, Some(path)) = (by, &settings.cluster.secret_file) {
        return Ok(Some(Secret::from_file(path)?));
    }
    from_variable()
}

/// The secret in this process's variable.
///
/// # Errors
/// When it cannot be one.
pub(crate) fn from_variable() -> anyhow::Result<Option<Secret>> {
    match std::env::var(SECRET_VARIABLE) {
        Ok(text) => match Secret::parse(&text) {
            Ok(secret) => Ok(Some(secret)),
            Err(reason) => anyhow::bail!("{SECRET_VARIABLE}: {reason}"),
        },
        Err(_) => Ok(None),
    }
}
