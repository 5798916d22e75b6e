//! Orders to stop: everything ends, in order, with code 0.

use rustix::process::Signal;

use crate::support::{Cluster, cohort, runs, signal, tokens};

fn stops_cleanly(order: Signal) {
    let cluster = Cluster::up(&["--tensor-parallel=2"]);
    cluster.generate(tokens(&[5, 600], 5)).unwrap();
    let below = cluster.processes();
    cluster.signal(order);
    let (status, said) = cluster.end();
    assert_eq!(status.code(), Some(0), "{said}");
    let left: Vec<_> = below.iter().filter(|(pid, _)| runs(*pid)).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!said.contains("ERROR") && !said.contains("panicked"), "{said}");
}

#[test]
fn ctrl_c_ends_a_cluster_with_code_0() {
    stops_cleanly(Signal::INT);
}

#[test]
fn sigterm_ends_a_cluster_with_code_0() {
    stops_cleanly(Signal::TERM);
}

#[test]
fn open_requests_are_finished_before_the_end() {
    let cluster = Cluster::up(&["--tensor-parallel=2"]);
    let mut client = cluster.client();
    let tokens_received = cluster.block_on(async {
        let mut stream = client.generate(tokens(&[5, 600], 300)).await.unwrap().into_inner();
        let mut received = stream.message().await.unwrap().unwrap().token_ids.len();
        cluster.signal(Signal::TERM);
        while let Some(message) = stream.message().await.unwrap() {
            received += message.token_ids.len();
        }
        received
    });
    assert_eq!(tokens_received, 300);
    assert_eq!(cluster.end().0.code(), Some(0));
}

/// systemd and `timeout` signal every process of a group at once.
#[test]
fn an_order_to_stop_for_every_process_at_once_finishes_open_requests_too() {
    let cluster = Cluster::up(&["--tensor-parallel=2"]);
    let mut client = cluster.client();
    let below = cluster.processes();
    let received = cluster.block_on(async {
        let mut stream = client.generate(tokens(&[5, 600], 300)).await.unwrap().into_inner();
        let mut received = stream.message().await.unwrap().unwrap().token_ids.len();
        cluster.signal(Signal::TERM);
        below.iter().for_each(|(pid, _)| signal(*pid, Signal::TERM));
        while let Some(message) = stream.message().await.unwrap() {
            received += message.token_ids.len();
        }
        received
    });
    assert_eq!(received, 300);
    assert_eq!(cluster.end().0.code(), Some(0));
}

#[test]
fn the_demo_answers_tells_who_did_what_and_ends() {
    // The reference is sure of every token of this answer.
    let output = cohort(&["demo", "What does `u128::saturating_add` do?"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let shown = String::from_utf8(output.stdout).unwrap();
    let flat = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "saturating at the numeric bounds instead of overflowing",
        "time to first token",
        "router",
        "rank 0",
        "rank 1",
    ] {
        assert!(flat.contains(part), "no `{part}` in {shown}");
    }
    assert!(!shown.contains('\u{1b}'), "colours without a terminal: {shown:?}");
}

#[test]
fn generate_prints_the_documented_json() {
    let cluster = Cluster::up(&["--tensor-parallel=1"]);
    let server = format!("--server={}", cluster.server());
    let args = [
        "generate",
        &server,
        "--token-ids=5,600,601",
        "--max-tokens=4",
        "--temperature=0",
        "--ignore-eos",
        "--logprobs=2",
        "--prompt-logprobs=1",
        "--json",
    ];
    let output = cohort(&args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = cluster.generate(tokens(&[5, 600, 601], 4)).unwrap();
    assert_eq!(answer["token_ids"], serde_json::json!(expected.token_ids));
    assert_eq!(answer["finish_reason"], "length");
    assert_eq!(answer["usage"]["prompt_tokens"], 3);
    assert_eq!(answer["usage"]["output_tokens"], 4);
    let entries = answer["logprobs"].as_array().unwrap();
    assert_eq!(entries.len(), 4);
    for (entry, id) in entries.iter().zip(&expected.token_ids) {
        assert_eq!(entry["token_id"], *id);
        let top = entry["top"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        // Greedy: the token is the most likely one.
        assert_eq!(top[0][0], *id);
        assert_eq!(top[0][1], entry["logprob"]);
    }
    let prompt = answer["prompt_logprobs"].as_array().unwrap();
    assert!(prompt.len() == 3 && prompt[0].is_null() && prompt[2]["token_id"] == 601, "{prompt:?}");
}

#[test]
fn a_reader_that_stops_early_ends_the_demo_quietly() {
    let mut demo = cohort(&["demo"]).spawn().unwrap();
    drop(demo.stdout.take());
    let output = demo.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
}
