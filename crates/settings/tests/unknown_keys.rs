//! Keys nobody knows.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use support::{complaints, file, from_environment, from_file, wrong};

#[test]
fn an_unknown_key_names_the_file_and_the_nearest_key() {
    let file = file(".toml", "[group]\nkv_tokns = 5\n");
    let found = complaints(&from_file(&file));
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].origin.to_string(), format!("{}:2", file.path().display()));
    assert_eq!(found[0].key, "group.kv_tokns");
    assert_eq!(found[0].reason, "unknown key; did you mean group.kv_tokens?");
}

#[test]
fn a_key_in_the_wrong_section_is_unknown_there() {
    assert_eq!(wrong("[cluster]\ntensor_parallel = 2\n").len(), 1);
    assert!(wrong("tensor_parallel = 2\n")[0].contains("group.tensor_parallel"));
}

#[test]
fn an_unknown_variable_is_named_as_it_was_set() {
    let found = complaints(&from_environment(&[("COHORT__GROUP__THREAD", "5")]));
    assert_eq!(found[0].origin.to_string(), "COHORT__GROUP__THREAD");
    assert_eq!(found[0].reason, "unknown key; did you mean group.threads?");
}

#[test]
fn a_section_given_as_a_value_says_so() {
    assert_eq!(
        wrong("group = 5\n"),
        ["group: is a section, not a value; set a key in it, such as group.advertise"]
    );
}

#[test]
fn a_key_given_as_a_section_is_unknown_inside() {
    assert_eq!(
        wrong("[group.kv_tokens]\nx = 1\n"),
        ["group.kv_tokens.x: unknown key; did you mean group.kv_tokens?"]
    );
}
