//! Fields of a JSON object, each asked for by name and by what it may be. A null counts as absent, because the
//! published files write null for "not set".

use serde_json::{Map, Value};

use crate::error::Complaint;
use crate::strict_json::kind;

/// An object of a configuration file and where in the file it lies.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Put before field names in messages: `text_config.` or nothing.
    path: &'static str,
}

/// All complaints about a file, so that they are reported together.
#[derive(Default)]
pub(super) struct Complaints(pub(super) Vec<Complaint>);

impl Complaints {
    /// The value, or nothing and its complaint noted.
    pub(super) fn keep<T>(&mut self, outcome: Result<T, Complaint>) -> Option<T> {
        outcome.map_err(|complaint| self.0.push(complaint)).ok()
    }
}

impl<'a> Fields<'a> {
    pub(super) const fn new(map: &'a Map<String, Value>, path: &'static str) -> Self {
        Self { map, path }
    }

    /// A complaint about `name`.
    pub(super) fn complaint(&self, name: &str, reason: impl Into<String>) -> Complaint {
        Complaint { field: format!("{}{name}", self.path), reason: reason.into() }
    }

    /// The field's value unless it is absent or null.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is written at all, be it as null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// Every field that is not null.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str())
    }

    fn required(&self, name: &str, accepted: &str) -> Result<&'a Value, Complaint> {
        self.get(name).ok_or_else(|| {
            let state = if self.map.contains_key(name) { "is null" } else { "is missing" };
            self.complaint(name, format!("{state}; it must be {accepted}"))
        })
    }

    fn refused(&self, name: &str, accepted: &str, value: &Value) -> Complaint {
        self.complaint(name, format!("must be {accepted}, not {}", kind(value)))
    }

    /// A required whole number within `min..=max`.
    pub(super) fn count(&self, name: &str, min: usize, max: usize) -> Result<usize, Complaint> {
        let accepted = format!("a whole number between {min} and {max}");
        let value = self.required(name, &accepted)?;
        value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .filter(|number| (min..=max).contains(number))
            .ok_or_else(|| self.refused(name, &accepted, value))
    }

    /// A required number above zero that stays so, and finite, as fp32.
    pub(super) fn positive(&self, name: &str) -> Result<f32, Complaint> {
        let accepted = "a number above zero within the range of fp32";
        let value = self.required(name, accepted)?;
        value
            .as_f64()
            .map(|number| number as f32)
            .filter(|number| number.is_finite() && *number > 0.0)
            .ok_or_else(|| self.refused(name, accepted, value))
    }

    /// A required true or false.
    pub(super) fn flag(&self, name: &str) -> Result<bool, Complaint> {
        let accepted = "true or false";
        let value = self.required(name, accepted)?;
        value.as_bool().ok_or_else(|| self.refused(name, accepted, value))
    }

    /// A required word, one of `choices`.
    pub(super) fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Result<T, Complaint> {
        let accepted = words(choices);
        let value = self.required(name, &accepted)?;
        chosen(value, choices).ok_or_else(|| self.refused(name, &accepted, value))
    }

    /// A list of exactly `count` words, each one of `choices`; nothing when the field is absent.
    pub(super) fn list<T: Copy>(
        &self,
        name: &str,
        count: usize,
        choices: &[(&str, T)],
    ) -> Result<Option<Vec<T>>, Complaint> {
        let accepted = format!("a list of {count} entries, one a layer, each {}", words(choices));
        let Some(value) = self.get(name) else { return Ok(None) };
        let items = value.as_array().ok_or_else(|| self.refused(name, &accepted, value))?;
        if items.len() != count {
            return Err(self.complaint(name, format!("has {} entries; it must be {accepted}", items.len())));
        }
        let each = |(at, item): (usize, &Value)| {
            let reason = || format!("entry {at} is {}; it must be {accepted}", kind(item));
            chosen(item, choices).ok_or_else(|| self.complaint(name, reason()))
        };
        items.iter().enumerate().map(each).collect::<Result<Vec<T>, Complaint>>().map(Some)
    }

    /// An object; nothing when the field is absent.
    pub(super) fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, Complaint> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.refused(name, "an object", value))
    }

    /// A field that may be absent, and otherwise must have the one value that is implemented.
    pub(super) fn fixed(&self, name: &str, implemented: &Value) -> Result<(), Complaint> {
        let Some(value) = self.get(name) else { return Ok(()) };
        let equal = match (value.as_f64(), implemented.as_f64()) {
            (Some(found), Some(wanted)) => found == wanted,
            _ => value == implemented,
        };
        if equal {
            return Ok(());
        }
        let only = if implemented.is_null() { "absent or null".to_owned() } else { kind(implemented) };
        Err(self.complaint(name, format!("is {}, and only {only} is implemented", kind(value))))
    }
}

fn chosen<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Option<T> {
    let word = value.as_str()?;
    choices.iter().find(|(name, _)| *name == word).map(|(_, choice)| *choice)
}

fn words<T>(choices: &[(&str, T)]) -> String {
    let quoted: Vec<String> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
    quoted.join(" or ")
}
