//! What there is to say of each key, taken from the schema, so that no list of keys is kept by hand.

use serde_json::{Map, Value};

use crate::layers::variable;
use crate::lines::join;
use crate::tree::Settings;

/// One key of the tree.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    /// Its full name: `group.kv_tokens`.
    pub name: String,
    /// What it does.
    pub description: String,
    /// What may be written: `a whole number, 1 to 4096`.
    pub values: String,
    /// Its default; `null` where leaving the key out means something of its own.
    pub default: Value,
    /// The variable that sets it.
    pub variable: String,
}

/// One section of the tree.
#[derive(Debug, Clone, PartialEq)]
pub struct Section {
    /// Its full name: `router.limits`.
    pub name: String,
    /// What it is about.
    pub description: String,
    /// Its keys, in order.
    pub keys: Vec<Key>,
}

impl Settings {
    /// Every section with its keys, in the order of the tree.
    #[must_use]
    pub fn sections() -> Vec<Section> {
        let schema = Self::schema();
        let mut sections = Vec::new();
        section("", &schema, &mut sections);
        sections
    }
}

fn section(prefix: &str, schema: &Value, sections: &mut Vec<Section>) {
    let empty = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&empty);
    let (inner, leaves): (Vec<_>, Vec<_>) =
        properties.iter().partition(|(_, schema)| schema.get("properties").is_some());
    if !leaves.is_empty() {
        let keys = leaves.into_iter().map(|(name, schema)| key(join(prefix, name), schema)).collect();
        let description = text(schema, "description");
        sections.push(Section { name: prefix.to_owned(), description, keys });
    }
    for (name, schema) in inner {
        section(&join(prefix, name), schema, sections);
    }
}

fn key(name: String, schema: &Value) -> Key {
    Key {
        description: text(schema, "description"),
        values: values(schema),
        default: schema["default"].clone(),
        variable: variable(&name),
        name,
    }
}

fn text(schema: &Value, field: &str) -> String {
    schema[field].as_str().unwrap_or_default().to_owned()
}

fn values(schema: &Value) -> String {
    if let Some(names) = schema["enum"].as_array() {
        let names: Vec<String> = names.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        return names.join(", ");
    }
    let example = || match schema["examples"].as_array() {
        Some(examples) => {
            format!(", such as {}", examples.iter().map(shown).collect::<Vec<_>>().join(" or "))
        }
        None => String::new(),
    };
    match schema["type"].as_str() {
        Some("integer") => format!("a whole number{}", range(schema)),
        Some("number") => format!("seconds{}", range(schema)),
        Some("boolean") => "true, false".to_owned(),
        Some("array") => format!("a list{}", example()),
        _ => format!("text{}", example()),
    }
}

fn range(schema: &Value) -> String {
    match (&schema["minimum"], &schema["maximum"]) {
        (Value::Null, _) | (_, Value::Null) => String::new(),
        (least, most) => format!(", {} to {}", shown(least), shown(most)),
    }
}

/// A value as it is written in a TOML file; whole numbers without a fraction.
fn shown(value: &Value) -> String {
    match value.as_f64() {
        Some(number) => number.to_string(),
        None => value.to_string(),
    }
}
