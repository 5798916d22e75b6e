//! Answers of a form through the command line, the router and a group of two ranks.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Cluster, cohort};

/// Asks for one answer to a chat with these flags: its JSON, or what was said against it.
fn ask(server: &str, flags: &[&str]) -> Result<Value, String> {
    let base = ["generate", "--server", server, "--chat", "Describe Vec.", "--max-tokens=1200", "--json"];
    let output = cohort(&[&base, flags].concat()).output().unwrap();
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn text(answer: &Value) -> &str {
    assert_eq!(answer["finish_reason"], "stop", "{answer}");
    answer["text"].as_str().unwrap()
}

#[test]
fn every_form_is_kept_by_two_ranks() {
    let cluster = Cluster::up(&["--tensor-parallel=2"]);
    let server = cluster.server();
    let folder = tempfile::tempdir().unwrap();
    let (schema, grammar) = (folder.path().join("schema.json"), folder.path().join("form.lark"));
    let keeps = json!({
        "type": "object", "required": ["kind", "size", "next"], "additionalProperties": false,
        "properties": {
            "kind": { "enum": ["struct", "trait"] }, "size": { "type": "integer", "minimum": 1, "maximum": 99 },
            "next": { "oneOf": [{ "type": "null" }, { "type": "boolean" }] },
        },
    });
    fs::write(&schema, keeps.to_string()).unwrap();
    fs::write(&grammar, "start: \"<\" /[a-z]{1,4}/ \">\"").unwrap();
    let (schema, grammar) = (schema.to_str().unwrap(), grammar.to_str().unwrap());
    for seed in ["--seed=1", "--seed=2"] {
        let answer = ask(&server, &["--json-schema", schema, "--thinking-tokens-max=20", seed]).unwrap();
        let value: Value = serde_json::from_str(text(&answer)).unwrap();
        assert!(["struct", "trait"].contains(&value["kind"].as_str().unwrap()), "{value}");
        assert!((1..=99).contains(&value["size"].as_i64().unwrap()), "{value}");
        assert!(value["next"].is_null() || value["next"].is_boolean(), "{value}");

        let direct = |flags: &[&str]| ask(&server, &[&["--reasoning=false", seed], flags].concat()).unwrap();
        let answer = direct(&["--grammar", grammar]);
        let said = text(&answer).trim_matches(['<', '>']);
        assert!((1..=4).contains(&said.len()) && said.bytes().all(|b| b.is_ascii_lowercase()), "{answer}");
        let answer = direct(&["--regex", "[0-9]{3}-[0-9]{2}"]);
        let parts: Vec<usize> = text(&answer).split('-').map(str::len).collect();
        assert_eq!(parts, [3, 2], "{answer}");
        assert!(["yes", "no"].contains(&text(&direct(&["--choice", "yes", "--choice", "no"]))));
    }
}

#[test]
fn a_form_that_cannot_be_is_refused_with_its_path_and_others_are_served() {
    let cluster = Cluster::up(&["--tensor-parallel=2"]);
    let server = cluster.server();
    let folder = tempfile::tempdir().unwrap();
    let schema = folder.path().join("schema.json");
    fs::write(&schema, json!({ "properties": { "a": { "type": "colour" } } }).to_string()).unwrap();
    let why = ask(&server, &["--json-schema", schema.to_str().unwrap()]).unwrap_err();
    assert!(why.contains("constraint.json/properties/a"), "{why}");
    assert!(ask(&server, &["--regex", "("]).unwrap_err().contains("constraint.regex"));
    assert_eq!(text(&ask(&server, &["--choice", "ja", "--reasoning=false"]).unwrap()), "ja");
}
