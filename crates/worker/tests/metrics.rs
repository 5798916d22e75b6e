//! What a leader counts, and under which names.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use support::{Client, Rank, config, request};
use worker::{Config, Error};

/// Every metric of a leader, as `name type`. Dashboards and autoscalers depend on the names: one that changes is a
/// breaking change.
const NAMES: &str = include_str!("golden/metrics.txt");
/// Those that a leader on the CPU has nothing to say about.
const ONLY_ON_CARDS: [&str; 1] = ["cohort_card_idle_seconds gauge"];

const FOLLOWER_NAMES: &str = include_str!("golden/follower_metrics.txt");

/// A free port of this machine. Another process could take it before the leader does; then the leader says so.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The status line and body of an answer to GET.
fn get(address: SocketAddr, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: leader\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

fn page(address: SocketAddr) -> String {
    let (status, body) = get(address, "/metrics");
    assert!(status.contains("200"), "{status}");
    body
}

/// The page of a leader that has nothing to do; it says so a moment after its last token.
fn idle_page(address: SocketAddr) -> String {
    let idle = |page: &str| page.contains("vllm:cache_config_info{") && value(page, RUNNING, "engine=") < 0.5;
    let mut pages = (0..TRIES_MAX).map(|_| page(address));
    pages.find(|page| idle(page)).expect("a leader with nothing to do says so")
}

const RUNNING: &str = "vllm:num_requests_running";
/// More than any machine needs.
const TRIES_MAX: usize = 10_000;

/// The value of the sample with this name and, among others, this label.
#[track_caller]
fn value(page: &str, name: &str, label: &str) -> f64 {
    let fits =
        |line: &&str| line.split_once('{').is_some_and(|(of, rest)| of == name && rest.contains(label));
    let line = page.lines().find(fits);
    let line = line.unwrap_or_else(|| panic!("no {name} with {label} in:\n{page}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn the_names_and_types_are_the_ones_dashboards_know() {
    let metrics = free();
    let rank = Rank::start(Config { metrics_listen: Some(metrics), ..config(0, 1) });
    rank.ready();
    let page = idle_page(metrics);
    let found: BTreeSet<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let expected: BTreeSet<&str> = NAMES.lines().filter(|name| !ONLY_ON_CARDS.contains(name)).collect();
    let found: String = found.iter().map(|line| format!("{line}\n")).collect();
    let expected: String = expected.iter().map(|line| format!("{line}\n")).collect();
    assert_eq!(found, expected, "crates/worker/tests/golden/metrics.txt");
    rank.shutdown.cancel();
    rank.end().unwrap();
}

#[test]
fn every_metric_has_a_help_text_and_the_labels_of_its_model() {
    let metrics = free();
    let rank = Rank::start(Config { metrics_listen: Some(metrics), ..config(0, 1) });
    rank.ready();
    let page = idle_page(metrics);
    for name in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let name = name.split(' ').next().unwrap();
        assert!(page.contains(&format!("# HELP {name} ")), "{name} has no help");
    }
    for sample in page.lines().filter(|line| line.contains('{')) {
        assert!(sample.contains("model_name=\"demo\",engine=\"0\""), "{sample}");
    }
    assert!(page.trim_end().ends_with("# EOF"), "{page}");
    rank.shutdown.cancel();
    rank.end().unwrap();
}

#[test]
fn a_request_is_counted_once_with_its_tokens_and_times() {
    let metrics = free();
    let rank = Rank::start(Config { metrics_listen: Some(metrics), ..config(0, 1) });
    let client = Client::connect(rank.listening());
    rank.ready();
    client.generate(request(vec![5; 40], 7)).unwrap();
    let page = idle_page(metrics);
    for (sample, expected) in [
        ("vllm:prompt_tokens_total", 40.0),
        ("vllm:generation_tokens_total", 7.0),
        ("vllm:request_prompt_tokens_sum", 40.0),
        ("vllm:request_generation_tokens_sum", 7.0),
        ("vllm:request_params_max_tokens_sum", 7.0),
        ("vllm:request_params_n_sum", 1.0),
        ("vllm:time_to_first_token_seconds_count", 1.0),
        ("vllm:inter_token_latency_seconds_count", 6.0),
        ("vllm:e2e_request_latency_seconds_count", 1.0),
        ("vllm:request_time_per_output_token_seconds_count", 1.0),
        ("vllm:num_preemptions_total", 0.0),
        ("vllm:request_queue_time_seconds_count", 1.0),
        ("vllm:request_prefill_time_seconds_count", 1.0),
        ("vllm:request_inference_time_seconds_count", 1.0),
        ("vllm:num_requests_running", 0.0),
        ("vllm:num_requests_waiting", 0.0),
        ("vllm:kv_cache_usage_perc", 0.0),
    ] {
        assert!(
            (value(&page, sample, "engine=") - expected).abs() < 1e-9,
            "{sample} is not {expected}:\n{page}"
        );
    }
    assert!((value(&page, "vllm:request_success_total", "finished_reason=\"length\"") - 1.0).abs() < 1e-9);
    assert!((value(&page, "cohort_phase", "phase=\"serving\"") - 1.0).abs() < 1e-9);
    assert!((value(&page, "cohort_phase", "phase=\"loading\"")).abs() < 1e-9);
    assert!(value(&page, "cohort_steps_total", "engine=") >= 7.0);
    assert!((value(&page, "vllm:cache_config_info", "block_size=\"16\"") - 1.0).abs() < 1e-9);
    rank.shutdown.cancel();
    rank.end().unwrap();
}

#[test]
fn a_refusal_is_counted_by_its_reason() {
    let metrics = free();
    let rank = Rank::start(Config { metrics_listen: Some(metrics), ..config(0, 1) });
    let client = Client::connect(rank.listening());
    rank.ready();
    client.generate(request(vec![5; 9000], 1)).unwrap_err();
    let page = idle_page(metrics);
    let rejected = value(&page, "vllm:admission_rejections_total", "reason=\"PROMPT_TOO_LONG\"");
    assert!((rejected - 1.0).abs() < 1e-9, "{page}");
    rank.shutdown.cancel();
    rank.end().unwrap();
}

#[test]
fn a_leader_shows_what_every_rank_has_done_and_a_follower_its_steps() {
    let addresses = [free(), free()];
    let leader = Rank::start(Config { metrics_listen: Some(addresses[0]), ..config(0, 2) });
    let listening = leader.listening();
    let rendezvous = leader.wait(|report| match report {
        worker::Report::Rendezvous(address) => Some(*address),
        _ => None,
    });
    let follower = Rank::start(Config { metrics_listen: Some(addresses[1]), rendezvous, ..config(1, 2) });
    let client = Client::connect(listening);
    leader.ready();
    client.generate(request(vec![5; 40], 7)).unwrap();
    let shown = idle_page(addresses[0]);
    for rank in ["rank=\"0\"", "rank=\"1\""] {
        assert!(value(&shown, "cohort_rank_steps_total", rank) >= 7.0);
        assert!(value(&shown, "cohort_rank_rows_total", rank) >= 46.0);
        assert!(value(&shown, "cohort_collective_calls_total", rank) > 0.0);
        assert!(value(&shown, "cohort_collective_seconds_total", rank) > 0.0);
        assert!(value(&shown, "cohort_collective_sent_bytes_total", rank) > 0.0);
    }
    assert!(value(&shown, "cohort_expert_rows_total", "expert=\"0\"") >= 0.0);
    assert!(value(&shown, "cohort_expert_imbalance", "engine=") >= 1.0);
    assert!(value(&shown, "cohort_load_read_bytes", "engine=") > 0.0);
    let page = page(addresses[1]);
    let found: BTreeSet<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let expected: BTreeSet<&str> = FOLLOWER_NAMES.lines().collect();
    assert_eq!(found, expected, "crates/worker/tests/golden/follower_metrics.txt");
    assert!(value(&page, "cohort_steps_total", "engine=") >= 7.0);
    assert!((value(&page, "cohort_phase", "phase=\"serving\"") - 1.0).abs() < 1e-9, "{page}");
    assert!(get(addresses[1], "/readyz").0.contains("200"));
    leader.shutdown.cancel();
    leader.end().unwrap();
    follower.end().unwrap();
}

#[test]
fn probes_tell_a_group_that_waits_from_one_that_serves() {
    let metrics = free();
    let leader = Rank::start(Config { metrics_listen: Some(metrics), ..config(0, 2) });
    leader.listening();
    assert!(get(metrics, "/livez").0.contains("200"));
    let (status, body) = get(metrics, "/startupz");
    assert!(status.contains("200") && body.contains("\"phase\":\"starting\""), "{body}");
    assert!(get(metrics, "/readyz").0.contains("503"));
    leader.shutdown.cancel();
    drop(leader);
}

#[test]
fn a_port_in_use_is_named_with_its_flag() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let metrics_listen = Some(taken.local_addr().unwrap());
    let error = Rank::start(Config { metrics_listen, ..config(0, 1) }).end().unwrap_err();
    assert!(matches!(error, Error::MetricsListen { .. }), "{error}");
    assert!(error.to_string().contains("--metrics-listen"), "{error}");
}
