//! Who runs in a step: sequences join and leave at any step, prompts are computed in chunks beside decoding.

mod support;

use engine::{Config, Request, RowPurpose, StepPlan};
use support::{Driver, config, known, prompt, request, rows, spec, valid};
use types::{GenerationSpec, Position, SlotId, TokenId};

fn slots(plan: &StepPlan) -> Vec<u32> {
    plan.sequences().map(|s| s.slot.0).collect()
}

#[test]
fn an_idle_engine_plans_nothing() {
    let mut driver = Driver::new(config());
    assert_eq!(driver.plan(), None);
    driver.submit(1, request(0, 3, 1));
    driver.run();
    assert_eq!(driver.plan(), None);
    assert!(driver.engine.is_idle());
}

#[test]
fn a_prompt_and_then_each_token_are_inputs_at_consecutive_positions() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(3, 5, 3));
    let mut inputs = Vec::new();
    let mut next = 10;
    while let Some(step) = driver.plan() {
        for sequence in step.plan.sequences() {
            assert_eq!(sequence.start, Position(u32::try_from(inputs.len()).unwrap()));
            inputs.extend(known(sequence.inputs));
        }
        driver.answer(&step, |_| {
            next += 1;
            TokenId(next)
        });
    }
    let mut expected = prompt(3, 5);
    expected.extend([TokenId(11), TokenId(12)]);
    assert_eq!(inputs, expected, "the last token is no input");
    assert_eq!(driver.tokens(1), [11, 12, 13].map(TokenId));
}

#[test]
fn a_request_joins_the_running_batch_at_the_next_step() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 4, 10));
    driver.step();
    driver.submit(2, request(2, 6, 10));
    let step = driver.step();
    assert_eq!(rows(&step), [1, 6], "a decode row and a whole prompt in one step");
    assert_eq!(rows(&driver.step()), [1, 1]);
}

#[test]
fn a_finished_sequence_leaves_at_once_and_its_slot_is_used_again() {
    let mut driver = Driver::new(Config { running_max: 2, ..config() });
    driver.submit(1, request(1, 2, 1));
    driver.submit(2, request(2, 2, 5));
    driver.submit(3, request(3, 2, 5));
    assert_eq!(slots(&driver.step().plan), [0, 1]);
    let step = driver.step();
    assert_eq!(step.plan.released(), [SlotId(0)], "the plan that uses the slot again releases it first");
    assert_eq!(slots(&step.plan), [1, 0]);
}

#[test]
fn a_long_prompt_is_computed_in_chunks_within_the_budget() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 40, 2));
    let chunks: Vec<_> = (0..4).map(|_| rows(&driver.step())).collect();
    assert_eq!(chunks, [vec![16], vec![16], vec![8], vec![1]]);
    assert_eq!(driver.tokens(1).len(), 2);
}

#[test]
fn only_the_last_row_of_the_last_chunk_draws_a_token() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 20, 1));
    let first = driver.step();
    assert_eq!((first.plan.logit_rows().count(), first.work.len()), (0, 0));
    let last = driver.step();
    assert_eq!(last.plan.logit_rows().collect::<Vec<_>>(), [3]);
    assert!(matches!(last.work[0].purpose, RowPurpose::Sample { position: 0, .. }));
}

#[test]
fn decoding_goes_on_while_a_prompt_is_computed() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 2, 20));
    driver.submit(2, request(2, 2, 20));
    driver.step();
    driver.submit(3, request(3, 40, 2));
    for _ in 0..2 {
        assert_eq!(rows(&driver.step()), [1, 1, 14], "the prompt takes what decoding leaves");
    }
    assert_eq!(rows(&driver.step()), [1, 1, 12]);
}

#[test]
fn an_older_prompt_leaves_younger_decoders_their_row() {
    // Prompt log-probabilities hold the first to the logit rows there are, so the second overtakes it.
    let mut driver = Driver::new(Config { logit_rows_max: 4, ..config() });
    let slow = GenerationSpec { prompt_logprobs: Some(0), ..spec(1) };
    driver.submit(1, Request { generation: valid(slow), ..request(1, 20, 1) });
    driver.submit(2, request(2, 12, 9));
    let steps: Vec<_> = (0..5).map(|_| rows(&driver.step())).collect();
    assert_eq!(steps, [[4, 11], [3, 1], [3, 1], [3, 1], [3, 1]]);
    assert_eq!(driver.tokens(2).len(), 4);
}

#[test]
fn requests_start_in_the_order_they_came() {
    let mut driver = Driver::new(Config { step_tokens_max: 4, ..config() });
    for seq in 1..=3 {
        driver.submit(seq, request(0, 4, 1));
    }
    let first: Vec<_> = (0..3).map(|_| driver.step().work[0].seq.0).collect();
    assert_eq!(first, [1, 2, 3]);
}

#[test]
fn the_same_events_give_the_same_plans() {
    let run = || {
        let mut driver = Driver::new(Config { blocks: [14, 12], ..config() });
        for seq in 1..=8 {
            driver.submit(seq, request(seq as u32, 5 + seq as u32, 9));
        }
        let mut bytes = Vec::new();
        while let Some(step) = driver.plan() {
            step.plan.encode(&mut bytes);
            driver.answer(&step, |_| TokenId(50));
        }
        (bytes, driver.effects)
    };
    assert_eq!(run(), run());
}

#[test]
fn the_same_buffers_serve_every_step() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 4, 30));
    let mut step = driver.plan().unwrap();
    for _ in 0..20 {
        driver.answer(&step, |_| TokenId(50));
        assert!(driver.engine.plan_into(driver.now, &mut step, &mut driver.effects));
        assert_eq!((rows(&step), step.work.len()), (vec![1], 1), "nothing of the step before is left");
    }
}

#[test]
fn the_load_counts_what_runs_waits_and_is_held() {
    let mut driver = Driver::new(Config { running_max: 1, ..config() });
    driver.submit(1, request(1, 9, 5));
    driver.submit(2, request(2, 6, 5));
    driver.step();
    let load = driver.engine.load();
    assert_eq!((load.running, load.waiting, load.waiting_tokens), (1, 1, 6));
    assert_eq!((load.blocks_used, load.blocks), ([3, 3], [64, 64]));
}
