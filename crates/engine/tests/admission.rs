//! What is refused when it comes, and what must wait.

mod support;

use engine::{Config, Effect, Request};
use support::{Driver, VOCAB, config, prompt, request, rows, spec, valid};
use types::{BlockSize, GenerationSpec, Micros, TokenId};

/// Submits `request` to a fresh engine; why it was refused.
fn refused(config: Config, request: Request) -> String {
    let mut driver = Driver::new(config);
    driver.now = Micros(100);
    driver.submit(1, request);
    assert!(driver.engine.is_idle(), "a refused request leaves nothing behind");
    assert_eq!(driver.effects.len(), 1, "the refusal is the only effect");
    driver.refusal(1).expect("it is refused")
}

fn refused_prompt(prompt: Vec<TokenId>) -> String {
    refused(config(), Request { prompt, ..request(0, 1, 1) })
}

#[test]
fn an_empty_prompt_is_refused() {
    assert!(refused_prompt(Vec::new()).contains("empty"));
}

#[test]
fn a_token_outside_the_vocabulary_is_refused_by_index() {
    let text = refused_prompt(vec![TokenId(5), TokenId(VOCAB)]);
    assert!(text.contains("token 1 is 1000") && text.contains("vocabulary size 1000"), "{text}");
}

#[test]
fn a_prompt_that_leaves_no_room_for_a_token_is_refused() {
    let text = refused_prompt(prompt(0, 64));
    assert!(text.contains("64 tokens"), "{text}");
    let mut driver = Driver::new(config());
    driver.submit(1, request(0, 63, 10));
    driver.run();
    assert_eq!(driver.tokens(1).len(), 1, "one less leaves room for one");
}

#[test]
fn a_request_that_can_never_fit_says_what_it_needs_and_what_there_is() {
    // 20 + 13 tokens, of which the last is never cached: 32 in blocks of 4.
    let fits = Config { blocks: [8, 8], ..config() };
    let mut driver = Driver::new(fits.clone());
    driver.submit(1, request(0, 20, 13));
    assert_eq!(driver.refusal(1), None);
    let text = refused(Config { blocks: [7, 8], ..fits }, request(0, 20, 13));
    assert!(text.contains("need 8 full KV blocks") && text.contains("there are 7"), "{text}");
}

#[test]
fn the_sliding_group_only_needs_room_for_the_window() {
    // A window of 8 keys in blocks of 4 touches at most 3 blocks.
    let small = Config { blocks: [64, 3], window_keys: 8, ..config() };
    let mut driver = Driver::new(small.clone());
    driver.submit(1, request(0, 30, 30));
    driver.run();
    assert_eq!(driver.tokens(1).len(), 30);
    let text = refused(Config { blocks: [64, 2], ..small }, request(0, 30, 30));
    assert!(text.contains("need 3 sliding KV blocks") && text.contains("there are 2"), "{text}");
}

#[test]
fn a_deadline_that_has_passed_is_refused() {
    let text = refused(config(), Request { deadline: Some(Micros(58)), ..request(0, 4, 4) });
    assert!(text.contains("42 µs before"), "{text}");
}

#[test]
fn the_queue_is_bounded_by_requests() {
    let mut driver = Driver::new(Config { waiting_requests_max: 2, ..config() });
    for seq in 1..=3 {
        driver.submit(seq, request(0, 2, 2));
    }
    assert_eq!(driver.refusal(2), None);
    assert_eq!(driver.refusal(3).unwrap(), "2 requests wait, and no more than 2 may");
    driver.run();
    driver.submit(4, request(0, 2, 2));
    assert_eq!(driver.refusal(4), None, "there is room again");
}

#[test]
fn the_queue_is_bounded_by_tokens() {
    let mut driver = Driver::new(Config { waiting_tokens_max: 64, ..config() });
    driver.submit(1, request(0, 40, 2));
    driver.submit(2, request(0, 25, 2));
    driver.submit(3, request(0, 24, 2));
    let text = driver.refusal(2).unwrap();
    assert!(text.contains("40 tokens wait; with 25 more") && text.contains("limit of 64"), "{text}");
    assert_eq!(driver.refusal(3), None, "a smaller one still fits");
    assert_eq!(driver.engine.load().waiting_tokens, 64);
}

#[test]
fn no_more_than_running_max_run_at_once() {
    let mut driver = Driver::new(Config { running_max: 2, ..config() });
    for seq in 1..=3 {
        driver.submit(seq, request(0, 2, 3));
    }
    assert_eq!(rows(&driver.step()), [2, 2]);
    assert_eq!((driver.engine.load().running, driver.engine.load().waiting), (2, 1));
    driver.run();
    assert_eq!(driver.tokens(3).len(), 3, "the third had its turn");
}

#[test]
fn a_request_starts_only_when_its_whole_prompt_fits_beside_what_runs() {
    // The first holds 3 blocks, the second needs 4, and each may soon need one more.
    for (blocks, running) in [(8, 1), (9, 2)] {
        let block_size = BlockSize::new(4).unwrap();
        let mut driver = Driver::new(Config { blocks: [blocks, 0], block_size, ..config() });
        driver.submit(1, request(1, 12, 5));
        driver.submit(2, request(2, 16, 2));
        driver.step();
        assert_eq!(driver.engine.load().running, running, "{blocks} blocks");
        driver.run();
        assert_eq!((driver.tokens(1).len(), driver.tokens(2).len()), (5, 2));
        let preempted = driver.effects.iter().filter(|effect| matches!(effect, Effect::Preempted { .. }));
        assert_eq!(preempted.count(), 0, "{blocks} blocks");
    }
}

#[test]
fn blocks_promised_to_a_prompt_that_is_being_computed_are_not_given_to_another() {
    // Log-probabilities hold the first to 4 rows a step: it has 1 block and needs 7 more, the second needs 5.
    let mut driver = Driver::new(Config { blocks: [13, 0], logit_rows_max: 4, ..config() });
    let slow = GenerationSpec { prompt_logprobs: Some(0), ..spec(2) };
    driver.submit(1, Request { generation: valid(slow), ..request(1, 32, 2) });
    driver.submit(2, request(2, 20, 2));
    assert_eq!(rows(&driver.step()), [4]);
    assert_eq!(driver.engine.load().running, 1, "there are rows and free blocks left, and they are promised");
    driver.run();
    assert!(driver.effects.iter().all(|effect| !matches!(effect, Effect::Preempted { .. })));
    assert_eq!((driver.tokens(1).len(), driver.tokens(2).len()), (2, 2));
}

#[test]
fn a_request_can_be_judged_without_being_submitted() {
    let driver = Driver::new(config());
    let generation = valid(spec(4));
    assert!(driver.engine.check_request(&prompt(0, 4), &generation).is_ok());
    assert!(driver.engine.check_request(&[], &generation).is_err());
}
