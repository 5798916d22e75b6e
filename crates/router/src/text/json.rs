//! `tojson` as chat templates expect it: Python's `json.dumps(value, ensure_ascii=False)`. minijinja's own escapes
//! HTML and writes no spaces, and a model that was trained on one form sees the other as noise.

use std::fmt::Write;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Deepest nesting written; deeper values are refused before the stack is used up.
const DEPTH_MAX: usize = 128;

/// A document in the making, and how its parts are set apart.
struct Writer {
    out: String,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

/// The filter `tojson(indent=None, separators=None, sort_keys=False, ensure_ascii=False)`.
///
/// # Errors
/// minijinja's error for an unknown argument, `ensure_ascii=True`, or a value that has no JSON form.
pub fn to_python_json(value: &Value, kwargs: &Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    if kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson does not support ensure_ascii=true"));
    }
    kwargs.assert_all_used()?;
    let indent = match indent.filter(|value| !value.is_none() && !value.is_undefined()) {
        None => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(i64::try_from(value)?.clamp(0, 64)).unwrap_or(0)),
        }),
    };
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators must be two strings")),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let sort_keys = sort_keys.unwrap_or(false);
    let mut writer = Writer { out: String::new(), indent, item, key, sort_keys };
    writer.value(value, 0)?;
    Ok(writer.out)
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value is nested too deeply"));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut count = 0;
                for item in value.try_iter()? {
                    self.next(count, depth + 1);
                    self.value(&item, depth + 1)?;
                    count += 1;
                }
                self.close(']', count, depth);
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push('{');
                for (index, key) in keys.iter().enumerate() {
                    self.next(index, depth + 1);
                    self.key(key)?;
                    self.value(&value.get_item(key)?, depth + 1)?;
                }
                self.close('}', keys.len(), depth);
            }
            _ => write_scalar(&mut self.out, value)?,
        }
        Ok(())
    }

    /// Sets the part number `index` of a container apart from what came before.
    fn next(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(&self.item);
        }
        self.new_line(depth);
    }

    fn close(&mut self, bracket: char, parts: usize, depth: usize) {
        if parts > 0 {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    /// Python writes keys that are not strings as JSON would write them as values.
    fn key(&mut self, key: &Value) -> Result<(), Error> {
        let mut text = String::new();
        match key.as_str() {
            Some(key) => text.push_str(key),
            None => write_scalar(&mut text, key)?,
        }
        write_string(&mut self.out, &text)?;
        self.out.push_str(&self.key);
        Ok(())
    }
}

fn write_scalar(out: &mut String, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
        ValueKind::Number => write_float(out, f64::try_from(value.clone())?),
        ValueKind::String => write_string(out, value.as_str().unwrap_or_default())?,
        kind => {
            let reason = format!("tojson: a value of kind {kind} has no JSON form");
            return Err(Error::new(ErrorKind::InvalidOperation, reason));
        }
    }
    Ok(())
}

/// serde_json escapes the same characters in the same form as Python does with `ensure_ascii=False`.
fn write_string(out: &mut String, text: &str) -> Result<(), Error> {
    let quoted = serde_json::to_string(text)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    out.push_str(&quoted);
    Ok(())
}

/// Python's `repr`: the shortest digits that read back the same, with an exponent below 1e-4 and from 1e16 on.
fn write_float(out: &mut String, value: f64) {
    let size = value.abs();
    if value.is_nan() {
        out.push_str("NaN");
    } else if value.is_infinite() {
        out.push_str(if value > 0.0 { "Infinity" } else { "-Infinity" });
    } else if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        // Writing to a string cannot fail.
        let _ = write!(out, "{digits}e{sign}{exponent:0>2}");
    } else {
        let _ = write!(out, "{value:?}");
    }
}
