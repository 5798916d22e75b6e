//! Which keys a running process takes, and which it refuses by name.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::path::Path;

use settings::{Loaded, Role, Settings, Sources};

const BEFORE: &str = "[cluster]\ngroups = 2\n[group]\nkv_tokens = 1024\n[model]\ndtype = \"f32\"\n";

fn loaded(dir: &Path, text: &str) -> Loaded {
    let path = dir.join("cluster.toml");
    std::fs::write(&path, text).unwrap();
    Settings::load_traced(&Sources { files: vec![path], ..Sources::default() }).unwrap()
}

/// What became of each key, as `key` or `line: key`.
fn changes(text: &str, role: Role) -> (Vec<String>, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let before = loaded(dir.path(), BEFORE);
    match before.changes(&loaded(dir.path(), text), role) {
        Ok(live) => (live.into_iter().map(|changed| changed.to_string()).collect(), Vec::new()),
        Err(refused) => {
            let shown = |complaint: settings::Complaint| {
                complaint.to_string().replace(&format!("{}/", dir.path().display()), "")
            };
            (Vec::new(), refused.into_iter().map(shown).collect())
        }
    }
}

#[test]
fn nothing_changed_is_nothing_to_do() {
    for role in [Role::Up, Role::Router, Role::Group] {
        assert_eq!(changes(BEFORE, role), (vec![], vec![]));
        assert_eq!(changes(&format!("# a comment\n{BEFORE}"), role), (vec![], vec![]));
    }
}

#[test]
fn groups_limits_keys_and_graces_change_while_a_cluster_runs() {
    let text = "[cluster]\ngroups = 3\n[group]\nkv_tokens = 1024\n[router]\nkeys_file = \"keys.toml\"\n\
                drain_grace_s = 5\n[router.limits]\nrequests_max = 7\n[router.http]\nbody_timeout_s = 3\n";
    let expected = [
        "router.limits.requests_max 512 → 7",
        "router.keys_file not set → \"keys.toml\"",
        "router.http.body_timeout_s 30.0 → 3.0",
        "router.drain_grace_s 10.0 → 5.0",
        "cluster.groups 2 → 3",
    ];
    assert_eq!(changes(text, Role::Up), (expected.map(str::to_owned).to_vec(), vec![]));
}

#[test]
fn the_worker_list_is_the_routers_and_not_of_a_cluster_that_fills_it_in() {
    let text = format!("{BEFORE}[router]\nworkers = [\"http://10.0.0.1:7000\"]\n");
    let expected = vec!["router.workers [] → [\"http://10.0.0.1:7000\"]".to_owned()];
    assert_eq!(changes(&text, Role::Router), (expected, vec![]));
    assert_eq!(changes(&text, Role::Up), (vec![], vec![]));
}

#[test]
fn weights_change_while_they_are_served_for_a_router_by_address_and_for_a_cluster_by_number() {
    let text = format!("{BEFORE}[router]\nregistration = false\nweights = []\n");
    let text = text.replace("groups = 2", "groups = 2\nweights = [3, 0]");
    let expected = vec!["cluster.weights [] → [3,0]".to_owned()];
    assert_eq!(changes(&text, Role::Up), (expected, vec![]));
    assert_eq!(changes(&text, Role::Router), (vec![], vec![]));
    let worker = "http://10.0.0.1:7000";
    let text = format!("{BEFORE}[router]\nworkers = [\"{worker}\"]\nweights = [\"{worker}=0\"]\n");
    let (live, _) = changes(&text, Role::Router);
    assert_eq!(live[1], format!("router.weights [] → [\"{worker}=0\"]"));
}

#[test]
fn what_needs_a_restart_is_refused_with_line_and_reason_and_takes_the_rest_along() {
    let text = "[cluster]\ngroups = 9\n[group]\nkv_tokens = 2048\n[model]\ndtype = \"bf16\"\n\
                [router]\ngrpc_listen = \"127.0.0.1:9\"\n";
    let (live, refused) = changes(text, Role::Up);
    assert_eq!(live, Vec::<String>::new());
    let expected = [
        "cluster.toml:6: model.dtype: \"f32\" → \"bf16\" needs a restart: groups load the model when they start",
        "cluster.toml:8: router.grpc_listen: \"127.0.0.1:50051\" → \"127.0.0.1:9\" needs a restart: a listener \
         keeps the address it was opened at",
        "cluster.toml:4: group.kv_tokens: 1024 → 2048 needs a restart: groups are started with it",
    ];
    assert_eq!(refused, expected);
}

#[test]
fn a_key_that_was_taken_out_is_named_where_it_stood() {
    let (_, refused) = changes("[cluster]\ngroups = 2\n[model]\ndtype = \"f32\"\n", Role::Group);
    assert_eq!(
        refused,
        ["cluster.toml:4: group.kv_tokens: 1024 → 32768 needs a restart: groups are started with it"]
    );
}

#[test]
fn each_role_minds_its_own_keys() {
    let group = "[cluster]\ngroups = 5\n[group]\nkv_tokens = 2048\n";
    assert_eq!(changes(group, Role::Router), (vec![], vec![]));
    let router = format!("{BEFORE}[router.limits]\nrequests_max = 7\n");
    assert_eq!(changes(&router, Role::Group), (vec![], vec![]));
}

#[test]
fn every_section_of_the_tree_has_a_rule() {
    // A key that is added to the tree without a thought of it must not be taken silently.
    for key in Settings::keys() {
        let known =
            ["model.", "router.", "group.", "cluster.", "telemetry."].iter().any(|of| key.starts_with(of));
        assert!(known, "{key} has no rule in reload.rs");
    }
}
