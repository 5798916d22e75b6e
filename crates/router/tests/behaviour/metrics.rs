//! What a router counts, and under which names.

use std::collections::BTreeSet;

use proto::Failure;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Leader, TestRouter, all, answer, from_text, soon};

/// Every metric of a router, as `name type`. Dashboards and alerts depend on the names: one that changes is a breaking
/// change.
const NAMES: &str = include_str!("golden/metrics.txt");

async fn page(router: &TestRouter) -> String {
    let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut page = String::new();
    soon(stream.read_to_string(&mut page)).await.unwrap();
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("openmetrics-text"), "{page}");
    page
}

/// The value of the sample with this name and labels.
#[track_caller]
fn value(page: &str, sample: &str) -> f64 {
    let line = page.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == sample));
    let line = line.unwrap_or_else(|| panic!("no {sample} in:\n{page}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[track_caller]
fn is(page: &str, sample: &str, expected: f64) {
    let value = value(page, sample);
    assert!((value - expected).abs() < 1e-9, "{sample} is {value}, not {expected}:\n{page}");
}

#[tokio::test]
async fn the_names_and_types_are_the_ones_dashboards_know() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    // The first answer of this listener is counted once it is out.
    page(&router).await;
    let page = page(&router).await;
    let found: BTreeSet<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let expected: BTreeSet<&str> = NAMES.lines().collect();
    let lines = |names: BTreeSet<&str>| names.into_iter().map(|line| format!("{line}\n")).collect::<String>();
    assert_eq!(lines(found), lines(expected), "crates/router/tests/behaviour/golden/metrics.txt");
    for name in NAMES.lines() {
        let name = name.split(' ').next().unwrap();
        assert!(page.contains(&format!("# HELP {name} ")), "{name} has no help");
    }
}

#[tokio::test]
async fn a_request_is_counted_once_with_its_stages_and_tokens() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let address = leader.play_always(answer("ok"));
    let messages = all(&router, from_text("x")).await.unwrap();
    let usage = messages.last().unwrap().usage.unwrap();
    let page = page(&router).await;
    is(&page, "cohort_router_requests_total{outcome=\"OK\"}", 1.0);
    for stage in ["admit", "tokenize", "place", "first_message", "whole"] {
        is(&page, &format!("cohort_router_stage_seconds_count{{stage=\"{stage}\"}}"), 1.0);
    }
    is(&page, "cohort_router_tokens_total{kind=\"prompt\"}", usage.prompt_tokens.into());
    is(&page, "cohort_router_tokens_total{kind=\"generated\"}", usage.output_tokens.into());
    let placed = format!("cohort_router_placements_total{{group=\"{address}\",reason=\"least_loaded\"}}");
    is(&page, &placed, 1.0);
    is(&page, &format!("cohort_router_group_up{{group=\"{address}\"}}"), 1.0);
    is(&page, &format!("cohort_router_group_requests_open{{group=\"{address}\"}}"), 0.0);
    is(&page, "cohort_router_requests_open", 0.0);
}

#[tokio::test]
async fn a_refusal_is_counted_by_its_reason() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    all(&router, from_text("")).await.unwrap_err();
    leader.refuse(Failure::Internal { why: "a test".to_owned() });
    all(&router, from_text("x")).await.unwrap_err();
    let page = page(&router).await;
    is(&page, "cohort_router_requests_total{outcome=\"INVALID_FIELD\"}", 1.0);
    is(&page, "cohort_router_requests_total{outcome=\"INTERNAL\"}", 1.0);
}

#[tokio::test]
async fn a_caller_that_leaves_is_counted_as_gone() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let stream = soon(router.client().await.generate(from_text("x"))).await.unwrap();
    let open = leader.next().await;
    is(&page(&router).await, "cohort_router_requests_open", 1.0);
    drop(stream);
    soon(open.chunks.closed()).await;
    // The router drops the answer and its stream to the leader together, in this order or the other.
    let gone = "cohort_router_requests_total{outcome=\"ABANDONED\"}";
    soon(async { while !page(&router).await.lines().any(|line| line == format!("{gone} 1")) {} }).await;
}

#[tokio::test]
async fn http_answers_are_counted_by_path_and_class_without_a_series_for_every_typo() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    for path in ["/livez", "/nothing-here", "/nothing-there", "/v1/models/other"] {
        let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        soon(stream.read_to_end(&mut Vec::new())).await.unwrap();
    }
    let page = page(&router).await;
    is(&page, "http_requests_total{handler=\"/livez\",method=\"GET\",status=\"2xx\"}", 1.0);
    is(&page, "http_requests_total{handler=\"none\",method=\"GET\",status=\"4xx\"}", 2.0);
    is(&page, "http_requests_total{handler=\"/v1/models/{id}\",method=\"GET\",status=\"4xx\"}", 1.0);
    assert!(!page.contains("nothing-here"), "{page}");
}
