//! From the layers to the tree, and everything that is wrong on the way.

use std::collections::{BTreeMap, BTreeSet};

use config::{Config, ConfigError};

use crate::check;
use crate::error::{Complaint, Error, Origin};
use crate::layers::{Leaves, Sources, merged};
use crate::lines::join;
use crate::tree::Settings;

/// A configuration and where its values come from.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub settings: Settings,
    /// The keys that somebody set; all others have their defaults.
    pub origins: BTreeMap<String, Origin>,
}

impl Loaded {
    /// Where the value of `key` comes from.
    #[must_use]
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }
}

impl Settings {
    /// Puts defaults, files, environment and flags together.
    ///
    /// # Errors
    /// [`Error::File`] when a file cannot be read or parsed; [`Error::Invalid`] with every unknown key, every value
    /// of the wrong type, and (where the types are right) every value out of range.
    pub fn load(sources: &Sources) -> Result<Self, Error> {
        Ok(Self::load_traced(sources)?.settings)
    }

    /// As [`Settings::load`], with the origin of every value.
    ///
    /// # Errors
    /// As [`Settings::load`].
    pub fn load_traced(sources: &Sources) -> Result<Loaded, Error> {
        let leaves = merged(sources)?;
        let known = Self::keys();
        let mut complaints = Vec::new();
        let mut good = Leaves::new();
        let mut bad = BTreeSet::new();
        for (key, leaf) in leaves {
            let problem =
                if known.contains(&key) { wrong_type(&key, &leaf) } else { Some(unknown(&key, &known)) };
            match problem {
                Some(reason) => {
                    complaints.push(Complaint { origin: leaf.origin, key: key.clone(), reason });
                    bad.insert(key);
                }
                None => _ = good.insert(key, leaf),
            }
        }
        let settings = typed(&good).map_err(|error| Error::Layers(error.to_string()))?;
        for (key, reason) in check::faults(&settings) {
            if bad.contains(key) {
                continue;
            }
            let origin = good.get(key).map_or(Origin::Default, |leaf| leaf.origin.clone());
            complaints.push(Complaint { origin, key: key.to_owned(), reason });
        }
        if complaints.is_empty() {
            let origins = good.into_iter().map(|(key, leaf)| (key, leaf.origin)).collect();
            return Ok(Loaded { settings, origins });
        }
        complaints.sort_by(|a, b| a.key.cmp(&b.key));
        Err(Error::Invalid(complaints))
    }

    /// Every key there is, with dots: `group.kv_tokens`.
    #[must_use]
    pub fn keys() -> BTreeSet<String> {
        Self::default().entries().into_iter().map(|(key, _)| key).collect()
    }

    /// The known key that looks most like `key`.
    #[must_use]
    pub fn nearest_key(key: &str) -> Option<String> {
        nearest(key, &Self::keys()).cloned()
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

/// A tree with these leaves and defaults elsewhere.
fn typed(leaves: &Leaves) -> Result<Settings, ConfigError> {
    let mut builder = Config::builder();
    for (key, leaf) in leaves {
        builder = builder.set_override(key, leaf.value.clone())?;
    }
    builder.build()?.try_deserialize()
}

/// Why this value does not fit its key; tried alone, so one bad value does not hide another.
fn wrong_type(key: &str, leaf: &crate::layers::Leaf) -> Option<String> {
    let alone = Leaves::from([(key.to_owned(), leaf.clone())]);
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
    match nearest(key, known) {
        Some(nearest) => format!("unknown key; did you mean {nearest}?"),
        None => "unknown key".into(),
    }
}

fn nearest<'a>(key: &str, known: &'a BTreeSet<String>) -> Option<&'a String> {
    known.iter().min_by_key(|candidate| strsim::damerau_levenshtein(key, candidate))
}
