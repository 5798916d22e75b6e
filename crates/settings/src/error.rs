//! What is wrong with a configuration, in words an operator can act on.

use std::fmt;
use std::path::PathBuf;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A cluster file.
    File {
        /// The file, as it was named.
        path: PathBuf,
        /// The line of the key, from 1; none where the file does not tell.
        line: Option<usize>,
    },
    /// A variable of the environment, as it was set.
    Variable(String),
    /// A flag, as typed.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("defaults"),
            Self::File { path, line: Some(line) } => write!(f, "{}:{line}", path.display()),
            Self::File { path, line: None } => path.display().fmt(f),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// Where the value comes from.
    pub origin: Origin,
    /// The key, with dots: `group.kv_tokens`.
    pub key: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.origin, self.key, self.reason)
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
