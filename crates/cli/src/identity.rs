//! What shows that a process belongs to its cluster.

use std::path::Path;

use security::{SECRET_FILE_VARIABLE, SECRET_VARIABLE, Secret, SharedSecret};
use settings::Settings;

use crate::args::StartedBy;

/// The secret of this process's cluster: that of the file, else the one in its variable. A supervisor has read the file
/// for its children, hands on what it found, and names the file, which they read again when it changes.
///
/// # Errors
/// A file or variable that holds no secret.
pub(crate) fn secret(settings: &Settings, by: StartedBy) -> anyhow::Result<Option<SharedSecret>> {
    match (by, &settings.cluster.secret_file) {
        (StartedBy::User, Some(path)) => Ok(Some(SharedSecret::open(path)?)),
        (StartedBy::User, None) => Ok(from_variable()?.map(SharedSecret::from)),
        (StartedBy::Supervisor, _) => {
            let Some(told) = from_variable()? else { return Ok(None) };
            match std::env::var_os(SECRET_FILE_VARIABLE) {
                Some(path) => Ok(Some(SharedSecret::open_or(Path::new(&path), told)?)),
                None => Ok(Some(told.into())),
            }
        }
    }
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
