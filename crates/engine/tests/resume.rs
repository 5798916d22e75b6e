//! A sequence that was begun elsewhere goes on exactly where it was.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use engine::{Config, Effect, Finish, Request, RequestOptions, RowPurpose};
use support::{Driver, EOS, VOCAB, config, known, prompt, request, spec, valid};
use types::{GenerationSpec, TokenId};

fn resumed(tokens: &[u32], spec: GenerationSpec) -> Request {
    let resume_tokens = tokens.iter().copied().map(TokenId).collect();
    let options = RequestOptions { resume_tokens, ..RequestOptions::default() };
    Request { options, generation: valid(spec), ..request(1, 6, 1) }
}

fn refused(request: Request) -> String {
    let mut driver = Driver::new(config());
    driver.submit(1, request);
    driver.refusal(1).expect("it is refused")
}

#[test]
fn only_new_tokens_are_emitted_and_usage_counts_all() {
    let mut driver = Driver::new(config());
    driver.submit(1, resumed(&[50, 51, 52], spec(5)));
    driver.run();
    assert_eq!(driver.tokens(1).len(), 2);
    assert_eq!(driver.finish(1), Some(Finish::Length));
    let usage = driver.usage(1).unwrap();
    assert_eq!((usage.prompt_tokens, usage.output_tokens), (6, 5));
}

#[test]
fn the_generator_goes_on_at_its_position_and_stream() {
    let mut driver = Driver::new(config());
    let mut request = resumed(&[50, 51, 52], spec(5));
    request.options.first_stream = 4;
    driver.submit(1, request);
    let step = driver.step();
    let inputs = [prompt(1, 6), [50, 51, 52].map(TokenId).to_vec()].concat();
    assert_eq!(known(step.plan.inputs()), inputs);
    assert!(matches!(step.work[..], [ref work] if matches!(work.purpose,
        RowPurpose::Sample { position: 3, stream: 4, .. })));
}

#[test]
fn min_tokens_counts_what_was_there() {
    let mut driver = Driver::new(config());
    driver.submit(1, resumed(&[50, 51], GenerationSpec { min_tokens: Some(3), ..spec(6) }));
    let mut early = Vec::new();
    while let Some(step) = driver.plan() {
        let RowPurpose::Sample { banned, .. } = &step.work[0].purpose else { panic!("a draw") };
        early.push(!banned.is_empty());
        driver.answer(&step, |_| TokenId(50));
    }
    assert_eq!(early, [true, false, false, false]);
}

#[test]
fn penalties_see_the_tokens_that_were_there() {
    let mut driver = Driver::new(config());
    driver.submit(1, resumed(&[50, 50], GenerationSpec { frequency_penalty: Some(1.0), ..spec(4) }));
    driver.step();
    let step = driver.plan().unwrap();
    let RowPurpose::Sample { history: Some(history), .. } = &step.work[0].purpose else {
        panic!("a draw with a history")
    };
    let history = history.snapshot();
    assert_eq!(history.generated(), [50, 50, 50].map(TokenId));
    assert_eq!(history.seen().find(|(token, _)| token.0 == 50), Some((TokenId(50), 3)));
    assert_eq!(history.seen().filter(|(_, times)| *times == 0).count(), 6, "the prompt");
}

#[test]
fn prompt_logprobs_have_been_delivered_before() {
    let mut driver = Driver::new(config());
    driver.submit(1, resumed(&[50], GenerationSpec { prompt_logprobs: Some(1), ..spec(3) }));
    driver.run();
    assert!(!driver.effects.iter().any(|effect| matches!(effect, Effect::PromptLogprobs { .. })));
    assert_eq!(driver.tokens(1).len(), 2);
}

#[test]
fn what_cannot_go_on_is_refused_with_the_reason() {
    let text = refused(resumed(&[50, VOCAB], spec(5)));
    assert!(text.contains("resume token 1 is 1000") && text.contains("vocabulary size 1000"), "{text}");
    let text = refused(resumed(&[50, EOS.0], spec(5)));
    assert!(text.contains("resume token 1 is 7, which ends the sequence"), "{text}");
    let text = refused(resumed(&[50, 50], spec(2)));
    assert!(text.contains("2 resume tokens leave nothing"), "{text}");
    let text = refused(resumed(&[50], GenerationSpec { n: Some(2), ..spec(5) }));
    assert!(text.contains("the request is for 2"), "{text}");
    let mut stream = resumed(&[], spec(5));
    stream.options.first_stream = 128;
    assert!(refused(stream).contains("below 128"));
}

#[test]
fn a_full_context_leaves_nothing_to_resume() {
    let mut driver = Driver::new(Config { context_tokens_max: 8, ..config() });
    driver.submit(1, resumed(&[50, 51], spec(5)));
    assert!(driver.refusal(1).unwrap().contains("may have 2 tokens"));
}

#[test]
fn stops_that_are_all_that_is_allowed_contradict_min_tokens() {
    let only_eos = GenerationSpec { allowed_token_ids: vec![EOS.0], ..spec(5) };
    let text = refused(resumed(&[], GenerationSpec { min_tokens: Some(1), ..only_eos.clone() }));
    assert!(text.contains("min_tokens is 1"), "{text}");
    let mut driver = Driver::new(config());
    driver.submit(1, resumed(&[], only_eos));
    assert_eq!(driver.refusal(1), None);
}
