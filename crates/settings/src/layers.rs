//! The layers as they are given, lowest first, merged into one set of values that know where they come from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use config::{Config, ConfigError, File, FileFormat, Value, ValueKind};

use crate::error::{Error, Origin};
use crate::lines::{self, join};

/// Largest cluster file that is read, in bytes: a real one has a few hundred.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// What the variables of the configuration begin with.
const ENV_PREFIX: &str = "COHORT__";
const ENV_SEPARATOR: &str = "__";

/// One flag of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flag {
    /// The flag as typed, for messages: `--kv-tokens`.
    pub flag: &'static str,
    /// The key it sets: `group.kv_tokens`.
    pub key: &'static str,
    /// Its value.
    pub value: String,
}

/// The layers above the defaults, lowest first.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The cluster files, `.toml`, `.yaml` or `.yml`; a key of a later one wins.
    pub files: Vec<PathBuf>,
    /// The process's variables; only those that start with `COHORT__` count.
    pub environment: Vec<(String, String)>,
    /// Flags, as given.
    pub flags: Vec<Flag>,
}

/// A value of some layer.
#[derive(Debug, Clone)]
pub(crate) struct Leaf {
    pub(crate) value: Value,
    pub(crate) origin: Origin,
}

/// Leaves by full key.
pub(crate) type Leaves = BTreeMap<String, Leaf>;

/// The variable that sets a key.
pub(crate) fn variable(key: &str) -> String {
    format!("{ENV_PREFIX}{}", key.replace('.', ENV_SEPARATOR).to_uppercase())
}

/// All layers above the defaults in one set of leaves.
pub(crate) fn merged(sources: &Sources) -> Result<Leaves, Error> {
    let mut leaves = Leaves::new();
    for path in &sources.files {
        file(path, &mut leaves)?;
    }
    for (name, text) in &sources.environment {
        if let Some(key) = name.strip_prefix(ENV_PREFIX) {
            let key = key.to_lowercase().replace(ENV_SEPARATOR, ".");
            leaves.insert(key, text_leaf(text, Origin::Variable(name.clone())));
        }
    }
    for flag in &sources.flags {
        leaves.insert(flag.key.to_owned(), text_leaf(&flag.value, Origin::Flag(flag.flag)));
    }
    Ok(leaves)
}

fn text_leaf(text: &str, origin: Origin) -> Leaf {
    Leaf { value: Value::new(None, text.to_owned()), origin }
}

fn file(path: &Path, leaves: &mut Leaves) -> Result<(), Error> {
    let failed = |reason: String| Error::File { path: path.to_owned(), reason };
    let (text, format) = (read(path)?, format_of(path)?);
    let parsed = Config::builder().add_source(File::from_str(&text, format)).build();
    let parsed = parsed.map_err(|error| match error {
        ConfigError::FileParse { cause, .. } => failed(cause.to_string()),
        other => failed(other.to_string()),
    })?;
    let lines = lines::of(&text, format);
    let mut found = Vec::new();
    flatten("", parsed.cache, &mut found);
    leaves.extend(found.into_iter().map(|(key, value)| {
        let origin = Origin::File { path: path.to_owned(), line: lines.get(&key).copied() };
        (key, Leaf { value, origin })
    }));
    Ok(())
}

fn format_of(path: &Path) -> Result<FileFormat, Error> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("toml") => Ok(FileFormat::Toml),
        Some("yaml" | "yml") => Ok(FileFormat::Yaml),
        _ => Err(Error::File { path: path.to_owned(), reason: "must end in .toml, .yaml or .yml".into() }),
    }
}

fn read(path: &Path) -> Result<String, Error> {
    let failed = |reason: String| Error::File { path: path.to_owned(), reason };
    let bytes = std::fs::metadata(path).map_err(|error| failed(error.to_string()))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(failed(format!("has {bytes} bytes; a cluster file has at most {FILE_BYTES_MAX}")));
    }
    std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))
}

fn flatten(prefix: &str, value: Value, leaves: &mut Vec<(String, Value)>) {
    match value.kind {
        ValueKind::Table(table) => {
            for (name, value) in table {
                flatten(&join(prefix, &name), value, leaves);
            }
        }
        _ => leaves.push((prefix.to_owned(), value)),
    }
}
