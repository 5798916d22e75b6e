//! Log-probabilities of the prompt: one list, complete, before the first token, within the budget of logit rows.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use engine::{Config, Effect, Event, Finish, Request, RowOutput, RowPurpose, StepOutput, TokenLogprob};
use support::{Driver, config, prompt, request, rows, spec, valid};
use types::{GenerationSpec, TokenId};

fn asking(tag: u32, prompt_tokens: u32) -> Request {
    let spec = GenerationSpec { prompt_logprobs: Some(2), ..spec(2) };
    Request { generation: valid(spec), ..request(tag, prompt_tokens, 2) }
}

fn list(driver: &Driver) -> Vec<TokenLogprob> {
    let lists: Vec<_> = driver
        .effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::PromptLogprobs { logprobs, .. } => Some(logprobs.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(lists.len(), 1, "one list");
    lists.into_iter().next().unwrap()
}

#[test]
fn every_prompt_position_but_the_first_has_an_entry_in_order() {
    let mut driver = Driver::new(config());
    driver.submit(1, asking(1, 40));
    driver.run();
    let got: Vec<_> = list(&driver).iter().map(|entry| (entry.token, entry.logprob)).collect();
    let expected: Vec<_> =
        prompt(1, 40).into_iter().zip(0..).skip(1).map(|(t, i)| (t, -(i as f32))).collect();
    assert_eq!(got, expected);
}

#[test]
fn the_list_comes_before_the_first_token() {
    let mut driver = Driver::new(config());
    driver.submit(1, asking(1, 5));
    driver.step();
    assert!(matches!(
        driver.effects[..],
        [Effect::Started { .. }, Effect::PromptLogprobs { .. }, Effect::Token { .. }]
    ));
}

#[test]
fn a_prompt_of_one_token_gives_an_empty_list() {
    let mut driver = Driver::new(config());
    driver.submit(1, asking(1, 1));
    driver.run();
    assert_eq!(list(&driver), []);
}

#[test]
fn chunks_are_shortened_to_the_budget_of_logit_rows() {
    let mut driver = Driver::new(Config { logit_rows_max: 5, ..config() });
    driver.submit(1, request(2, 2, 20));
    driver.step();
    driver.submit(2, asking(1, 12));
    let mut chunks = Vec::new();
    while driver.tokens(2).is_empty() {
        let step = driver.step();
        assert!(step.work.len() <= 5);
        chunks.push(rows(&step));
    }
    assert_eq!(chunks, [[1, 4], [1, 4], [1, 4]], "a decode row, and four of the prompt");
}

#[test]
fn the_last_prompt_row_draws_and_the_others_report() {
    let mut driver = Driver::new(config());
    driver.submit(1, asking(1, 3));
    let step = driver.plan().unwrap();
    let targets: Vec<_> = step
        .work
        .iter()
        .map(|work| match work.purpose {
            RowPurpose::PromptLogprob { position, target, top } => Some((position.0, target, top.top())),
            RowPurpose::Sample { .. } => None,
        })
        .collect();
    let tokens = prompt(1, 3);
    assert_eq!(targets, [Some((1, tokens[1], 2)), Some((2, tokens[2], 2)), None]);
    assert_eq!(step.plan.logit_rows().collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn a_prompt_row_without_numbers_ends_the_sequence_before_its_token() {
    let mut driver = Driver::new(config());
    driver.submit(1, asking(1, 3));
    driver.submit(2, request(2, 3, 1));
    let step = driver.plan().unwrap();
    let sampled = || RowOutput::Sampled { token: TokenId(50), logprob: None };
    let entry = TokenLogprob { token: prompt(1, 3)[1], logprob: -1.0, top: Vec::new() };
    let rows = vec![RowOutput::PromptLogprob(entry), RowOutput::NotANumber, sampled(), sampled()];
    driver.apply(Event::StepDone(StepOutput { step: step.plan.step(), rows }));
    assert_eq!((driver.finish(1), driver.tokens(1).len()), (Some(Finish::NotANumber), 0));
    assert_eq!(driver.tokens(2).len(), 1, "the rows behind are still the next sequence's");
}
