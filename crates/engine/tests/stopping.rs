//! When generation ends by itself: end-of-sequence and stop tokens, lengths, and rows without numbers.

mod support;

use engine::{Config, Effect, Event, Finish, Request, RowOutput, RowPurpose, StepOutput, Usage};
use support::{Driver, EOS, config, request, spec, valid};
use types::{GenerationSpec, TokenId};

const STOP: TokenId = TokenId(55);

/// Runs one request whose draws are `draws`, in order.
fn run(spec: GenerationSpec, draws: &[TokenId]) -> Driver {
    let mut driver = Driver::new(config());
    driver.submit(1, Request { generation: valid(spec), ..request(1, 4, 1) });
    let mut draws = draws.iter();
    while let Some(step) = driver.plan() {
        driver.answer(&step, |_| *draws.next().expect("it should have ended"));
    }
    assert_eq!(draws.next(), None, "it ended too early");
    driver
}

#[test]
fn an_end_of_sequence_token_ends_it_and_is_delivered() {
    let driver = run(spec(10), &[TokenId(50), EOS]);
    assert_eq!(driver.tokens(1), [TokenId(50), EOS]);
    assert_eq!(driver.finish(1), Some(Finish::Eos(EOS)));
}

#[test]
fn an_ignored_end_of_sequence_token_is_an_ordinary_one() {
    let driver = run(GenerationSpec { ignore_eos: true, ..spec(3) }, &[EOS, EOS, EOS]);
    assert_eq!(driver.finish(1), Some(Finish::Length));
}

#[test]
fn a_stop_token_ends_it_and_is_delivered() {
    let stops = GenerationSpec { stop_token_ids: vec![STOP.0], ..spec(10) };
    let driver = run(stops.clone(), &[TokenId(50), STOP]);
    assert_eq!((driver.tokens(1).len(), driver.finish(1)), (2, Some(Finish::StopToken(STOP))));
    let both = run(stops, &[EOS]);
    assert_eq!(both.finish(1), Some(Finish::Eos(EOS)));
}

#[test]
fn a_stop_token_counts_even_where_end_of_sequence_is_ignored() {
    let spec = GenerationSpec { stop_token_ids: vec![EOS.0], ignore_eos: true, ..spec(10) };
    assert_eq!(run(spec, &[EOS]).finish(1), Some(Finish::StopToken(EOS)));
}

#[test]
fn max_tokens_ends_it() {
    let driver = run(spec(2), &[TokenId(50), TokenId(51)]);
    assert_eq!(driver.finish(1), Some(Finish::Length));
    let usage = driver.effects.iter().find_map(|effect| match effect {
        Effect::Finished { usage, .. } => Some(*usage),
        _ => None,
    });
    assert_eq!(usage, Some(Usage { prompt_tokens: 4, cached_tokens: 0, output_tokens: 2 }));
}

#[test]
fn a_stop_token_at_the_last_place_is_a_stop_and_not_a_length() {
    assert_eq!(run(spec(2), &[TokenId(50), EOS]).finish(1), Some(Finish::Eos(EOS)));
}

#[test]
fn the_end_of_the_context_ends_it() {
    let mut driver = Driver::new(Config { context_tokens_max: 10, ..config() });
    driver.submit(1, request(1, 6, 100));
    driver.run();
    assert_eq!(driver.tokens(1).len(), 4);
    assert_eq!(driver.finish(1), Some(Finish::Length));
}

#[test]
fn stop_tokens_are_banned_until_min_tokens_are_drawn() {
    let mut driver = Driver::new(config());
    let spec = GenerationSpec { min_tokens: Some(2), stop_token_ids: vec![STOP.0], ..spec(4) };
    driver.submit(1, Request { generation: valid(spec), ..request(1, 4, 1) });
    let mut banned_at = Vec::new();
    while let Some(step) = driver.plan() {
        let RowPurpose::Sample { banned, .. } = &step.work[0].purpose else { panic!("a sampling row") };
        banned_at.push(banned.to_vec());
        driver.answer(&step, |_| TokenId(50));
    }
    let both = vec![EOS, STOP];
    assert_eq!(banned_at, [both.clone(), both, vec![], vec![]]);
}

#[test]
#[should_panic(expected = "although it was banned")]
fn a_banned_token_that_is_drawn_all_the_same_is_a_bug() {
    run(GenerationSpec { min_tokens: Some(2), ..spec(4) }, &[EOS]);
}

#[test]
fn sampling_rows_carry_the_parameters_and_the_generator_position() {
    let mut driver = Driver::new(config());
    let spec = GenerationSpec { seed: Some(9), temperature: Some(0.5), logprobs: Some(3), ..spec(3) };
    driver.submit(1, Request { generation: valid(spec), ..request(1, 4, 1) });
    for expected in 0..3 {
        let step = driver.step();
        let RowPurpose::Sample { params, position, logprobs, .. } = &step.work[0].purpose else {
            panic!("a sampling row")
        };
        assert_eq!((params.seed(), params.temperature(), *position), (9, 0.5, expected));
        assert_eq!(logprobs.map(types::Logprobs::top), Some(3));
    }
    let with_logprob = driver.effects.iter().filter(|e| matches!(e, Effect::Token { logprob: Some(_), .. }));
    assert_eq!(with_logprob.count(), 3);
}

#[test]
fn logits_that_are_not_numbers_end_that_sequence_only() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 4, 3));
    driver.submit(2, request(2, 4, 3));
    let step = driver.plan().unwrap();
    let rows = vec![RowOutput::NotANumber, RowOutput::Sampled { token: TokenId(50), logprob: None }];
    driver.apply(Event::StepDone(StepOutput { step: step.plan.step(), rows }));
    assert_eq!(driver.finish(1), Some(Finish::NotANumber));
    driver.run();
    assert_eq!(driver.finish(2), Some(Finish::Length));
}
