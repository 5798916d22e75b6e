//! `cohort top` reads the pages of a real cluster.

use serde_json::Value;

use crate::security::certificates;
use crate::support::{Cluster, cohort, ended, tokens};

fn look(args: &[&str]) -> Value {
    let mut all = vec!["top", "--once", "--json"];
    all.extend(args);
    let output = cohort(&all).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_router_leads_to_its_groups_and_they_to_their_ranks() {
    let mut cluster =
        Cluster::up(&["--tensor-parallel=2", "--http-listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"]);
    let http = cluster.http();
    for _ in 0..3 {
        cluster.generate(tokens(&[5, 6, 7], 5)).unwrap();
    }
    let seen = cluster.wait("the group to be idle", |_| {
        let seen = look(&["--router", &http, "--interval", "0.1"]);
        (seen["groups"][0]["running"] == 0.0 && seen["groups"][0]["output_tokens_per_s"] == 0.0)
            .then_some(seen)
    });
    let (router, group) = (&seen["routers"][0], &seen["groups"][0]);
    assert_eq!(
        (&router["address"], &router["groups_up"], &router["groups"]),
        (&http.into(), &1.into(), &1.into())
    );
    assert_eq!(group["phase"], "serving", "{seen}");
    assert_eq!(group["model"], "cohort-demo");
    assert_eq!(group["ranks"].as_array().unwrap().len(), 2, "{seen}");
    assert!(seen["interval_s"].as_f64().unwrap() >= 0.1);
    // One look has no rates, and the latencies of everything since the start.
    let at = group["address"].as_str().unwrap();
    let one = look(&["--group", at, "--interval", "0"]);
    let group = &one["groups"][0];
    assert!(
        group["output_tokens_per_s"].is_null() && group["first_token"]["p50_s"].as_f64().unwrap() > 0.0,
        "{one}"
    );
}

#[test]
fn pages_behind_tls_are_read_with_the_authority_that_signed_for_them() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path(), &["router", "group"]);
    let file = |name: &str| dir.path().join(name).display().to_string();
    let mut cluster = Cluster::up(&[
        "--http-listen=127.0.0.1:0",
        "--metrics-listen=127.0.0.1:0",
        &format!("--tls-certificate={}", file("router.crt")),
        &format!("--tls-key={}", file("router.key")),
        &format!("--group-tls-certificate={}", file("group.crt")),
        &format!("--group-tls-key={}", file("group.key")),
        &format!("--cluster-tls-ca={}", file("ca.crt")),
    ]);
    let router = cluster.http().replace("http://", "https://");
    let (ca, args) = (file("ca.crt"), ["--router", &router, "--interval", "0"]);
    let seen = cluster.wait("the router to have reached its group", |_| {
        let seen = look(&[&args[..], &["--ca", &ca]].concat());
        (seen["groups"][0]["phase"] == "serving").then_some(seen)
    });
    assert!(seen["groups"][0]["address"].as_str().unwrap().starts_with("https://"), "{seen}");
    assert_eq!(seen["routers"][0]["groups_up"], 1, "{seen}");
    let other = tempfile::tempdir().unwrap();
    certificates(other.path(), &[]);
    let stranger = other.path().join("ca.crt").display().to_string();
    let seen = look(&[&args[..], &["--ca", &stranger]].concat());
    assert!(seen["routers"][0]["down"].as_str().unwrap().contains("certificate"), "{seen}");
}

#[test]
fn an_endpoint_that_is_down_is_shown_as_down() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("http://127.0.0.1:{port}");
    let seen = look(&["--group", &address, "--interval", "0"]);
    assert_eq!(seen["groups"][0]["address"], *address);
    assert!(seen["groups"][0]["down"].as_str().unwrap().contains("refused"), "{seen}");
    let lines = cohort(&["top", "--once", "--group", &address, "--interval", "0"]).output().unwrap();
    let lines = String::from_utf8(lines.stdout).unwrap();
    assert!(lines.contains("DOWN: ") && lines.contains("0 of 1 group(s) serve"), "{lines}");
}

#[test]
fn what_cannot_be_looked_at_is_named() {
    for (args, expected) in [
        (
            &["top", "--group", "https://a:1", "--once"][..],
            "name the file of the authority to believe with --ca",
        ),
        (&["top", "--router", "a", "--once"], "is not an address such as http://127.0.0.1:8080"),
        (&["top", "--interval", "0"], "--interval must be between 0.1 and 3600 seconds, not 0"),
        (&["top", "--group", "http://127.0.0.1:1"], "stdout is no terminal; use --once, or --json"),
    ] {
        let (status, said) = ended(args);
        assert!(!status.success() && said.contains(expected), "{args:?}: {said}");
    }
}
