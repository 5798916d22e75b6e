//! Cancels and deadlines free everything within one step; results that come too late are dropped without trace.

mod support;

use engine::{Effect, Event, Finish, Request};
use support::{Driver, config, request};
use types::{Micros, SeqId};

#[test]
fn a_cancelled_sequence_frees_its_blocks_and_slot_at_once() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 10, 20));
    driver.submit(2, request(2, 3, 20));
    driver.step();
    assert_eq!(driver.used(), [4, 4]);
    driver.apply(Event::Cancel(SeqId(1)));
    assert_eq!(driver.used(), [1, 1]);
    assert_eq!(driver.finish(1), Some(Finish::Cancelled));
    let step = driver.step();
    assert_eq!(step.plan.released().len(), 1);
    assert!(step.work.iter().all(|work| work.seq == SeqId(2)));
}

#[test]
fn a_result_that_comes_after_the_cancel_is_dropped() {
    for cancelled in 1..=3 {
        let mut driver = Driver::new(config());
        for seq in 1..=3 {
            driver.submit(seq, request(seq as u32, 3, 20));
        }
        let step = driver.plan().unwrap();
        driver.apply(Event::Cancel(SeqId(cancelled)));
        driver.answer(&step, |seq| types::TokenId(100 + seq.0 as u32));
        for seq in 1..=3 {
            let expected = if seq == cancelled { vec![] } else { vec![types::TokenId(100 + seq as u32)] };
            assert_eq!(driver.tokens(seq), expected, "sequence {seq} when {cancelled} was cancelled");
        }
    }
}

#[test]
fn a_batch_cancelled_as_a_whole_leaves_an_idle_engine() {
    let mut driver = Driver::new(config());
    for seq in 1..=3 {
        driver.submit(seq, request(seq as u32, 3, 20));
    }
    let step = driver.plan().unwrap();
    for seq in 1..=3 {
        driver.apply(Event::Cancel(SeqId(seq)));
    }
    driver.answer(&step, |_| types::TokenId(50));
    assert!(driver.engine.is_idle());
    assert_eq!(driver.used(), [0, 0]);
    assert_eq!(driver.plan(), None);
}

#[test]
fn a_waiting_request_can_be_cancelled() {
    let mut driver = Driver::new(engine::Config { running_max: 1, ..config() });
    driver.submit(1, request(1, 3, 5));
    driver.submit(2, request(2, 3, 5));
    driver.step();
    driver.apply(Event::Cancel(SeqId(2)));
    assert_eq!(driver.finish(2), Some(Finish::Cancelled));
    assert_eq!((driver.engine.load().waiting, driver.engine.load().waiting_tokens), (0, 0));
    driver.run();
    assert_eq!(driver.finish(1), Some(Finish::Length));
}

#[test]
fn cancelling_what_has_ended_or_never_was_does_nothing() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 3, 1));
    driver.run();
    let before = driver.effects.len();
    driver.apply(Event::Cancel(SeqId(1)));
    driver.apply(Event::Cancel(SeqId(99)));
    assert_eq!(driver.effects.len(), before);
}

#[test]
fn a_running_sequence_ends_at_the_first_plan_after_its_deadline() {
    let mut driver = Driver::new(config());
    driver.submit(1, Request { deadline: Some(Micros(10)), ..request(1, 3, 20) });
    driver.now = Micros(9);
    driver.step();
    driver.now = Micros(10);
    assert_eq!(driver.plan(), None);
    assert_eq!(driver.finish(1), Some(Finish::DeadlineExceeded));
    assert_eq!(driver.tokens(1).len(), 1, "what was drawn in time was delivered");
    assert_eq!(driver.used(), [0, 0]);
}

#[test]
fn a_waiting_request_expires_before_its_prompt_is_computed() {
    let mut driver = Driver::new(engine::Config { running_max: 1, ..config() });
    driver.submit(1, request(1, 3, 5));
    driver.submit(2, Request { deadline: Some(Micros(10)), ..request(2, 3, 5) });
    driver.step();
    driver.now = Micros(11);
    driver.step();
    assert_eq!(driver.finish(2), Some(Finish::DeadlineExceeded));
    assert_eq!(driver.tokens(2), []);
}

#[test]
fn each_sequence_ends_exactly_once() {
    let mut driver = Driver::new(config());
    for seq in 1..=3 {
        driver.submit(seq, request(seq as u32, 3, 2));
    }
    driver.submit(4, request(4, 64, 2));
    driver.step();
    driver.apply(Event::Cancel(SeqId(3)));
    driver.apply(Event::Cancel(SeqId(3)));
    driver.run();
    for seq in 1..=4 {
        let ends = driver.effects.iter().filter(|effect| match effect {
            Effect::Finished { seq: s, .. } | Effect::Refused { seq: s, .. } => s.0 == seq,
            _ => false,
        });
        assert_eq!(ends.count(), 1, "sequence {seq}");
    }
}
