//! Random requests, cancels, deadlines and slow steps on tiny pools: whatever happens around it, a request gets the
//! tokens it would get alone, nothing is lost, and nobody waits for ever.
//!
//! `cargo sim` runs the seeds CI runs; `SEEDS=17..18 cargo sim` one of them, `SEEDS=0..100000 cargo sim` many.

mod support;

use std::ops::Range;
use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use support::sim::{Counts, run};

/// Seeds CI runs, and steps with arrivals in each.
const SEEDS: Range<u64> = 0..2000;
const STEPS: u32 = 500;

/// The seeds asked for, as `a..b`.
fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("SEEDS") else { return SEEDS };
    let parsed = text.split_once("..").map(|(a, b)| (a.parse(), b.parse()));
    match parsed {
        Some((Ok(first), Ok(end))) if first < end => first..end,
        _ => panic!("SEEDS is {text:?}; it must be two numbers a..b, a below b"),
    }
}

#[test]
fn every_request_gets_the_tokens_it_would_get_alone() {
    let seeds = seeds();
    let next = AtomicU64::new(seeds.start);
    let sum = Mutex::new(Counts::default());
    let worker = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let counts = catch_unwind(|| run(seed, STEPS, None)).unwrap_or_else(|panic| {
                next.store(seeds.end, Ordering::Relaxed);
                println!("reproduce with: SEEDS={seed}..{} cargo sim", seed + 1);
                std::panic::resume_unwind(panic)
            });
            sum.lock().unwrap().add(counts);
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(worker);
        }
    });
    let sum = sum.into_inner().unwrap();
    println!("{sum:?}");
    if seeds == SEEDS {
        let Counts { steps, finished, ended_early, refused, preempted, resumed, .. } = sum;
        let common = [finished / 10, ended_early, refused, preempted, resumed, sum.cached_starts];
        let rare = [sum.spoiled * 10, sum.barred * 10, sum.shared_steps / 10, sum.uneven_steps / 10];
        let rarest = common.into_iter().chain(rare).chain([sum.planned_ahead / 10]).min();
        assert!(steps > 500_000 && rarest > Some(5_000), "the runs exercise all of it: {sum:?}");
    }
}
