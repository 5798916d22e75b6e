//! Several sequences of one request: one prompt, computed once, and a generator stream for each.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use std::collections::BTreeMap;

use engine::{Config, Effect, Event, Finish, PrefixReuse, Request, RequestOptions, RowPurpose};
use support::{Driver, config, request, rows, spec, valid};
use types::{GenerationSpec, SeqId};

fn several(n: u32, prompt_tokens: u32, max_tokens: u32) -> Request {
    let spec = GenerationSpec { n: Some(n), ..spec(max_tokens) };
    Request { generation: valid(spec), ..request(1, prompt_tokens, max_tokens) }
}

#[test]
fn each_sequence_has_an_id_a_stream_and_an_end_of_its_own() {
    let mut driver = Driver::new(config());
    driver.submit(10, several(3, 6, 4));
    let mut streams = BTreeMap::new();
    while let Some(step) = driver.plan() {
        for work in &step.work {
            let RowPurpose::Sample { stream, .. } = work.purpose else { panic!("only draws") };
            streams.insert(work.seq.0, stream);
        }
        driver.answer(&step, |_| types::TokenId(50));
    }
    assert_eq!(streams, BTreeMap::from([(10, 0), (11, 1), (12, 2)]));
    assert!((10..13).all(|seq| driver.tokens(seq).len() == 4 && driver.finish(seq) == Some(Finish::Length)));
}

#[test]
fn the_prompt_is_computed_once_and_the_partial_block_by_each() {
    let mut driver = Driver::new(config());
    driver.submit(1, several(3, 30, 4));
    let steps: Vec<_> = (0..3).map(|_| rows(&driver.step())).collect();
    assert_eq!(steps, [vec![16], vec![14], vec![1, 2, 2]]);
    assert_eq!(driver.cached(2), [28]);
    let used = driver.used();
    assert!(used[0] <= 7 + 3 + 3, "seven shared full blocks and the ends, not {used:?}");
}

#[test]
fn sequences_share_even_when_the_request_shares_with_nobody() {
    let mut driver = Driver::new(config());
    let options = RequestOptions { reuse: PrefixReuse::Bypass, ..RequestOptions::default() };
    driver.submit(1, Request { options: options.clone(), ..several(2, 18, 2) });
    driver.run();
    assert_eq!((driver.cached(1), driver.cached(2)), (vec![0], vec![16]));
    driver.submit(3, Request { options, ..several(2, 18, 2) });
    driver.submit(5, request(1, 18, 2));
    driver.run();
    assert_eq!((driver.cached(3), driver.cached(5)), (vec![0], vec![0]));
}

#[test]
fn the_next_sequence_computes_the_prompt_when_the_first_is_cancelled() {
    let mut driver = Driver::new(config());
    driver.submit(1, several(3, 40, 2));
    driver.step();
    driver.apply(Event::Cancel(SeqId(1)));
    driver.run();
    assert_eq!(driver.finish(1), Some(Finish::Cancelled));
    assert_eq!(driver.cached(3), [36], "the third found what the second computed");
    assert_eq!((driver.tokens(2).len(), driver.tokens(3).len()), (2, 2));
}

#[test]
fn cancelling_a_sequence_that_waits_leaves_the_others() {
    let mut driver = Driver::new(config());
    driver.submit(1, several(3, 40, 2));
    driver.step();
    driver.apply(Event::Cancel(SeqId(2)));
    driver.run();
    assert_eq!((driver.tokens(1).len(), driver.tokens(2).len(), driver.tokens(3).len()), (2, 0, 2));
}

#[test]
fn only_the_first_sequence_reports_the_prompt() {
    let mut driver = Driver::new(config());
    let spec = GenerationSpec { n: Some(2), prompt_logprobs: Some(0), ..spec(2) };
    driver.submit(1, Request { generation: valid(spec), ..request(1, 18, 2) });
    driver.run();
    let lists = driver.effects.iter().filter_map(|effect| match effect {
        Effect::PromptLogprobs { seq, logprobs } => Some((seq.0, logprobs.len())),
        _ => None,
    });
    assert_eq!(lists.collect::<Vec<_>>(), [(1, 17)]);
    assert_eq!(driver.cached(2), [16]);
}

#[test]
fn every_sequence_counts_in_the_queue_and_each_is_refused_with_its_request() {
    let mut driver = Driver::new(Config { waiting_requests_max: 3, ..config() });
    driver.submit(1, several(2, 4, 2));
    driver.submit(3, several(2, 4, 2));
    let refused = driver.effects.iter().filter(|effect| matches!(effect, Effect::Refused { .. }));
    assert_eq!(refused.count(), 2);
    assert!(driver.refusal(3).is_some() && driver.refusal(4).is_some());
    driver.submit(5, request(1, 4, 2));
    driver.run();
    assert_eq!(driver.tokens(5).len(), 2);
}
