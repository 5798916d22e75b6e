//! The fields of a request: each is taken by the part that makes it work, and what is left over is refused by its
//! name. Nothing can be ignored by accident.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use proto::{Failure, Violation};
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use super::error::ApiError;

/// The fields of one JSON object that nobody has taken yet, and what was wrong with those that were.
#[derive(Debug)]
pub(super) struct Fields {
    left: BTreeMap<String, Box<RawValue>>,
    wrong: Vec<Violation>,
}

impl Fields {
    /// Reads a body. Null means that a field is not set.
    pub(super) fn read(body: &[u8]) -> Result<Self, ApiError> {
        let left: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(body).map_err(|error| {
            let message = format!("the body is not a JSON object: {error}");
            ApiError::new(StatusCode::BAD_REQUEST, message)
        })?;
        let left = left.into_iter().filter(|(_, value)| value.get() != "null").collect();
        Ok(Self { left, wrong: Vec::new() })
    }

    /// Reads an object inside a field.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn within(raw: &RawValue) -> Result<Self, String> {
        let left: BTreeMap<String, Box<RawValue>> =
            serde_json::from_str(raw.get()).map_err(|_| "must be an object".to_owned())?;
        let left = left.into_iter().filter(|(_, value)| value.get() != "null").collect();
        Ok(Self { left, wrong: Vec::new() })
    }

    /// What was wrong inside the object, fields that are left over included.
    ///
    /// # Errors
    /// All of it in one line.
    pub(super) fn faults(mut self) -> Result<(), String> {
        for name in std::mem::take(&mut self.left).into_keys() {
            self.refuse(name, "is not supported");
        }
        let lines: Vec<String> = self.wrong.iter().map(|v| format!("{} {}", v.field, v.reason)).collect();
        if lines.is_empty() { Ok(()) } else { Err(lines.join("; ")) }
    }

    /// Takes a field, if it is set.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &'static str) -> Option<T> {
        let raw = self.left.remove(name)?;
        match serde_json::from_str(raw.get()) {
            Ok(value) => Some(value),
            Err(error) => {
                // The position would be one inside the field.
                let text = error.to_string();
                let reason = text.split(" at line ").next().unwrap_or_default();
                self.refuse(name, format!("is not what it should be: {reason}"));
                None
            }
        }
    }

    /// Takes a field's JSON text as it is.
    pub(super) fn raw(&mut self, name: &'static str) -> Option<String> {
        self.left.remove(name).map(|raw| raw.get().to_owned())
    }

    /// Refuses a field.
    pub(super) fn refuse(&mut self, name: impl Into<String>, reason: impl Into<String>) {
        self.wrong.push(Violation::new(name.into(), reason));
    }

    /// Takes the fields that have no effect at one value and are not supported at any other.
    pub(super) fn without_effect(&mut self, table: &[(&'static str, &str)]) {
        for &(name, only) in table {
            let Some(raw) = self.left.remove(name) else { continue };
            let (given, only) = (serde_json::from_str(raw.get()), serde_json::from_str(only));
            match (given, only) {
                (Ok(given), Ok(only)) if same(&given, &only) => {}
                (_, Ok(only)) => self.refuse(name, format!("is not supported; only {only} is")),
                (_, Err(_)) => self.refuse(name, "is not supported"),
            }
        }
    }

    /// All that was wrong, fields that are left over included.
    pub(super) fn finish(mut self) -> Result<(), ApiError> {
        for name in std::mem::take(&mut self.left).into_keys() {
            self.refuse(name, "is not supported");
        }
        if self.wrong.is_empty() { Ok(()) } else { Err(Failure::Invalid(self.wrong).into()) }
    }
}

/// Equality with numbers compared by value: 0 is 0.0.
fn same(a: &Value, b: &Value) -> bool {
    a == b || matches!((a.as_f64(), b.as_f64()), (Some(a), Some(b)) if a == b)
}
