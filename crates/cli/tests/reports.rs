//! The lines a supervised process writes, and the errors it tells.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use cli::report::{Event, Line, Loaded, Phase, Serving, Throttle, chain};

fn events() -> Vec<Event> {
    let address = "127.0.0.1:7".parse().unwrap();
    vec![
        Event::Rendezvous { address },
        Event::Listening { address },
        Event::Phase { phase: Phase::Warming, done: 1, total: 2 },
        Event::Loaded(Loaded {
            resident: 1,
            read: 2,
            tensors: 3,
            skipped_tensors: 1,
            skipped_bytes: 2,
            elapsed_ms: 4,
            device: "cpu, 1 thread, f32".into(),
        }),
        Event::Ready { elapsed_ms: 5 },
        Event::Serving(Serving { grpc: address, http: None }),
        Event::Serving(Serving { grpc: address, http: Some(address) }),
        Event::Failed { error: "a \"quoted\"\nline".into() },
    ]
}

#[test]
fn every_event_fits_on_one_line_and_reads_back() {
    for event in events() {
        for rank in [None, Some(3)] {
            let line = Line { pid: 9, rank, event: event.clone() };
            let text = serde_json::to_string(&line).unwrap();
            assert!(!text.contains('\n'), "{text}");
            assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), line);
        }
    }
}

#[test]
fn a_line_names_its_event() {
    let line = Line { pid: 9, rank: Some(0), event: Event::Ready { elapsed_ms: 5 } };
    let expected = r#"{"pid":9,"rank":0,"event":"ready","elapsed_ms":5}"#;
    assert_eq!(serde_json::to_string(&line).unwrap(), expected);
}

#[test]
fn byte_counts_are_thinned_out_but_the_first_the_last_and_other_events_pass() {
    let throttle = Throttle::default();
    let start = Instant::now();
    let loading = |done| Event::Phase { phase: Phase::Loading, done, total: 100 };
    let passes = |event: &Event, ms| throttle.passes(event, start + Duration::from_millis(ms));
    assert!(passes(&loading(0), 0));
    assert!(passes(&loading(1), 0));
    assert!(!passes(&loading(2), 49));
    assert!(passes(&Event::Ready { elapsed_ms: 1 }, 49));
    assert!(passes(&loading(3), 50));
    assert!(!passes(&loading(4), 51));
    assert!(passes(&loading(100), 51));
}

#[test]
fn an_error_tells_each_cause_once() {
    let error = anyhow!("file x is missing").context("rank 1: file x is missing").context("the group failed");
    assert_eq!(chain(&error), "the group failed: rank 1: file x is missing");
    let alone: anyhow::Result<()> = Err(anyhow!("a")).context("b");
    assert_eq!(chain(&alone.unwrap_err()), "b: a");
}
