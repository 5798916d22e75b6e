//! The numbers `cohort bench` prints.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::time::Duration;

use cli::command::bench::{Measured, Percentiles, Random, Summary};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[test]
fn percentiles_are_by_nearest_rank() {
    let p = Percentiles::of((1..=100).rev().map(f64::from).collect()).unwrap();
    assert_eq!((p.mean, p.p50, p.p90, p.p99), (50.5, 50.0, 90.0, 99.0));
    let one = Percentiles::of(vec![7.0]).unwrap();
    assert_eq!((one.p50, one.p99), (7.0, 7.0));
    assert_eq!(Percentiles::of(Vec::new()), None);
}

#[test]
fn a_summary_counts_answered_requests_only() {
    let measured = Measured { arrivals: vec![(ms(10), 1), (ms(14), 1), (ms(20), 2)], end: ms(21) };
    let summary =
        Summary::of(&[Ok(measured), Err("UNAVAILABLE"), Err("UNAVAILABLE")], Duration::from_secs(2));
    assert_eq!((summary.requests_ok, summary.output_tokens), (1, 4));
    assert_eq!(summary.errors["UNAVAILABLE"], 2);
    assert_eq!((summary.output_tokens_per_s, summary.requests_per_s), (2.0, 0.5));
    assert_eq!(summary.ttft_ms.unwrap().p50, 10.0);
    assert_eq!(summary.itl_ms.unwrap().mean, 5.0);
    assert!((summary.tpot_ms.unwrap().mean - 10.0 / 3.0).abs() < 1e-9);
    assert_eq!(summary.e2e_ms.unwrap().p99, 21.0);
}

#[test]
fn a_run_without_answers_has_no_latencies() {
    let summary = Summary::of(&[Err("INTERNAL")], Duration::ZERO);
    assert_eq!((summary.ttft_ms, summary.output_tokens_per_s), (None, 0.0));
}

#[test]
fn random_waits_have_the_asked_mean_and_the_same_seed_gives_the_same_waits() {
    let waits = |seed| {
        let mut random = Random::new(seed);
        (0..20_000).map(|_| random.wait(50.0).as_secs_f64()).collect::<Vec<_>>()
    };
    let mean = waits(3).iter().sum::<f64>() / 20_000.0;
    assert!((mean - 0.02).abs() < 0.001, "seed 3: mean {mean}");
    assert_eq!(waits(3), waits(3));
    assert_ne!(waits(3), waits(4));
}

#[test]
fn random_tokens_stay_below_the_vocabulary() {
    let mut random = Random::new(5);
    assert!((0..10_000).all(|_| random.below(7) < 7), "seed 5");
    assert_eq!(random.below(1), 0);
}
