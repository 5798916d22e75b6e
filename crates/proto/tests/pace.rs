//! What a caller that is turned away is told: when it is worth to come back.

use std::time::{Duration, Instant};

use proto::{PAUSE_MAX, Pace, RETRY_AFTER};
use types::limits::{RETRY_AFTER_MAX, RETRY_AFTER_MIN};

const MS: Duration = Duration::from_millis(1);

/// What is full from `start` on and of whose places one becomes free every `each`, `times` over.
fn steady(start: Instant, each: Duration, times: u32) -> (Pace, Instant) {
    let mut pace = Pace::default();
    pace.full(start);
    for at in 1..=times {
        pace.left(1, start + each * at);
    }
    (pace, start + each * times)
}

/// To a thousandth.
#[track_caller]
fn is(wait: Duration, expected: Duration) {
    let off = wait.as_secs_f64() / expected.as_secs_f64() - 1.0;
    assert!(off.abs() < 1e-3, "{wait:?}, not {expected:?}");
}

#[test]
fn it_is_the_time_in_which_all_who_wait_are_let_in() {
    let (pace, now) = steady(Instant::now(), 250 * MS, 8);
    for (ahead, expected) in [(0, 250 * MS), (3, 1000 * MS), (40, 10_250 * MS)] {
        is(pace.wait(ahead, now), expected);
    }
}

#[test]
fn places_that_become_free_together_count_each() {
    let start = Instant::now();
    let mut pace = Pace::default();
    pace.full(start);
    pace.left(4, start + 2000 * MS);
    is(pace.wait(0, start + 2000 * MS), 500 * MS);
}

#[test]
fn it_is_bounded_on_both_sides() {
    let (fast, now) = steady(Instant::now(), MS, 60);
    assert_eq!(fast.wait(0, now), RETRY_AFTER_MIN);
    let (slow, now) = steady(Instant::now(), 10_000 * MS, 3);
    assert_eq!(slow.wait(500, now), RETRY_AFTER_MAX);
    assert_eq!(slow.wait(u32::MAX, now), RETRY_AFTER_MAX);
}

#[test]
fn while_nothing_has_become_free_it_is_the_longer_the_longer_that_lasts() {
    let start = Instant::now();
    let mut pace = Pace::default();
    assert_eq!(pace.wait(9, start), RETRY_AFTER, "nothing is known yet");
    pace.full(start);
    assert_eq!(pace.wait(0, start), RETRY_AFTER);
    is(pace.wait(0, start + 5000 * MS), 5000 * MS);
    is(pace.wait(2, start + 5000 * MS), 15_000 * MS);
    // And likewise when nothing becomes free any more.
    let (pace, now) = steady(start, 100 * MS, 10);
    is(pace.wait(0, now + 9000 * MS), 1000 * MS);
}

#[test]
fn only_what_became_free_lately_counts() {
    let (mut pace, now) = steady(Instant::now(), 10_000 * MS, 5);
    for at in 1..=64 {
        pace.left(1, now + 200 * MS * at);
    }
    is(pace.wait(0, now + 200 * MS * 64), 200 * MS);
}

#[test]
fn time_in_which_there_were_places_does_not_count() {
    let (mut pace, now) = steady(Instant::now(), 200 * MS, 5);
    // A moment in between changes nothing.
    pace.eased(now);
    pace.full(now + PAUSE_MAX);
    is(pace.wait(0, now + PAUSE_MAX), (200 * MS * 5 + PAUSE_MAX) / 5);
    // After an hour it begins anew.
    pace.eased(now + 3 * PAUSE_MAX);
    let later = now + Duration::from_secs(3600);
    pace.full(later);
    assert_eq!(pace.wait(0, later), RETRY_AFTER);
    pace.left(1, later + 300 * MS);
    is(pace.wait(1, later + 300 * MS), 600 * MS);
}
