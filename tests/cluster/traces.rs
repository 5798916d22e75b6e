//! The way of one request as spans, from every process it passes.

use std::io::{Read, Write};
use std::net::TcpStream;

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use proto::v1::{GenerateRequest, generate_request};
use rustix::process::Signal;
use security::ServerTls;
use tonic::Request;

use crate::collector::{Collector, Seen};
use crate::security::certificates;
use crate::support::{Cluster, signal, tokens};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const PROMPT: &str = "the plumtree in the garden";

/// A request of a caller that traces it, or does not.
fn called(request: GenerateRequest, sampled: bool) -> Request<GenerateRequest> {
    let mut request = Request::new(request);
    let traceparent = format!("00-{TRACE}-{CALLER}-0{}", u8::from(sampled));
    request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    request.metadata_mut().insert("tracestate", "garden=plum".parse().unwrap());
    request
}

fn asked(text: &str) -> GenerateRequest {
    GenerateRequest { prompt: Some(generate_request::Prompt::Text(text.into())), ..tokens(&[], 6) }
}

/// The spans of the caller's trace once `count` of them have arrived.
fn spans(cluster: &mut Cluster, collector: &Collector, count: usize) -> Vec<Seen> {
    cluster.wait("the spans", |_| Some(collector.of(TRACE)).filter(|spans| spans.len() >= count))
}

#[track_caller]
fn one<'a>(spans: &'a [Seen], service: &str, name: &str) -> &'a Seen {
    let found: Vec<&Seen> =
        spans.iter().filter(|span| span.service == service && span.name == name).collect();
    assert_eq!(found.len(), 1, "{service} {name} in {spans:#?}");
    found[0]
}

#[test]
fn one_request_is_one_tree_over_router_leader_and_follower() {
    let collector = Collector::start();
    let mut cluster = Cluster::up(&["--tensor-parallel=2", &collector.flag()]);
    let mut client = cluster.client();
    let mut request = asked(PROMPT);
    request.request_id = "plum-1".into();
    request.session_id = "garden-7".into();
    cluster.block_on(client.generate_once(called(request, true))).unwrap();
    let spans = spans(&mut cluster, &collector, 11);
    assert_eq!(spans.len(), 11, "{spans:#?}");

    let root = one(&spans, "cohort-router", "text_completion cohort-demo");
    assert_eq!(root.parent, CALLER);
    let stages = ["admission", "tokenize", "placement"].map(|name| one(&spans, "cohort-router", name));
    for (stage, next) in stages.iter().zip(&stages[1..]) {
        assert_eq!(stage.parent, root.id);
        assert!(stage.time[1] <= next.time[0], "{stage:?} {next:?}");
    }
    let attempt = one(&spans, "cohort-router", "attempt");
    assert_eq!(attempt.parent, root.id);
    let generate = one(&spans, "cohort-leader", "generate");
    assert_eq!(generate.parent, attempt.id);
    let parts = ["queue", "prefill", "decode"].map(|name| one(&spans, "cohort-leader", name));
    for (part, next) in parts.iter().zip(&parts[1..]) {
        assert_eq!(part.parent, generate.id);
        assert!(part.time[1] <= next.time[1] && part.time[0] <= next.time[0], "{part:?} {next:?}");
    }
    for name in ["prefill", "decode"] {
        let part = one(&spans, "cohort-follower", name);
        assert_eq!(part.parent, generate.id);
        assert!(part.number("cohort.steps") >= 1, "{part:?}");
    }
    assert_eq!(
        one(&spans, "cohort-follower", "prefill").number("cohort.rows"),
        root.number("gen_ai.usage.input_tokens")
    );

    assert_eq!(root.text("gen_ai.operation.name"), "text_completion");
    assert_eq!(root.text("gen_ai.provider.name"), "cohere");
    assert_eq!(root.text("gen_ai.request.model"), "cohort-demo");
    assert_eq!(root.text("gen_ai.response.id"), "plum-1");
    assert_eq!(root.text("gen_ai.conversation.id"), "garden-7");
    assert_eq!(root.fact("gen_ai.request.stream"), Some(&Value::BoolValue(false)));
    assert_eq!(generate.text("gen_ai.request.id"), "plum-1");
    assert_eq!(root.number("gen_ai.request.max_tokens"), 6);
    for span in [root, generate] {
        for key in ["gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"] {
            assert_eq!(span.number(key), 6);
        }
        assert_eq!(span.number("gen_ai.usage.input_tokens"), span.number("gen_ai.usage.prompt_tokens"));
    }
    let first = root.seconds("gen_ai.response.time_to_first_chunk");
    assert!(first > 0.0 && first <= root.seconds("gen_ai.latency.e2e"));
    for key in ["time_in_queue", "time_to_first_token", "time_in_model_prefill", "time_in_model_decode"] {
        assert!(generate.seconds(&format!("gen_ai.latency.{key}")) >= 0.0);
    }
    let Some(Value::ArrayValue(reasons)) = root.fact("gen_ai.response.finish_reasons") else {
        panic!("{root:?}")
    };
    assert_eq!(reasons.values.len(), 1);
    assert!(spans.iter().all(|span| !span.failed), "{spans:#?}");
    let written = format!("{spans:?}");
    assert!(!written.contains("plumtree"), "a prompt is in {written}");
}

