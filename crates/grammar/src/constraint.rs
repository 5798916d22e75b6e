//! What an answer's text must look like, as a grammar.

use serde_json::{Value, json};
use types::Constraint;

use crate::limits::{BLANKS_MAX, CHOICES_MAX, DEPTH_MAX, FORM_BYTES_MAX, PATTERN_BYTES_MAX};
use crate::{Refused, structural};

/// The grammar `name` of a text of this form, and those it refers to, in the compiler's form.
pub(crate) fn grammars(name: &str, constraint: &Constraint) -> Result<Vec<Value>, Refused> {
    check_size(constraint)?;
    match constraint {
        Constraint::JsonObject => Ok(vec![schema(name, json!({ "type": "object" }), Reading::Strict)]),
        Constraint::Json(text) => Ok(vec![schema(name, read_schema(text)?, Reading::Strict)]),
        Constraint::Regex(pattern) => Ok(vec![lark(name, &regex(pattern)?)]),
        Constraint::Choice(choices) => Ok(vec![lark(name, &choice(choices)?)]),
        Constraint::Grammar(grammar) => {
            check_brackets(grammar)?;
            Ok(vec![lark(name, grammar)])
        }
        Constraint::StructuralTag(tag) => structural::grammars(name, tag),
    }
}

fn check_size(constraint: &Constraint) -> Result<(), Refused> {
    let (bytes, max) = match constraint {
        Constraint::Json(text) | Constraint::StructuralTag(text) => (text.len(), FORM_BYTES_MAX),
        Constraint::Regex(text) | Constraint::Grammar(text) => (text.len(), PATTERN_BYTES_MAX),
        Constraint::Choice(choices) => (choices.iter().map(String::len).sum(), FORM_BYTES_MAX),
        Constraint::JsonObject => (0, FORM_BYTES_MAX),
    };
    match bytes > max {
        true => Err(Refused::new("", format!("has {bytes} bytes; at most {max}"))),
        false => Ok(()),
    }
}

/// What becomes of keywords of a schema that cannot be enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reading {
    /// The schema is refused.
    Strict,
    /// They are passed over: the schema was given as a hint.
    Lenient,
}

pub(crate) fn lark(name: &str, text: &str) -> Value {
    json!({ "name": name, "lark_grammar": text })
}

/// A schema as the grammar `name`. Blanks between its parts are bounded.
pub(crate) fn schema(name: &str, mut schema: Value, reading: Reading) -> Value {
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    if let Some(object) = schema.as_object_mut() {
        let blanks = format!("[ \\n\\t]{{1,{BLANKS_MAX}}}");
        let lenient = reading == Reading::Lenient;
        let options = json!({ "whitespace_pattern": blanks, "lenient": lenient });
        object.insert("x-guidance".to_owned(), options);
    }
    json!({ "name": name, "json_schema": schema })
}

pub(crate) fn read_schema(text: &str) -> Result<Value, Refused> {
    let schema: Value = serde_json::from_str(text)
        .map_err(|error| Refused::new("", format!("is not a JSON schema: {error}")))?;
    check_schema(schema, "")
}

pub(crate) fn check_schema(schema: Value, path: &str) -> Result<Value, Refused> {
    if !schema.is_object() && !schema.is_boolean() {
        return Err(Refused::new(path, "is not a JSON schema: it must be an object, true or false"));
    }
    let depth = depth(&schema);
    if depth > DEPTH_MAX {
        return Err(Refused::new(path, format!("is nested {depth} deep; at most {DEPTH_MAX}")));
    }
    Ok(schema)
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    }
}

/// The whole answer must match, so anchors at the ends of a pattern say nothing new, and the compiler has none.
fn regex(pattern: &str) -> Result<String, Refused> {
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    let escapes = |text: &str| text.bytes().rev().take_while(|&byte| byte == b'\\').count();
    let pattern = match pattern.strip_suffix('$') {
        Some(before) if escapes(before).is_multiple_of(2) => before,
        Some(_) | None => pattern,
    };
    if pattern.is_empty() {
        return Err(Refused::new("", "is empty; nothing could be answered"));
    }
    // As in JSON schemas, \d, \w and \s are of ASCII.
    Ok(format!("start: /{}/", llguidance::regex_to_lark(pattern, "dws")))
}

fn choice(choices: &[String]) -> Result<String, Refused> {
    if choices.is_empty() || choices.len() > CHOICES_MAX {
        let reason = format!("has {} entries; it must have 1 to {CHOICES_MAX}", choices.len());
        return Err(Refused::new("", reason));
    }
    if let Some(index) = choices.iter().position(String::is_empty) {
        return Err(Refused::new(format!("[{index}]"), "is empty; nothing could be answered"));
    }
    let choices: Vec<String> = choices.iter().map(|choice| literal(choice)).collect();
    Ok(format!("start: {}", choices.join(" | ")))
}

/// A text as a Lark grammar writes it.
pub(crate) fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// Refuses brackets nested so deeply that the compiler's stack would not do. Those in texts are counted too: no grammar
/// in use comes near the limit.
fn check_brackets(grammar: &str) -> Result<(), Refused> {
    let (mut open, mut deepest) = (0_usize, 0_usize);
    for byte in grammar.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(open);
    }
    match deepest > DEPTH_MAX {
        true => Err(Refused::new("", format!("nests brackets {deepest} deep; at most {DEPTH_MAX}"))),
        false => Ok(()),
    }
}
