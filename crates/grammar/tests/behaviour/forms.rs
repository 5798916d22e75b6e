//! Each form alone: whatever is drawn from it is of that form, and what is not of it cannot be drawn.

use crate::support::{Random, follows, matcher, plain, walk};
use serde_json::Value;
use types::Constraint;

/// Answers of a form drawn at random; the longest take too long.
fn drawn(form: &Constraint, seed: u64, count: usize) -> Vec<String> {
    let grammar = plain(form);
    let first = matcher(&grammar);
    let mut random = Random::seeded(seed);
    (0..count).filter_map(|_| walk(&mut first.clone(), &mut random, 400)).collect()
}

fn accepts(form: &Constraint, text: &str) -> bool {
    follows(&mut matcher(&plain(form)), text)
}

fn json(schema: &str) -> Constraint {
    Constraint::Json(schema.to_owned())
}

#[test]
fn one_of_the_choices_is_drawn_whole() {
    let choices = ["yes", "no", "yes, but", "\"quoted\"\n", "grüße", "<|END_TEXT|>"];
    let form = Constraint::Choice(choices.iter().map(|&choice| choice.to_owned()).collect());
    let answers = drawn(&form, 1, 60);
    assert!(
        answers.len() == 60 && answers.iter().all(|answer| choices.contains(&answer.as_str())),
        "{answers:?}"
    );
    assert!(choices.iter().all(|choice| accepts(&form, choice)));
    assert!(!accepts(&form, "ye") && !accepts(&form, "yes, no"));
}

#[test]
fn the_whole_answer_matches_the_expression() {
    let form = Constraint::Regex("^(\\d{3}-[a-f]{2}|x/y)$".to_owned());
    let answers = drawn(&form, 2, 40);
    let right = |text: &str| {
        text == "x/y"
            || (text.len() == 6
                && text.bytes().take(3).all(|b| b.is_ascii_digit())
                && text.as_bytes()[3] == b'-'
                && text.bytes().skip(4).all(|b| (b'a'..=b'f').contains(&b)))
    };
    assert!(answers.len() == 40 && answers.iter().all(|answer| right(answer)), "{answers:?}");
    assert!(accepts(&form, "123-af") && accepts(&form, "x/y") && !accepts(&form, "123-ag"));
}

#[test]
fn an_escaped_dollar_at_the_end_is_a_dollar() {
    let form = Constraint::Regex("[0-9]\\$".to_owned());
    assert!(accepts(&form, "7$") && !accepts(&form, "7"));
}

#[test]
fn an_answer_is_a_sentence_of_the_lark_grammar() {
    let grammar =
        "start: sum\nsum: term (\"+\" term)*\nterm: NUMBER | \"(\" sum \")\"\nNUMBER: /[0-9]{1,3}/\n";
    let form = Constraint::Grammar(grammar.to_owned());
    assert!(accepts(&form, "1+(22+333)+4") && !accepts(&form, "1+(22") && !accepts(&form, "1++2"));
    for answer in drawn(&form, 3, 30) {
        let open = answer.matches('(').count();
        assert_eq!(open, answer.matches(')').count(), "{answer}");
    }
}

#[test]
fn any_object_is_an_object() {
    let form = Constraint::JsonObject;
    for text in ["{}", "{\"a\": [1, {\"b\": null}]}", "{\"ü\":\"\\n\\u0007\"}"] {
        assert!(accepts(&form, text), "{text}");
    }
    for text in ["[]", "1", "{", "{\"a\"}", "{} {}"] {
        assert!(!accepts(&form, text), "{text}");
    }
    for answer in drawn(&form, 4, 30) {
        assert!(serde_json::from_str::<Value>(&answer).unwrap().is_object(), "{answer}");
    }
}

#[test]
fn hand_written_schemas_admit_what_they_should_and_nothing_else() {
    let table: [(&str, &[&str], &[&str]); 11] = [
        (
            r#"{"oneOf": [{"type": "null"}, {"type": "integer", "minimum": 1, "maximum": 9}]}"#,
            &["null", "7"],
            &["0", "true"],
        ),
        (
            r#"{"oneOf": [
                {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}, "required": ["kind", "x"], "additionalProperties": false},
                {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"], "additionalProperties": false}]}"#,
            &[r#"{"kind": "a", "x": 1}"#, r#"{"kind": "b"}"#],
            &[r#"{"kind": "a"}"#, r#"{"kind": "b", "x": 1}"#, r#"{"kind": "c"}"#],
        ),
        (r#"{"enum": ["a", 2, null, {"k": [1]}]}"#, &["\"a\"", "2", "null"], &["\"b\"", "3"]),
        (r#"{"const": "x\"y"}"#, &[r#""x\"y""#], &["\"x\""]),
        (
            r##"{"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "required": ["next"], "additionalProperties": false}}}"##,
            &[r#"{"next": {"next":null}}"#],
            &[r#"{"next": 1}"#, "{}"],
        ),
        (r#"{"type": "integer", "minimum": 3, "maximum": 17}"#, &["3", "17", "9"], &["2", "18", "3.5"]),
        (
            r#"{"type": "string", "minLength": 2, "maxLength": 3}"#,
            &["\"ab\"", "\"äöü\""],
            &["\"a\"", "\"abcd\""],
        ),
        (
            r#"{"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}"#,
            &["[true]", "[true, false]"],
            &["[]", "[true,true,true]"],
        ),
        (r#"{"type": "string", "format": "date"}"#, &["\"2024-02-29\""], &["\"2024-13-01\"", "\"today\""]),
        (
            r#"{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}"#,
            &[r#"{"a": 1}"#, "{\n  \"a\": 1\n}"],
            &["{}", r#"{"a": 1, "b": 2}"#, r#"{"a": "1"}"#],
        ),
        (
            r#"{"type": "object", "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": false}"#,
            &[r#"{"xy": null}"#, "{}"],
            &[r#"{"y": null}"#],
        ),
    ];
    for (schema, right, wrong) in table {
        let form = json(schema);
        for text in right {
            assert!(accepts(&form, text), "{text} is admitted by {schema}");
        }
        for text in wrong {
            assert!(!accepts(&form, text), "{text} is not admitted by {schema}");
        }
    }
}

#[test]
fn tags_may_come_anywhere_and_hold_what_their_schema_says() {
    let tag = r#"{"type": "structural_tag",
        "structures": [
            {"begin": "<f=one>", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}, "end": "</f>"},
            {"begin": "<f=two>", "schema": {"enum": ["x", "y"]}, "end": "</f>"}
        ], "triggers": ["<f="]}"#;
    let form = Constraint::StructuralTag(tag.to_owned());
    for text in ["", "plain", "so <f=two>\"x\"</f> and <f=one>{\"a\": 7}</f> done", "<b> is no tag"] {
        assert!(accepts(&form, text), "{text}");
    }
    for text in ["<f=three>1</f>", "<f=two>\"z\"</f>", "a <f=one>{}</f>", "text <f=two>"] {
        assert!(!accepts(&form, text), "{text}");
    }
}

#[test]
fn blanks_between_the_parts_of_a_document_are_bounded() {
    let form = json(r#"{"type": "array", "items": {"type": "null"}}"#);
    assert!(accepts(&form, "[ null ]"));
    assert!(!accepts(&form, &format!("[{}null]", " ".repeat(grammar::limits::BLANKS_MAX + 1))));
}
