//! What is wrong with a configuration, in words an operator can act on.

use std::fmt;
use std::path::PathBuf;

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// Where the value came from: a file's path, a variable's name, a flag, or `defaults`.
    pub source: String,
    /// The key, with dots: `group.kv_tokens`.
    pub key: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.source, self.key, self.reason)
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cluster file cannot be read or is neither TOML nor YAML.
    #[error("cluster file {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Keys or values are wrong; all of them are listed, in the order of their keys.
    #[error("{}", list(.0))]
    Invalid(Vec<Complaint>),
    /// The layers could not be put together.
    #[error("configuration: {0}")]
    Layers(String),
}

fn list(complaints: &[Complaint]) -> String {
    let mut text = match complaints.len() {
        1 => "1 mistake in the configuration:".to_owned(),
        n => format!("{n} mistakes in the configuration:"),
    };
    for complaint in complaints {
        text.push_str(&format!("\n  {complaint}"));
    }
    text
}
