//! Who goes first: priority, and age that makes up for it.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use engine::{AGEING_MAX, AGEING_PER_LEVEL, Config, Effect, Request, RequestOptions};
use support::{Driver, config, request};
use types::{Micros, Priority};

fn ranked(tag: u32, prompt_tokens: u32, max_tokens: u32, level: i32) -> Request {
    let options = RequestOptions { priority: Priority::new(level).unwrap(), ..RequestOptions::default() };
    Request { options, ..request(tag, prompt_tokens, max_tokens) }
}

/// One sequence at a time, so that the order of starting shows.
fn single() -> Driver {
    Driver::new(Config { running_max: 1, ..config() })
}

fn order(driver: &Driver, wanted: fn(&Effect) -> Option<u64>) -> Vec<u64> {
    driver.effects.iter().filter_map(wanted).collect()
}

fn started(driver: &Driver) -> Vec<u64> {
    order(driver, |effect| match effect {
        Effect::Started { seq, .. } => Some(seq.0),
        _ => None,
    })
}

fn preempted(driver: &Driver) -> Vec<u64> {
    order(driver, |effect| match effect {
        Effect::Preempted { seq } => Some(seq.0),
        _ => None,
    })
}

#[test]
fn a_higher_priority_starts_first_and_equals_in_the_order_they_came() {
    let mut driver = single();
    for (seq, level) in [(1, 0), (2, 5), (3, -5), (4, 5), (5, 0)] {
        driver.submit(seq, ranked(1, 4, 2, level));
    }
    driver.run();
    assert_eq!(started(&driver), [2, 4, 1, 5, 3]);
}

#[test]
fn waiting_one_ageing_step_is_worth_one_level() {
    for (wait, first) in [(AGEING_PER_LEVEL.0 - 1, 2), (AGEING_PER_LEVEL.0, 1)] {
        let mut driver = single();
        driver.submit(1, ranked(1, 4, 2, 0));
        driver.now = Micros(wait);
        driver.submit(2, ranked(2, 4, 2, 1));
        driver.run();
        assert_eq!(started(&driver)[0], first, "after {wait} µs");
    }
}

#[test]
fn after_the_longest_ageing_the_lowest_goes_before_the_highest_newcomer() {
    for (wait, first) in [(AGEING_MAX.0 - 1, 2), (AGEING_MAX.0, 1)] {
        let mut driver = single();
        driver.submit(1, ranked(1, 4, 2, Priority::LOWEST.level()));
        driver.now = Micros(wait);
        driver.submit(2, ranked(2, 4, 2, Priority::HIGHEST.level()));
        driver.run();
        assert_eq!(started(&driver)[0], first, "after {wait} µs");
    }
}

#[test]
fn a_stream_of_urgent_requests_does_not_starve_a_patient_one() {
    let mut driver = single();
    driver.submit(1, ranked(1, 4, 2, Priority::LOWEST.level()));
    let mut next = 2;
    while driver.finish(1).is_none() {
        while driver.engine.load().waiting < 3 {
            driver.submit(next, ranked(2, 4, 2, Priority::HIGHEST.level()));
            next += 1;
        }
        driver.step();
        driver.now = driver.now.after(AGEING_PER_LEVEL);
        assert!(driver.now.0 <= AGEING_MAX.0 + 8 * AGEING_PER_LEVEL.0, "it starts soon after it has aged");
    }
    assert!(next > 50, "others went before it for a long time");
}

#[test]
fn the_last_in_rank_is_preempted_even_when_it_started_first() {
    // Each may hold 6 of 8 blocks.
    let mut driver = Driver::new(Config { blocks: [8, 0], step_tokens_max: 32, ..config() });
    driver.submit(1, ranked(1, 8, 16, -1));
    driver.step();
    driver.submit(2, ranked(2, 8, 16, 1));
    driver.run();
    assert_eq!(preempted(&driver), [1]);
    assert_eq!((driver.tokens(1).len(), driver.tokens(2).len()), (16, 16));
}

#[test]
fn a_priority_outside_its_range_is_refused_with_the_numbers() {
    assert!(Priority::new(100).is_ok() && Priority::new(-100).is_ok());
    let text = Priority::new(101).unwrap_err().to_string();
    assert!(text.contains("between -100 and 100, not 101"), "{text}");
}
