//! `cohort config`, and the pages it writes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

/// Runs `cohort config` with these arguments and variables, in the folder of the test's files.
fn config(folder: &Path, variables: &[(&str, &str)], args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cohort"));
    command.env_clear().envs(variables.iter().copied()).current_dir(folder).arg("config").args(args);
    command.output().unwrap()
}

/// What it printed, after it ended well.
#[track_caller]
fn said(folder: &Path, args: &[&str]) -> String {
    let output = config(folder, &[], args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json_said(folder: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&said(folder, args)).unwrap()
}

/// A folder with `cluster.toml` in it.
fn folder(text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("cluster.toml"), text).unwrap();
    folder
}

fn docs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name)
}

#[track_caller]
fn is_up_to_date(page: &str, subcommand: &str) {
    let here = tempfile::tempdir().unwrap();
    let committed = std::fs::read_to_string(docs(page)).unwrap_or_default();
    let written = said(here.path(), &[subcommand]);
    assert!(
        committed == written,
        "docs/{page} is not what this version writes; run: cargo run -- config {subcommand} > docs/{page}"
    );
}

#[test]
fn the_reference_page_is_the_one_this_version_writes() {
    is_up_to_date("configuration.md", "reference");
}

#[test]
fn the_committed_schema_is_the_one_this_version_writes() {
    is_up_to_date("configuration.schema.json", "schema");
}

#[test]
fn mistakes_come_with_file_and_line_all_at_once() {
    let here = folder("[group]\nkv_tokns = 5\n\nthreads = 0\n");
    let output =
        config(here.path(), &[("COHORT__MODEL__DTYPE", "f8")], &["check", "--config", "cluster.toml"]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    for line in [
        "3 mistakes in the configuration:",
        "cluster.toml:2: group.kv_tokns: unknown key; did you mean group.kv_tokens?",
        "cluster.toml:4: group.threads: must be between 1 and 4096, not 0",
        "COHORT__MODEL__DTYPE: model.dtype: \"f8\": unknown dtype `f8`; use f32 or bf16",
    ] {
        assert!(errors.contains(line), "no `{line}` in:\n{errors}");
    }
}

#[test]
fn mistakes_for_machines() {
    let here = folder("[group]\nkv_tokns = 5\n");
    let output = config(here.path(), &[], &["check", "--config=cluster.toml", "--json"]);
    assert!(!output.status.success());
    let verdict: Value = serde_json::from_slice(&output.stdout).unwrap();
    let reason = "unknown key; did you mean group.kv_tokens?";
    let mistake = json!({ "from": "file", "file": "cluster.toml", "line": 2, "key": "group.kv_tokns", "reason": reason });
    assert_eq!(verdict, json!({ "ok": false, "mistakes": [mistake] }));
    let fine = folder("");
    assert_eq!(json_said(fine.path(), &["check", "--config=cluster.toml", "--json"])["ok"], true);
}

#[test]
fn a_key_is_explained_with_its_value_and_where_that_comes_from() {
    let here = folder("[group]\nkv_tokens = 4096\n");
    let text = said(here.path(), &["explain", "group.kv_tokens", "--config=cluster.toml"]);
    for part in
        ["32768", "4096 (cluster.toml:2)", "COHORT__GROUP__KV_TOKENS", "--kv-tokens", "a whole number, 1 to"]
    {
        assert!(text.contains(part), "no `{part}` in:\n{text}");
    }
    let told = json_said(here.path(), &["explain", "router.limits", "--json"]);
    let keys: Vec<&str> = told.as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["router.limits.requests_max", "router.limits.prompt_bytes_max"]);
}

#[test]
fn an_unknown_key_is_not_explained_but_corrected() {
    let here = folder("");
    let output = config(here.path(), &[], &["explain", "group.kv_token"]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && errors.contains("did you mean group.kv_tokens?"), "{errors}");
}

#[test]
fn a_difference_names_both_values_and_the_origin() {
    let here = folder("[group]\nkv_tokens = 4096\n[cluster]\ngroups = 1\n");
    let lines: Vec<String> =
        said(here.path(), &["diff", "--config=cluster.toml"]).lines().map(str::to_owned).collect();
    assert_eq!(lines, ["  group.kv_tokens  32768  →  4096  cluster.toml:2"]);
    assert_eq!(
        said(here.path(), &["diff", "--config=cluster.toml", "--against=cluster.toml"]),
        "no key differs\n"
    );
    std::fs::write(here.path().join("other.yaml"), "cluster: {groups: 4}\n").unwrap();
    let told = json_said(here.path(), &["diff", "--config=cluster.toml", "--against=other.yaml", "--json"]);
    let keys: Vec<&str> = told.as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["group.kv_tokens", "cluster.groups"]);
    assert_eq!((&told[1]["before"], &told[1]["after"]), (&json!(4), &json!(1)));
}

#[test]
fn what_is_shown_can_be_read_back() {
    let here = folder("[group]\nkv_tokens = 4096\nstep_timeout_s = 2.5\n");
    let shown = said(here.path(), &["show", "--config=cluster.toml"]);
    std::fs::write(here.path().join("shown.toml"), &shown).unwrap();
    assert_eq!(said(here.path(), &["show", "--config=shown.toml"]), shown);
    let tree = json_said(here.path(), &["show", "--config=cluster.toml", "--json"]);
    assert_eq!(tree["group"]["kv_tokens"], 4096);
}

#[test]
fn every_key_that_a_flag_sets_names_it() {
    let here = folder("");
    for section in ["model", "router", "group", "cluster"] {
        for key in json_said(here.path(), &["explain", section, "--json"]).as_array().unwrap() {
            assert!(key["flag"].as_str().is_some_and(|flag| flag.starts_with("--")), "{key}");
        }
    }
}
