//! Free text with tags in it: behind each trigger a tag must follow, whose inside has a schema.

use std::fmt::Write;

use serde_json::Value;

use crate::Refused;
use crate::constraint::{Reading, check_schema, lark, literal, schema};
use crate::limits::TAGS_MAX;

/// One kind of tag.
struct Tag {
    begin: String,
    end: String,
    schema: Value,
}

/// The grammar `name` and those it refers to.
pub(crate) fn grammars(name: &str, text: &str) -> Result<Vec<Value>, Refused> {
    let whole: Value = serde_json::from_str(text)
        .map_err(|error| Refused::new("", format!("is not a JSON object: {error}")))?;
    let object = whole.as_object().ok_or_else(|| Refused::new("", "is not a JSON object"))?;
    for (key, value) in object {
        match key.as_str() {
            "structures" | "triggers" => {}
            "type" if value == "structural_tag" => {}
            "type" => return Err(Refused::new("/type", "must be \"structural_tag\"")),
            other => {
                let reason = "is not supported; give structures (begin, schema, end) and triggers";
                return Err(Refused::new(format!("/{other}"), reason));
            }
        }
    }
    let tags = tags(object.get("structures"))?;
    let triggers = triggers(object.get("triggers"))?;
    let mut others = Vec::with_capacity(tags.len());
    let mut rules = String::new();
    let mut ways = Vec::new();
    for (index, trigger) in triggers.iter().enumerate() {
        let mut behind = Vec::new();
        for (at, tag) in tags.iter().enumerate() {
            let Some(rest) = tag.begin.strip_prefix(trigger.as_str()) else { continue };
            behind.push(format!("{} @{name}_{at} {}", literal(rest), literal(&tag.end)));
        }
        if behind.is_empty() {
            return Err(Refused::new(format!("/triggers/{index}"), "is not the beginning of any tag"));
        }
        // The text up to the trigger, and no further.
        let pattern = llguidance::regex_to_lark(&escaped(trigger), "");
        // Writing to a string cannot fail.
        let _ = writeln!(rules, "before_{index}[lazy]: /(?s:.*){pattern}/");
        ways.push(format!("before_{index} ({})", behind.join(" | ")));
    }
    if let Some(at) =
        tags.iter().position(|tag| !triggers.iter().any(|trigger| tag.begin.starts_with(trigger.as_str())))
    {
        return Err(Refused::new(format!("/structures/{at}/begin"), "begins with none of the triggers"));
    }
    for (at, tag) in tags.into_iter().enumerate() {
        others.push(schema(&format!("{name}_{at}"), tag.schema, Reading::Strict));
    }
    let text = format!("start: ({})* rest\nrest: /(?s:.*)/\n{rules}", ways.join(" | "));
    Ok(std::iter::once(lark(name, &text)).chain(others).collect())
}

fn tags(list: Option<&Value>) -> Result<Vec<Tag>, Refused> {
    let list = list.and_then(Value::as_array).filter(|list| (1..=TAGS_MAX).contains(&list.len()));
    let list = list.ok_or_else(|| {
        Refused::new("/structures", format!("must be a list of 1 to {TAGS_MAX} tags {{begin, schema, end}}"))
    })?;
    let read = |(at, tag): (usize, &Value)| {
        let path = |field: &str| format!("/structures/{at}/{field}");
        let text = |field: &str| {
            let text = tag.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
            text.map(str::to_owned)
                .ok_or_else(|| Refused::new(path(field), "must be a text that is not empty"))
        };
        let schema = tag.get("schema").cloned().unwrap_or(Value::Bool(true));
        Ok(Tag { begin: text("begin")?, end: text("end")?, schema: check_schema(schema, &path("schema"))? })
    };
    list.iter().enumerate().map(read).collect()
}

fn triggers(list: Option<&Value>) -> Result<Vec<String>, Refused> {
    let list = list.and_then(Value::as_array).filter(|list| (1..=TAGS_MAX).contains(&list.len()));
    let list =
        list.ok_or_else(|| Refused::new("/triggers", format!("must be a list of 1 to {TAGS_MAX} texts")))?;
    let read = |(at, trigger): (usize, &Value)| {
        let text = trigger.as_str().filter(|text| !text.is_empty());
        text.map(str::to_owned)
            .ok_or_else(|| Refused::new(format!("/triggers/{at}"), "must be a text that is not empty"))
    };
    list.iter().enumerate().map(read).collect()
}

/// A text as a regular expression that matches nothing else.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if "\\.+*?()|[]{}^$#&-~".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}
