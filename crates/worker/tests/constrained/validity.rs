//! Whether a value is of a schema: a reading of the keywords that the schemas here are made of, and of no others.

use serde_json::Value;

/// Whether `schema`, which is part of `root`, admits `value`.
pub(crate) fn admits(root: &Value, schema: &Value, value: &Value) -> bool {
    let keywords = schema.as_object().unwrap();
    keywords.iter().all(|(keyword, says)| keyword_admits(root, (keyword, says), schema, value))
}

fn keyword_admits(root: &Value, (keyword, says): (&str, &Value), schema: &Value, value: &Value) -> bool {
    let size = |says: &Value| says.as_u64().unwrap() as usize;
    let number = value.as_f64();
    let (text, list, object) = (value.as_str(), value.as_array(), value.as_object());
    match keyword {
        "$defs" => true,
        "$ref" => admits(root, root.pointer(says.as_str().unwrap().trim_start_matches('#')).unwrap(), value),
        "type" => is_a(says.as_str().unwrap(), value),
        "enum" => says.as_array().unwrap().contains(value),
        "const" => says == value,
        "anyOf" => says.as_array().unwrap().iter().any(|schema| admits(root, schema, value)),
        "minimum" => number.is_none_or(|n| n >= says.as_f64().unwrap()),
        "maximum" => number.is_none_or(|n| n <= says.as_f64().unwrap()),
        "exclusiveMinimum" => number.is_none_or(|n| n > says.as_f64().unwrap()),
        "exclusiveMaximum" => number.is_none_or(|n| n < says.as_f64().unwrap()),
        "multipleOf" => number.is_none_or(|n| (n / says.as_f64().unwrap()).fract() == 0.0),
        "minLength" => text.is_none_or(|text| text.chars().count() >= size(says)),
        "maxLength" => text.is_none_or(|text| text.chars().count() <= size(says)),
        "pattern" | "format" => text.is_none_or(|text| is_written_as(says.as_str().unwrap(), text)),
        "minItems" => list.is_none_or(|list| list.len() >= size(says)),
        "maxItems" => list.is_none_or(|list| list.len() <= size(says)),
        "prefixItems" => list.is_none_or(|list| {
            says.as_array().unwrap().iter().zip(list).all(|(schema, value)| admits(root, schema, value))
        }),
        "items" => list.is_none_or(|list| {
            let first = schema["prefixItems"].as_array().map_or(0, Vec::len);
            list.iter().skip(first).all(|value| admits(root, says, value))
        }),
        "properties" => object.is_none_or(|object| {
            object.iter().all(|(key, value)| says.get(key).is_none_or(|schema| admits(root, schema, value)))
        }),
        "required" => object.is_none_or(|object| {
            says.as_array().unwrap().iter().all(|key| object.contains_key(key.as_str().unwrap()))
        }),
        "additionalProperties" => object.is_none_or(|object| {
            *says == Value::Bool(false) && object.keys().all(|key| schema["properties"].get(key).is_some())
        }),
        other => panic!("{other} is not read here"),
    }
}

fn is_a(kind: &str, value: &Value) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|n| n.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("{other} is no type"),
    }
}

/// The patterns and formats of the corpus, each spelled out.
fn is_written_as(form: &str, text: &str) -> bool {
    let digits = |text: &str, count: usize| text.len() == count && text.bytes().all(|b| b.is_ascii_digit());
    let parts = |separator: char| text.split(separator).collect::<Vec<&str>>();
    match form {
        "^[a-z]{2,6}$" => (2..=6).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase()),
        "^\\d{4}-\\d{2}$" => matches!(parts('-')[..], [year, month] if digits(year, 4) && digits(month, 2)),
        "^(ja|nein)!?$" => ["ja", "nein", "ja!", "nein!"].contains(&text),
        "^[A-Z][a-z]{1,5} [0-9]$" => matches!(parts(' ')[..], [word, digit] if digits(digit, 1)
            && (2..=6).contains(&word.len())
            && word.bytes().enumerate().all(|(at, b)| if at == 0 { b.is_ascii_uppercase() } else { b.is_ascii_lowercase() })),
        "date" => is_date(text),
        "uuid" => {
            parts('-').iter().map(|part| part.len()).eq([8, 4, 4, 4, 12])
                && text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit())
        }
        "ipv4" => parts('.').len() == 4 && parts('.').iter().all(|part| part.parse::<u8>().is_ok()),
        other => panic!("{other} is not read here"),
    }
}

fn is_date(text: &str) -> bool {
    let [year, month, day] = text.split('-').collect::<Vec<&str>>()[..] else { return false };
    let (Ok(_), Ok(month), Ok(day)) = (year.parse::<u32>(), month.parse::<u32>(), day.parse::<u32>()) else {
        return false;
    };
    (year.len(), (1..=12).contains(&month), (1..=31).contains(&day)) == (4, true, true)
}
