//! A caller that breaks the protocol finds out at once.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use engine::{Event, RowOutput, STEPS_IN_FLIGHT_MAX, StepOutput, TokenLogprob};
use support::{Driver, VOCAB, config, request};
use types::TokenId;

/// One request of three prompt tokens whose first step is planned, answered with `rows`.
fn answered(step: u64, rows: Vec<RowOutput>) {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 3, 3));
    driver.plan().unwrap();
    driver.apply(Event::StepDone(StepOutput { step, rows }));
}

fn sampled(token: u32) -> RowOutput {
    RowOutput::Sampled { token: TokenId(token), logprob: None }
}

#[test]
fn an_output_of_the_right_step_and_size_is_taken() {
    answered(1, vec![sampled(5)]);
}

#[test]
#[should_panic(expected = "must answer the oldest step in flight")]
fn an_output_of_another_step_is_a_bug() {
    answered(2, vec![sampled(5)]);
}

#[test]
#[should_panic(expected = "must answer the oldest step in flight")]
fn an_output_with_another_number_of_rows_is_a_bug() {
    answered(1, vec![sampled(5), sampled(5)]);
}

#[test]
#[should_panic(expected = "outside the vocabulary")]
fn a_drawn_token_outside_the_vocabulary_is_a_bug() {
    answered(1, vec![sampled(VOCAB)]);
}

#[test]
#[should_panic(expected = "answers another kind of row")]
fn a_prompt_logprob_for_a_sampling_row_is_a_bug() {
    let entry = TokenLogprob { token: TokenId(5), logprob: 0.0, top: Vec::new() };
    answered(1, vec![RowOutput::PromptLogprob(entry)]);
}

#[test]
#[should_panic(expected = "must be answered before the next one")]
fn planning_further_ahead_than_one_step_is_a_bug() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 3, 3));
    for _ in 0..=STEPS_IN_FLIGHT_MAX {
        driver.plan();
    }
}

#[test]
#[should_panic(expected = "ids must grow")]
fn an_id_used_again_is_a_bug() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 3, 3));
    driver.submit(1, request(1, 3, 3));
}
