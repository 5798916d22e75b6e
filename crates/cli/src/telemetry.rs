//! Logs: to stderr, because stdout belongs to answers and reports.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::args::{LogFlags, LogFormat};
use crate::style;

/// Starts logging with `--log-level`, else `RUST_LOG`, else `default`. A filter that cannot be read is reported and
/// `default` used.
pub fn start(flags: &LogFlags, default: &str) {
    let (filter, unread) = filter(flags, default);
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(style::colours(std::io::stderr().is_terminal()));
    match flags.log_format {
        LogFormat::Human => builder.with_target(true).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    if let Some(unread) = unread {
        tracing::warn!("{unread}; logging at `{default}`");
    }
}

fn filter(flags: &LogFlags, default: &str) -> (EnvFilter, Option<String>) {
    let from_env = || std::env::var(EnvFilter::DEFAULT_ENV).ok().filter(|text| !text.is_empty());
    let Some(asked) = flags.log_level.clone().or_else(from_env) else {
        return (EnvFilter::new(default), None);
    };
    match EnvFilter::try_new(&asked) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(default), Some(format!("log filter `{asked}`: {error}"))),
    }
}
