//! What cannot be compiled is refused with the part to blame, in bounded time and stack.

use std::fmt::Write;

use crate::support::compiler;
use grammar::limits::{CHOICES_MAX, DEPTH_MAX, FORM_BYTES_MAX, PATTERN_BYTES_MAX};
use grammar::{Begin, Calls, Error, Form, Refused, Tool};
use serde_json::{Value, json};
use types::Constraint;

fn composed(form: &Constraint) -> Result<String, Refused> {
    Form { begin: Begin::Plain, marks: None, content: Some(form), calls: None }.compose()
}

fn refused(form: &Constraint) -> Refused {
    composed(form).unwrap_err()
}

/// The compiler's words about a form that can be composed.
fn compile_error(form: &Constraint) -> String {
    match compiler().compile(&composed(form).unwrap()) {
        Err(Error::Compile { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_too_large_or_too_deep_is_refused_with_its_numbers() {
    let deep = format!("{}true{}", "{\"not\":".repeat(DEPTH_MAX + 1), "}".repeat(DEPTH_MAX + 1));
    let table = [
        (Constraint::Json(" ".repeat(FORM_BYTES_MAX + 1)), FORM_BYTES_MAX),
        (Constraint::Regex("a".repeat(PATTERN_BYTES_MAX + 1)), PATTERN_BYTES_MAX),
        (Constraint::Grammar("(".repeat(DEPTH_MAX + 1)), DEPTH_MAX),
        (Constraint::Json(deep), DEPTH_MAX),
        (Constraint::Choice(vec!["a".to_owned(); CHOICES_MAX + 1]), CHOICES_MAX),
        (Constraint::Choice(Vec::new()), CHOICES_MAX),
    ];
    for (form, limit) in table {
        let refused = refused(&form);
        assert!(refused.reason.contains(&limit.to_string()), "{refused:?}");
    }
}

#[test]
fn the_wrong_part_of_a_list_or_tag_is_named() {
    let choices = Constraint::Choice(vec!["a".to_owned(), String::new()]);
    assert_eq!(refused(&choices).path, "[1]");
    let tag = |text: &str| refused(&Constraint::StructuralTag(text.to_owned())).path;
    assert_eq!(tag(r#"{"type": "other"}"#), "/type");
    assert_eq!(tag(r#"{"format": {}}"#), "/format");
    assert_eq!(tag(r#"{"structures": [], "triggers": ["a"]}"#), "/structures");
    assert_eq!(
        tag(r#"{"structures": [{"begin": "a", "end": "b", "schema": 3}], "triggers": ["a"]}"#),
        "/structures/0/schema"
    );
    assert_eq!(tag(r#"{"structures": [{"begin": "a", "end": "b"}], "triggers": ["c"]}"#), "/triggers/0");
}

#[test]
fn the_part_of_a_schema_that_cannot_be_enforced_is_found() {
    let schema = json!({
        "type": "object",
        "properties": {
            "fine": { "type": "integer" },
            "list": { "type": "array", "items": { "anyOf": [{ "type": "null" }, { "type": "array", "uniqueItems": true }] } },
        },
    });
    let reason = compile_error(&Constraint::Json(schema.to_string()));
    assert!(reason.contains("uniqueItems"), "{reason}");
    let blamed = compiler().blame(&schema, true).unwrap();
    assert_eq!(blamed.path, "/properties/list/items/anyOf/1");
    assert_eq!(compiler().blame(&schema, false), None, "a schema that is a hint may say more");
}

#[test]
fn the_compilers_words_say_what_is_wrong() {
    let table = [
        (Constraint::Regex("[a".to_owned()), "regex"),
        (Constraint::Regex("(?=a)b".to_owned()), "look-around"),
        (Constraint::Grammar("begin: \"a\"".to_owned()), "no start"),
        (Constraint::Grammar("start: other".to_owned()), "unknown name"),
        (Constraint::Grammar("root ::= \"a\"".to_owned()), "1("),
        (Constraint::Json("{\"type\": \"strange\"}".to_owned()), "strange"),
        (Constraint::Json("{\"$ref\": \"http://example.com/x\"}".to_owned()), ""),
        (Constraint::Json(r#"{"oneOf": [{"minimum": 1}, {"maximum": 5}]}"#.to_owned()), "exclude each other"),
        (Constraint::Json("{\"type\": \"integer\", \"minimum\": 5, \"maximum\": 4}".to_owned()), "minimum"),
    ];
    for (form, word) in table {
        let reason = compile_error(&form);
        assert!(reason.contains(word) && reason.len() < 2000, "{form:?}: {reason}");
    }
}

#[test]
fn tools_that_cannot_be_called_are_named() {
    let calls = |parameters: Value| Calls {
        tools: vec![
            Tool { name: "a".to_owned(), parameters: None, strict: false },
            Tool { name: "b".to_owned(), parameters: Some(parameters), strict: false },
        ],
        several: true,
        required: true,
    };
    let refused = |calls: &Calls| {
        let marks = crate::support::marks();
        Form { begin: Begin::Turn, marks: Some(&marks), content: None, calls: Some(calls) }
            .compose()
            .unwrap_err()
    };
    assert_eq!(refused(&calls(json!({ "type": "array" }))).path, "tools[1].function.parameters");
    assert_eq!(refused(&calls(json!(7))).path, "tools[1].function.parameters");
    assert_eq!(refused(&Calls { tools: Vec::new(), several: true, required: true }).path, "tools");
}

#[test]
fn long_chains_of_rules_and_definitions_do_not_break_the_stack() {
    let mut chain = "start: a0\n".to_owned();
    for rule in 0..4000 {
        let _ = writeln!(chain, "a{rule}: a{}", rule + 1);
    }
    chain.push_str("a4000: \"x\"\n");
    // Compiled or refused, but no crash.
    let _ = compiler().compile(&composed(&Constraint::Grammar(chain)).unwrap());
    let mut definitions = serde_json::Map::new();
    for at in 0..3000 {
        let next = format!("#/$defs/d{}", at + 1);
        definitions.insert(format!("d{at}"), json!({ "type": "array", "items": { "$ref": next } }));
    }
    definitions.insert("d3000".to_owned(), json!({ "type": "null" }));
    let schema = json!({ "$ref": "#/$defs/d0", "$defs": definitions }).to_string();
    let _ = compiler().compile(&composed(&Constraint::Json(schema)).unwrap());
    let nested = format!("{}a{}", "(".repeat(5000), ")".repeat(5000));
    let _ = compiler().compile(&composed(&Constraint::Regex(nested)).unwrap());
    // Automata are built as far as they are needed: this one is harmless until it is followed.
    let huge = composed(&Constraint::Regex("((a{1000}){1000}){1000}".to_owned())).unwrap();
    if let Ok(mut matcher) = compiler().compile(&huge) {
        let _ = matcher.mask();
    }
}
