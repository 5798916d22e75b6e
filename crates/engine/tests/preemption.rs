//! When blocks run out the youngest sequence is computed again later, and its caller sees no gap and no repeat.

mod support;

use engine::{Config, Effect, PrefixReuse, Request, RequestOptions, RowPurpose};
use support::{Driver, config, known, prompt, request};
use types::{GenerationSpec, SeqId, TokenId};

/// A request that finds nothing in the prefix tree when it starts again.
fn alone(tag: u32) -> Request {
    let options = RequestOptions { reuse: PrefixReuse::Bypass, ..RequestOptions::default() };
    Request { options, ..request(tag, 8, 16) }
}

/// Two sequences that fit at first and cannot both finish: each may hold 6 of 8 blocks.
fn tight() -> Driver {
    let mut driver = Driver::new(Config { blocks: [8, 0], step_tokens_max: 32, ..config() });
    driver.submit(1, alone(1));
    driver.submit(2, alone(2));
    driver
}

fn preempted(driver: &Driver) -> Vec<u64> {
    let ids = driver.effects.iter().filter_map(|effect| match effect {
        Effect::Preempted { seq } => Some(seq.0),
        _ => None,
    });
    ids.collect()
}

/// Token number `n` of each sequence, so that a repeat or a gap shows.
fn numbered(driver: &mut Driver) {
    let mut drawn = [0; 3];
    while let Some(step) = driver.plan() {
        driver.answer(&step, |seq: SeqId| {
            drawn[seq.0 as usize] += 1;
            TokenId(100 * seq.0 as u32 + drawn[seq.0 as usize])
        });
    }
}

#[test]
fn the_youngest_gives_way_and_no_token_is_lost_or_repeated() {
    let mut driver = tight();
    numbered(&mut driver);
    assert_eq!(preempted(&driver), [2], "the older one is never preempted, the younger once");
    for seq in [1, 2] {
        let expected: Vec<_> = (1..=16).map(|n| TokenId(100 * seq + n)).collect();
        assert_eq!(driver.tokens(seq.into()), expected);
    }
    assert_eq!(driver.used(), [0, 0]);
}

#[test]
fn a_preempted_sequence_is_computed_again_with_what_it_generated() {
    let mut driver = tight();
    while preempted(&driver).is_empty() {
        driver.step();
    }
    let generated = driver.tokens(2);
    assert!(!generated.is_empty());
    let again = loop {
        let step = driver.plan().unwrap();
        if step.plan.sequences().any(|s| s.start.0 == 0) {
            break step;
        }
        driver.answer(&step, |_| TokenId(50));
    };
    let sequence = again.plan.sequences().find(|s| s.start.0 == 0).unwrap();
    let mut expected = prompt(2, 8);
    expected.extend(&generated);
    assert_eq!(known(sequence.inputs), expected, "one chunk with everything that is known");
    assert_eq!(sequence.logit_rows, 1, "only the next token is drawn");
    let position = u32::try_from(generated.len()).unwrap();
    let goes_on = again.work.iter().any(|work| {
        work.seq == SeqId(2)
            && matches!(work.purpose, RowPurpose::Sample { position: p, .. } if p == position)
    });
    assert!(goes_on, "the generator goes on at position {position}");
}

#[test]
fn a_preempted_sequence_starts_before_those_that_waited_already() {
    let mut driver = tight();
    driver.submit(3, request(3, 24, 1));
    driver.run();
    assert_eq!(preempted(&driver), [2]);
    let finished = driver.effects.iter().filter_map(|effect| match effect {
        Effect::Finished { seq, .. } => Some(seq.0),
        _ => None,
    });
    assert_eq!(finished.collect::<Vec<_>>(), [1, 2, 3]);
}

#[test]
fn prompt_logprobs_gathered_before_a_preemption_are_not_asked_for_again() {
    // 20 prompt tokens at 1 logit row a step, beside a sequence that grows into its blocks.
    let mut driver = Driver::new(Config { blocks: [9, 0], running_max: 2, logit_rows_max: 2, ..config() });
    driver.submit(1, request(1, 4, 30));
    driver.step();
    let spec = GenerationSpec { max_tokens: Some(2), prompt_logprobs: Some(0), ..GenerationSpec::default() };
    let with_logprobs = Request { generation: support::valid(spec), ..request(2, 20, 2) };
    driver.submit(2, with_logprobs);
    let mut asked = Vec::new();
    while let Some(step) = driver.plan() {
        asked.extend(step.work.iter().filter_map(|work| match work.purpose {
            RowPurpose::PromptLogprob { position, .. } => Some(position.0),
            RowPurpose::Sample { .. } => None,
        }));
        driver.answer(&step, |_| TokenId(50));
    }
    let effect_at = |wanted: fn(&Effect) -> bool| driver.effects.iter().position(wanted);
    let preempted = effect_at(|effect| matches!(effect, Effect::Preempted { seq: SeqId(2) }));
    let delivered = effect_at(|effect| matches!(effect, Effect::PromptLogprobs { .. }));
    assert!(preempted.is_some() && preempted < delivered, "preempted in the middle of its prompt");
    assert_eq!(asked, (1..20).collect::<Vec<_>>(), "each position once");
    let lists = driver.effects.iter().filter(|effect| matches!(effect, Effect::PromptLogprobs { .. }));
    assert_eq!(lists.count(), 1);
    assert_eq!(driver.tokens(2).len(), 2);
}