#[test]
fn a_collector_behind_tls_is_sent_spans_when_its_authority_is_known() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path(), &["collector"]);
    let file = |name: &str| dir.path().join(name);
    let collector = Collector::encrypted(&ServerTls {
        certificate: file("collector.crt"),
        key: file("collector.key"),
        client_ca: None,
    });
    let ca = format!("--otlp-ca={}", file("ca.crt").display());
    let mut cluster = Cluster::up(&[&collector.flag(), &ca]);
    let mut client = cluster.client();
    cluster.block_on(client.generate_once(called(asked(PROMPT), true))).unwrap();
    let spans = spans(&mut cluster, &collector, 9);
    assert!(spans.iter().any(|span| span.service == "cohort-leader"), "{spans:#?}");
}

#[test]
fn who_is_traced_is_what_callers_say_else_the_ratio() {
    let collector = Collector::start();
    let mut cluster = Cluster::up(&[&collector.flag(), "--trace-sample-ratio=0"]);
    let mut client = cluster.client();
    cluster.generate(tokens(&[5, 6], 2)).unwrap();
    cluster.block_on(client.generate_once(called(tokens(&[5, 6], 2), false))).unwrap();
    cluster.block_on(client.generate_once(called(tokens(&[5, 6], 2), true))).unwrap();
    let spans = spans(&mut cluster, &collector, 9);
    // Without a follower; the spans of all three would be three times as many.
    cluster.signal(Signal::TERM);
    cluster.end();
    assert_eq!((spans.len(), collector.all().len()), (9, 9), "{:#?}", collector.all());
}

#[test]
fn prompts_and_answers_are_written_down_only_when_that_is_asked_for() {
    let collector = Collector::start();
    let mut cluster =
        Cluster::up(&[&collector.flag(), "--http-listen=127.0.0.1:0", "--trace-record-content"]);
    let http = cluster.http();
    let body = format!(
        r#"{{"messages": [{{"role": "user", "content": "{PROMPT}"}}], "max_tokens": 5, "temperature": 0, "stream": true}}"#
    );
    let mut stream = TcpStream::connect(http.strip_prefix("http://").unwrap()).unwrap();
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: router\r\nconnection: close\r\ncontent-type: application/json\r\n\
         traceparent: 00-{TRACE}-{CALLER}-01\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let spans = spans(&mut cluster, &collector, 9);
    let root = one(&spans, "cohort-router", "chat cohort-demo");
    assert_eq!(root.parent, CALLER);
    assert!(root.text("gen_ai.input.messages").contains(PROMPT));
    assert!(root.text("gen_ai.output.messages").contains("assistant"));
    assert_eq!(root.fact("gen_ai.request.stream"), Some(&Value::BoolValue(true)));
    let others = spans.iter().filter(|span| span.id != root.id);
    assert!(!format!("{:?}", others.collect::<Vec<_>>()).contains("plumtree"));
}

#[test]
fn a_request_that_loses_its_group_has_a_migration_and_another_attempt() {
    let collector = Collector::start();
    let mut cluster = Cluster::up(&[&collector.flag()]);
    let mut client = cluster.client();
    let leader = cluster.rank(0);
    let mut stream =
        cluster.block_on(client.generate(called(tokens(&[5, 6, 7], 400), true))).unwrap().into_inner();
    cluster.block_on(stream.message()).unwrap().unwrap();
    signal(leader, Signal::KILL);
    cluster.block_on(async { while stream.message().await.unwrap().is_some() {} });
    cluster.wait("a migration", |_| {
        collector.of(TRACE).into_iter().find(|span| span.name == "migration" && !span.failed)
    });
    let spans = collector.of(TRACE);
    let migration = spans.iter().find(|span| span.name == "migration").unwrap();
    assert!(migration.number("cohort.resumed_tokens") >= 1, "{migration:?}");
    assert!(migration.text("cohort.migration.reason").contains("group"), "{migration:?}");
    assert!(migration.text("server.address").starts_with("http://"));
}

#[test]
fn a_collector_that_is_down_is_named_once_by_each_process_and_stops_nothing() {
    // Nobody listens at a port that was just given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut cluster =
        Cluster::up(&["--tensor-parallel=2", &format!("--otlp-endpoint=http://127.0.0.1:{port}")]);
    let said = "traces cannot be sent";
    cluster.wait("each process to have tried", |cluster| {
        cluster.generate(tokens(&[5, 6, 7], 3)).unwrap();
        (cluster.said().matches(said).count() >= 3).then_some(())
    });
    for _ in 0..20 {
        cluster.generate(tokens(&[5, 6, 7], 3)).unwrap();
    }
    // The end sends what is left, in vain once more.
    cluster.signal(Signal::TERM);
    let (status, all) = cluster.end();
    assert!(status.success(), "{all}");
    assert_eq!(all.matches(said).count(), 3, "{all}");
}
