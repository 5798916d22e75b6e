//! Putting the layers together, and listing everything that is wrong with them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use config::{Config, ConfigError, Environment, File, FileFormat, Value, ValueKind};

use crate::check;
use crate::error::{Complaint, Error};
use crate::tree::Settings;

/// Largest cluster file that is read, in bytes: a real one has a few hundred.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
const ENV_PREFIX: &str = "COHORT";
const ENV_SEPARATOR: &str = "__";
/// What the `config` crate calls values from variables.
const ENV_ORIGIN: &str = "the environment";

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
    /// The cluster file: `.toml`, `.yaml` or `.yml`.
    pub file: Option<PathBuf>,
    /// The process's variables; only those that start with `COHORT__` count.
    pub environment: Vec<(String, String)>,
    /// Flags, as given.
    pub flags: Vec<Flag>,
}

/// A value of some layer, with its full key.
type Leaves = BTreeMap<String, Value>;

impl Settings {
    /// Puts defaults, file, environment and flags together.
    ///
    /// # Errors
    /// [`Error::File`] when the file cannot be read or parsed; [`Error::Invalid`] with every unknown key, every value
    /// of the wrong type, and (where the types are right) every value out of range.
    pub fn load(sources: &Sources) -> Result<Self, Error> {
        let leaves = merged(sources)?;
        let known = Self::keys();
        let mut complaints = Vec::new();
        let mut good = Leaves::new();
        let mut bad = BTreeSet::new();
        for (key, value) in leaves {
            let problem =
                if known.contains(&key) { wrong_type(&key, &value) } else { Some(unknown(&key, &known)) };
            match problem {
                Some(reason) => {
                    let source = source_of(&value, &key, sources);
                    complaints.push(Complaint { source, key: key.clone(), reason });
                    bad.insert(key);
                }
                None => _ = good.insert(key, value),
            }
        }
        let settings = typed(&good).map_err(|error| Error::Layers(error.to_string()))?;
        for (key, reason) in check::faults(&settings) {
            if bad.contains(key) {
                continue;
            }
            let source =
                good.get(key).map_or_else(|| "defaults".into(), |value| source_of(value, key, sources));
            complaints.push(Complaint { source, key: key.to_owned(), reason });
        }
        if complaints.is_empty() {
            return Ok(settings);
        }
        complaints.sort_by(|a, b| a.key.cmp(&b.key));
        Err(Error::Invalid(complaints))
    }

    /// Every key there is, with dots: `group.kv_tokens`.
    #[must_use]
    pub fn keys() -> BTreeSet<String> {
        Self::default().entries().into_iter().map(|(key, _)| key).collect()
    }

    /// Every key with its value; `null` where the key is left out.
    #[must_use]
    pub fn entries(&self) -> Vec<(String, serde_json::Value)> {
        let mut entries = Vec::new();
        // A tree of plain structs always has a JSON form.
        let tree = serde_json::to_value(self).unwrap_or_default();
        flatten_json("", tree, &mut entries);
        entries
    }
}

fn flatten_json(prefix: &str, value: serde_json::Value, entries: &mut Vec<(String, serde_json::Value)>) {
    match value {
        serde_json::Value::Object(map) => {
            for (name, value) in map {
                flatten_json(&join(prefix, &name), value, entries);
            }
        }
        leaf => entries.push((prefix.to_owned(), leaf)),
    }
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

/// All layers above the defaults in one set of leaves.
fn merged(sources: &Sources) -> Result<Leaves, Error> {
    let mut builder = Config::builder();
    if let Some(path) = &sources.file {
        builder = builder.add_source(File::from_str(&read(path)?, format_of(path)?));
    }
    let variables = sources.environment.iter().cloned().collect();
    let environment = Environment::with_prefix(ENV_PREFIX).separator(ENV_SEPARATOR).source(Some(variables));
    builder = builder.add_source(environment);
    for flag in &sources.flags {
        let value = Value::new(Some(&flag.flag.to_owned()), flag.value.clone());
        builder = builder.set_override(flag.key, value).map_err(|e| Error::Layers(e.to_string()))?;
    }
    let config = builder.build().map_err(|error| match (&error, &sources.file) {
        (ConfigError::FileParse { cause, .. }, Some(path)) => {
            Error::File { path: path.clone(), reason: cause.to_string() }
        }
        _ => Error::Layers(error.to_string()),
    })?;
    let mut leaves = Leaves::new();
    flatten("", config.cache, &mut leaves);
    Ok(leaves)
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

fn flatten(prefix: &str, value: Value, leaves: &mut Leaves) {
    match value.kind {
        ValueKind::Table(table) => {
            for (name, value) in table {
                flatten(&join(prefix, &name), value, leaves);
            }
        }
        _ => _ = leaves.insert(prefix.to_owned(), value),
    }
}

/// A tree with these leaves and defaults elsewhere.
fn typed(leaves: &Leaves) -> Result<Settings, ConfigError> {
    let mut builder = Config::builder();
    for (key, value) in leaves {
        builder = builder.set_override(key, value.clone())?;
    }
    builder.build()?.try_deserialize()
}

/// Why this value does not fit its key; tried alone, so one bad value does not hide another.
fn wrong_type(key: &str, value: &Value) -> Option<String> {
    let alone = Leaves::from([(key.to_owned(), value.clone())]);
    typed(&alone).err().map(|error| reason(&error))
}

fn reason(error: &ConfigError) -> String {
    match error {
        ConfigError::At { error, .. } => reason(error),
        ConfigError::Type { unexpected, expected, .. } => format!("must be {expected}, not {unexpected}"),
        ConfigError::Message(message) => message.clone(),
        other => other.to_string(),
    }
}

fn unknown(key: &str, known: &BTreeSet<String>) -> String {
    let inside = format!("{key}.");
    if let Some(example) = known.iter().find(|candidate| candidate.starts_with(&inside)) {
        return format!("is a section, not a value; set a key in it, such as {example}");
    }
    let distance = |candidate: &&String| strsim::damerau_levenshtein(key, candidate);
    match known.iter().min_by_key(distance) {
        Some(nearest) => format!("unknown key; did you mean {nearest}?"),
        None => "unknown key".into(),
    }
}

fn source_of(value: &Value, key: &str, sources: &Sources) -> String {
    match value.origin() {
        Some(ENV_ORIGIN) => {
            let name = key.replace('.', ENV_SEPARATOR).to_uppercase();
            format!("{ENV_PREFIX}{ENV_SEPARATOR}{name}")
        }
        Some(flag) if flag.starts_with("--") => flag.to_owned(),
        _ => sources.file.as_ref().map_or_else(|| "configuration".into(), |path| path.display().to_string()),
    }
}
