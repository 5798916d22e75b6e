//! The tree as a JSON Schema, and the parts of it that types alone do not say.

use model::Preset;
use schemars::generate::SchemaSettings;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::Value;
use types::limits::WEIGHT_MAX;
use types::{Dispatch, DispatchChoice, ExpertSharding};

use worker::LoadFormat;

use crate::LogFormat;
use crate::tree::Settings;

impl Settings {
    /// The JSON Schema (draft 7, which Helm and editors read) of a cluster file: every key with its description, type,
    /// range and default. What a file must satisfy beyond it, `cohort config check` says.
    #[must_use]
    pub fn schema() -> Value {
        let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
        let mut schema = Value::from(settings.into_generator().into_root_schema_for::<Self>());
        tidy(&mut schema);
        if let Value::Object(root) = &mut schema {
            root.insert("title".to_owned(), "Cohort cluster file".into());
            // A tree of defaults at the root would only repeat what stands at every key.
            root.remove("default");
        }
        schema
    }
}

/// Removes what says nothing to whoever reads a file: Rust's integer widths, defaults that are "left out", and names of
/// our types.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(map) => {
            // A key could have one of these names; then its value is an object.
            for name in ["format", "title"] {
                if map.get(name).is_some_and(Value::is_string) {
                    map.remove(name);
                }
            }
            if map.get("default").is_some_and(|default| default.is_null() || default.is_object()) {
                map.remove("default");
            }
            if let Some(Value::String(text)) = map.get_mut("description") {
                *text = text.replace('\n', " ");
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

const ADDRESS: &str = r"^(\[[0-9a-fA-F:.]+\]|[0-9]{1,3}(\.[0-9]{1,3}){3}):[0-9]{1,5}$";
const WORKER: &str = r"^(dns\+)?https?://(\[[^\[\]/@ ]+\]|[^\[\]/:@ ]+):[0-9]{1,5}$";

fn one_of(names: &[&str]) -> Schema {
    json_schema!({ "type": "string", "enum": names })
}

pub(crate) fn dtype(_: &mut SchemaGenerator) -> Schema {
    one_of(&["f32", "bf16"])
}

pub(crate) fn preset(_: &mut SchemaGenerator) -> Schema {
    one_of(&Preset::ALL.map(Preset::name))
}

pub(crate) fn load_format(_: &mut SchemaGenerator) -> Schema {
    one_of(&[LoadFormat::Checkpoint, LoadFormat::Dummy].map(LoadFormat::name))
}

pub(crate) fn log_format(_: &mut SchemaGenerator) -> Schema {
    one_of(&[LogFormat::Human, LogFormat::Json].map(LogFormat::name))
}

pub(crate) fn device(_: &mut SchemaGenerator) -> Schema {
    one_of(&["auto", "cpu", "cuda"])
}

pub(crate) fn experts(_: &mut SchemaGenerator) -> Schema {
    one_of(&[ExpertSharding::Tensor.name(), ExpertSharding::Expert.name()])
}

pub(crate) fn dispatch(_: &mut SchemaGenerator) -> Schema {
    one_of(&[
        DispatchChoice::Auto.name(),
        DispatchChoice::Of(Dispatch::Replicated).name(),
        DispatchChoice::Of(Dispatch::AllToAll).name(),
    ])
}

pub(crate) fn address(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "pattern": ADDRESS, "examples": ["0.0.0.0:50051"] })
}

pub(crate) fn address_or_off(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "pattern": format!("^off$|{ADDRESS}"), "examples": ["0.0.0.0:8080", "off"] })
}

pub(crate) fn weights(_: &mut SchemaGenerator) -> Schema {
    let entry = format!("{}=[0-9]{{1,3}}$", WORKER.trim_end_matches('$'));
    json_schema!({
        "type": "array",
        "items": { "type": "string", "pattern": entry },
        "examples": [["http://10.0.0.11:50052=2"]],
    })
}

pub(crate) fn group_weights(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": { "type": "integer", "minimum": 0, "maximum": WEIGHT_MAX },
        "examples": [[2, 1, 0]],
    })
}

pub(crate) fn workers(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": { "type": "string", "pattern": WORKER },
        "examples": [["http://10.0.0.11:50052"]],
    })
}
