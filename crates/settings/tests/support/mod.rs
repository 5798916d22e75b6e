//! Shared by the test files of this crate.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::io::Write;

use settings::{Complaint, Error, Flag, Settings, Sources};

/// A cluster file with this text; gone when dropped.
pub(crate) fn file(suffix: &str, text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().prefix("cluster").suffix(suffix).tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// Only this file.
pub(crate) fn from_file(file: &tempfile::NamedTempFile) -> Sources {
    Sources { files: vec![file.path().to_owned()], ..Sources::default() }
}

/// Only these variables.
pub(crate) fn from_environment(variables: &[(&str, &str)]) -> Sources {
    let environment = variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    Sources { environment, ..Sources::default() }
}

/// A flag.
pub(crate) fn flag(flag: &'static str, key: &'static str, value: &str) -> Flag {
    Flag { flag, key, value: value.into() }
}

/// The settings of a TOML text.
pub(crate) fn toml(text: &str) -> Result<Settings, Error> {
    Settings::load(&from_file(&file(".toml", text)))
}

/// What is wrong with these sources.
#[track_caller]
pub(crate) fn complaints(sources: &Sources) -> Vec<Complaint> {
    match Settings::load(sources) {
        Err(Error::Invalid(complaints)) => complaints,
        other => panic!("expected complaints, got {other:?}"),
    }
}

/// What is wrong with a TOML text, as `key: reason`.
#[track_caller]
pub(crate) fn wrong(text: &str) -> Vec<String> {
    let file = file(".toml", text);
    complaints(&from_file(&file)).into_iter().map(|c| format!("{}: {}", c.key, c.reason)).collect()
}
