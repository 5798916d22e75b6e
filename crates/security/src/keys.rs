//! The file of API keys: one line a key, its SHA-256 instead of itself. Keys are 256 random bits, so a fast hash is enough:
//! there is nothing to guess from a dictionary.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::live::{Live, read_text};
use crate::secret::{hex, random};
use crate::{Error, Limits, Meter};

/// Keys of one file: all of them are compared at every call.
const KEYS_MAX: usize = 4096;
/// Bytes of a key that is looked at: real ones have fewer.
const KEY_BYTES_MAX: usize = 512;
/// What a key begins with, so that scanners for leaked secrets find it.
const PREFIX: &str = "cohort-";
const RANDOM_BYTES: usize = 32;
const DIGEST_BYTES: usize = 32;

/// One line of the file, after its name: `name = { sha256 = "…", requests_per_minute = 60 }`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyLine {
    /// SHA-256 of the key, in hexadecimal.
    pub sha256: String,
    /// Calls in a minute.
    #[serde(default)]
    pub requests_per_minute: Option<u64>,
    /// Prompt and generated tokens in a minute.
    #[serde(default)]
    pub tokens_per_minute: Option<u64>,
    /// Calls at once.
    #[serde(default)]
    pub concurrency: Option<u32>,
    /// The most urgent priority it may ask for; lower numbers are served first.
    #[serde(default)]
    pub priority_min: Option<i32>,
}

/// The keys of a file.
#[derive(Debug)]
pub struct Keys {
    entries: Vec<([u8; DIGEST_BYTES], Meter)>,
}

impl Keys {
    /// Reads the text of a key file. Keys that are in `old` too go on with what they have used.
    ///
    /// # Errors
    /// What is wrong and which key it concerns.
    pub fn parse(text: &str, old: Option<&Self>) -> Result<Self, String> {
        let lines: BTreeMap<String, KeyLine> = toml::from_str(text)
            .map_err(|error| format!("is no file of API keys: {}", shown(&error, text)))?;
        if lines.len() > KEYS_MAX {
            return Err(format!("has {} keys; at most {KEYS_MAX}", lines.len()));
        }
        let mut entries: Vec<([u8; DIGEST_BYTES], Meter)> = Vec::with_capacity(lines.len());
        for (name, line) in lines {
            let digest = digest_of(&line.sha256).ok_or_else(|| {
                format!(
                    "key {name:?}: sha256 must be 64 hexadecimal digits, as `cohort keys new` prints them"
                )
            })?;
            let limits = line.limits().map_err(|reason| format!("key {name:?}: {reason}"))?;
            if let Some((_, other)) = entries.iter().find(|(known, _)| *known == digest) {
                return Err(format!("keys {:?} and {name:?} are the same key", other.name()));
            }
            let known = old.and_then(|old| old.entries.iter().find(|(known, _)| *known == digest));
            let meter = match known {
                Some((_, meter)) => meter.renewed(&name, limits),
                None => Meter::new(&name, limits),
            };
            entries.push((digest, meter));
        }
        Ok(Self { entries })
    }

    /// Whose key this is. All keys are compared, each in the same time wherever it differs.
    #[must_use]
    pub fn find(&self, given: &str) -> Option<&Meter> {
        if given.len() > KEY_BYTES_MAX {
            return None;
        }
        let digest = Sha256::digest(given.as_bytes());
        let (mut at, mut found) = (0_u64, Choice::from(0));
        for (index, (known, _)) in (0_u64..).zip(&self.entries) {
            let same = known.as_slice().ct_eq(digest.as_slice());
            at.conditional_assign(&index, same);
            found |= same;
        }
        let index = usize::try_from(at).ok().filter(|_| bool::from(found))?;
        self.entries.get(index).map(|(_, meter)| meter)
    }
}

impl KeyLine {
    fn limits(&self) -> Result<Limits, String> {
        let Self { requests_per_minute, tokens_per_minute, concurrency, priority_min, .. } = *self;
        let limits = Limits { requests_per_minute, tokens_per_minute, concurrency, priority_min };
        limits.check()?;
        Ok(limits)
    }
}

/// The message and line of a mistake, never the text itself.
fn shown(error: &toml::de::Error, text: &str) -> String {
    let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    match line {
        Some(line) => format!("line {line}: {}", error.message()),
        None => error.message().to_owned(),
    }
}

fn digest_of(text: &str) -> Option<[u8; DIGEST_BYTES]> {
    if text.len() != 2 * DIGEST_BYTES || !text.is_ascii() {
        return None;
    }
    let mut digest = [0; DIGEST_BYTES];
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(digest)
}

/// A new key, to be shown once.
///
/// # Errors
/// [`Error::Random`].
pub fn generate_key() -> Result<String, Error> {
    Ok(format!("{PREFIX}{}", hex(&random::<RANDOM_BYTES>()?)))
}

/// The file's line for a key, without the key; none for a name that is not of letters, digits, `-` and `_`.
#[must_use]
pub fn key_line(name: &str, key: &str, limits: &Limits) -> Option<String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if name.is_empty() || !name.bytes().all(plain) {
        return None;
    }
    let mut fields = format!("sha256 = \"{}\"", hex(&Sha256::digest(key.as_bytes())));
    let mut add = |field: &str, value: Option<i64>| {
        if let Some(value) = value {
            fields.push_str(&format!(", {field} = {value}"));
        }
    };
    let whole = |count: Option<u64>| count.map(|count| i64::try_from(count).unwrap_or(i64::MAX));
    add("requests_per_minute", whole(limits.requests_per_minute));
    add("tokens_per_minute", whole(limits.tokens_per_minute));
    add("concurrency", limits.concurrency.map(i64::from));
    add("priority_min", limits.priority_min.map(i64::from));
    Some(format!("{name} = {{ {fields} }}"))
}

/// A file of keys that may change.
#[derive(Debug, Clone)]
pub struct KeyFile(Arc<Live<Keys>>);

impl KeyFile {
    /// Reads the file a first time.
    ///
    /// # Errors
    /// What [`Error`] says of a file, and [`Error::Content`] with the key that is wrong.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file: PathBuf = path.to_owned();
        let make = move |old: Option<&Keys>| {
            Keys::parse(&read_text(&file)?, old)
                .map_err(|reason| Error::Content { path: file.clone(), reason })
        };
        Ok(Self(Live::new("the API keys", vec![path.to_owned()], make)?))
    }

    /// Reads it again whenever it changes. Inside a runtime.
    pub fn watch(&self) {
        self.0.watch();
    }

    /// The keys in force.
    #[must_use]
    pub fn keys(&self) -> Arc<Keys> {
        self.0.get()
    }
}
