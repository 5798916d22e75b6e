//! A mistake in a file is found by its line.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use settings::Origin;
use support::{complaints, file, from_file};

/// The key and line of every complaint about a file.
fn found(suffix: &str, text: &str) -> Vec<(String, Option<usize>)> {
    let file = file(suffix, text);
    let found = complaints(&from_file(&file)).into_iter().map(|complaint| match complaint.origin {
        Origin::File { path, line } => {
            assert_eq!(path, file.path());
            (complaint.key, line)
        }
        other => panic!("{other} is no file"),
    });
    found.collect()
}

fn at(key: &str, line: usize) -> (String, Option<usize>) {
    (key.to_owned(), Some(line))
}

#[test]
fn toml_in_every_form_of_a_key() {
    let text = "# a comment\nmodel.dtype = 'f16'\n\n[group]\nkv_tokens =\t-1\nlimit = \"\"\"\na\nb\"\"\"\nthreads = 0\n\
                [router.limits]\nrequests_max = 'x'\n[router]\nworkers = [\n  'http://a:1',\n  'b',\n]\n\
                \"http_listen\" = 'x'\n[cluster]\ngroups = 0\r\n";
    let expected = [
        at("cluster.groups", 19),
        at("group.kv_tokens", 5),
        at("group.limit", 6),
        at("group.threads", 9),
        at("model.dtype", 2),
        at("router.http_listen", 17),
        at("router.limits.requests_max", 11),
        at("router.workers", 13),
    ];
    assert_eq!(found(".toml", text), expected);
}

#[test]
fn an_inline_table_counts_as_its_line() {
    assert_eq!(found(".toml", "\ncluster = { groups = 0 }\n"), [at("cluster.groups", 2)]);
}

#[test]
fn yaml_in_block_and_flow_form() {
    let text = "# a comment\nmodel:\n  dtype: f16\nrouter:\n  workers:\n    - http://a:1\n    - {odd: 1}\n  limits: {requests_max: x,\n    \
                prompt_bytes_max: 0}\ngroup:\n  kv_tokens: -1\n  nested:\n    - [1, 2]\n  threads: 0\n";
    let expected = [
        at("group.kv_tokens", 11),
        at("group.nested", 12),
        at("group.threads", 14),
        at("model.dtype", 3),
        at("router.limits.prompt_bytes_max", 9),
        at("router.limits.requests_max", 8),
        at("router.workers", 5),
    ];
    assert_eq!(found(".yaml", text), expected);
}

#[test]
fn an_empty_section_of_a_yaml_file_is_named() {
    assert_eq!(found(".yml", "model:\n  name: x\ngroup:\n"), [at("group", 3)]);
}
