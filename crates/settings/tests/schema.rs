//! The schema says what the checks say.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use serde_json::Value;
use settings::{Key, Settings};
use support::toml;

fn keys() -> Vec<Key> {
    Settings::sections().into_iter().flat_map(|section| section.keys).collect()
}

/// The schema of one key.
fn of(name: &str) -> Value {
    let mut schema = Settings::schema();
    for part in name.split('.') {
        schema = schema["properties"][part].clone();
    }
    schema
}

/// Whether a file that sets only this key is one. Two keys have to fit others.
fn taken(key: &str, value: &str) -> bool {
    let help = match key {
        "group.step_tokens_max" => "group.running_max = 1\n",
        "group.running_max" => "group.step_tokens_max = 16777216\n",
        "group.kv_tokens" => "group.block_size = 1\n",
        "group.block_size" => "group.kv_tokens = 65536\n",
        "model.layers" | "model.preset" => "model.load_format = 'dummy'\n",
        "group.data_parallel" => "group.experts = 'expert'\n",
        "group.dispatch" => "group.experts = 'expert'\n",
        _ => "",
    };
    toml(&format!("{help}{key} = {value}\n")).is_ok()
}

#[test]
fn every_key_is_described_once() {
    let described: Vec<String> = keys().into_iter().map(|key| key.name).collect();
    let mut known: Vec<String> = Settings::keys().into_iter().collect();
    let mut sorted = described.clone();
    sorted.sort();
    known.sort();
    assert_eq!(sorted, known);
    for key in keys() {
        assert!(
            key.description.ends_with('.') && !key.description.contains("  "),
            "{}: {:?}",
            key.name,
            key.description
        );
        assert!(!key.values.is_empty(), "{}", key.name);
    }
}

#[test]
fn a_key_without_a_default_says_what_leaving_it_out_means() {
    for key in keys() {
        assert_eq!(key.default.is_null(), key.description.contains("Default: "), "{}", key.name);
    }
}

#[test]
fn the_defaults_are_the_ones_in_effect() {
    for (name, value) in Settings::default().entries() {
        let key = keys().into_iter().find(|key| key.name == name).unwrap();
        assert_eq!(key.default, value, "{name}");
    }
}

#[test]
fn the_ends_of_every_range_are_taken_and_what_lies_outside_is_not() {
    let mut checked = 0;
    for key in keys() {
        let schema = of(&key.name);
        let (Some(least), Some(most)) = (schema["minimum"].as_f64(), schema["maximum"].as_f64()) else {
            continue;
        };
        let step = if schema["type"] == "integer" { 1.0 } else { 0.0005 };
        for (value, fits) in [(least, true), (most, true), (least - step, false), (most + step, false)] {
            assert_eq!(taken(&key.name, &value.to_string()), fits, "{} = {value}", key.name);
        }
        checked += 1;
    }
    assert!(checked >= 15, "{checked} ranges");
}

#[test]
fn every_choice_is_taken_and_an_unknown_one_is_not() {
    let mut checked = 0;
    for key in keys() {
        let schema = of(&key.name);
        let Some(choices) = schema["enum"].as_array() else { continue };
        for choice in choices {
            assert!(taken(&key.name, &choice.to_string()), "{} = {choice}", key.name);
        }
        assert!(!taken(&key.name, "'something else'"), "{}", key.name);
        checked += 1;
    }
    assert_eq!(checked, 7);
}

#[test]
fn no_section_takes_a_key_nobody_knows() {
    let schema = Settings::schema();
    assert_eq!(schema["additionalProperties"], false);
    for section in Settings::sections() {
        let mut of_section = schema.clone();
        for part in section.name.split('.') {
            of_section = of_section["properties"][part].clone();
        }
        assert_eq!(of_section["additionalProperties"], false, "{}", section.name);
        assert!(!section.description.is_empty(), "{}", section.name);
    }
}
