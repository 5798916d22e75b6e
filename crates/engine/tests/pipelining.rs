//! A step is planned while the one before runs: what is not known yet is named, and what turns out not to be wanted is
//! dropped without trace.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use engine::{Config, Drawn, Effect, Error, Event, Finish, Input, RowOutput, SlotTables, Step, StepOutput};
use support::{Driver, EOS, config, known, request, rows, spec, valid};
use types::{GenerationSpec, SeqId, TokenId};

fn drawn(token: u32) -> RowOutput {
    RowOutput::Sampled { token: TokenId(token), logprob: None }
}

/// Runs to the end with two steps in flight; the steps, in order.
fn run(driver: &mut Driver, mut token: impl FnMut(SeqId) -> TokenId) -> Vec<Step> {
    let (mut steps, mut flying) = (Vec::new(), Vec::new());
    loop {
        while flying.len() < 2
            && let Some(step) = driver.plan()
        {
            flying.push(step);
        }
        if flying.is_empty() {
            return steps;
        }
        let step = flying.remove(0);
        driver.answer(&step, &mut token);
        steps.push(step);
    }
}

#[test]
fn the_next_input_is_named_by_the_row_that_draws_it() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 3, 4));
    driver.submit(2, request(2, 5, 4));
    let first = driver.plan().unwrap();
    let second = driver.plan().unwrap();
    assert_eq!(rows(&first), [3, 5]);
    assert_eq!(second.plan.inputs(), [Input::Drawn { row: 0 }, Input::Drawn { row: 1 }]);
    driver.answer(&first, |seq| TokenId(60 + seq.0 as u32));
    driver.answer(&second, |_| TokenId(50));
    let third = driver.plan().unwrap();
    assert_eq!(known(third.plan.inputs()), [50, 50].map(TokenId), "what is known is not named");
    assert_eq!(
        (driver.tokens(1), driver.tokens(2)),
        ([61, 50].map(TokenId).into(), [62, 50].map(TokenId).into())
    );
}

#[test]
fn no_row_is_planned_beyond_the_last_token() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 3, 2));
    let steps = [driver.plan().unwrap(), driver.plan().unwrap()];
    steps.iter().for_each(|step| driver.answer(step, |_| TokenId(50)));
    assert_eq!(driver.plan(), None);
    assert_eq!((driver.tokens(1).len(), driver.finish(1)), (2, Some(Finish::Length)));
}

#[test]
fn nothing_is_planned_when_steps_in_flight_draw_all_there_is() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 3, 1));
    let step = driver.plan().unwrap();
    assert_eq!(driver.plan(), None, "the only token is being drawn");
    assert!(!driver.engine.is_idle());
    driver.answer(&step, |_| TokenId(50));
    assert!(driver.engine.is_idle());
}

#[test]
fn a_row_behind_the_end_is_dropped_without_trace() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 4, 9));
    driver.submit(2, request(2, 4, 9));
    let [first, second] = [driver.plan().unwrap(), driver.plan().unwrap()];
    driver.answer(&first, |seq| if seq.0 == 1 { EOS } else { TokenId(50) });
    let (finished, used) = (driver.finish(1), driver.used());
    assert_eq!(finished, Some(Finish::Eos(EOS)));
    let third = driver.plan().unwrap();
    assert_eq!(third.plan.released().len(), 1, "its slot is named although a row of it runs");
    driver.answer(&second, |_| TokenId(51));
    assert_eq!((driver.tokens(1), driver.usage(1).unwrap().output_tokens), (vec![EOS], 1));
    assert_eq!(driver.tokens(2), [50, 51].map(TokenId));
    assert!(driver.used()[0] <= used[0] + 1, "its blocks were free at once");
}

#[test]
fn a_cancel_while_two_steps_run_leaves_nothing() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 4, 9));
    let steps = [driver.plan().unwrap(), driver.plan().unwrap()];
    driver.apply(Event::Cancel(SeqId(1)));
    assert!(driver.engine.is_idle());
    assert_eq!(driver.used(), [0, 0]);
    steps.iter().for_each(|step| driver.answer(step, |_| TokenId(50)));
    assert_eq!(driver.tokens(1), []);
    assert_eq!(driver.engine.steps_in_flight(), 0);
}

#[test]
fn a_sequence_that_gives_way_keeps_the_token_that_is_being_drawn() {
    let mut driver = Driver::new(Config { blocks: [8, 0], ..config() });
    driver.submit(1, request(1, 8, 16));
    driver.submit(2, request(2, 8, 16));
    let mut next = [100, 200];
    let steps = run(&mut driver, |seq| {
        let next = &mut next[seq.0 as usize - 1];
        *next += 1;
        TokenId(*next)
    });
    assert!(driver.effects.contains(&Effect::Preempted { seq: SeqId(2) }), "it had to give way");
    assert!(
        steps.iter().flat_map(|step| step.plan.inputs()).any(|input| matches!(input, Input::Drawn { .. }))
    );
    assert_eq!(driver.tokens(1), (101..117).map(TokenId).collect::<Vec<_>>());
    assert_eq!(driver.tokens(2), (201..217).map(TokenId).collect::<Vec<_>>(), "none lost, none repeated");
}

#[test]
fn min_tokens_and_the_generator_count_tokens_that_are_not_known_yet() {
    let mut driver = Driver::new(config());
    let generation = valid(GenerationSpec { min_tokens: Some(2), ..spec(4) });
    driver.submit(1, engine::Request { generation, ..request(1, 4, 4) });
    let steps = run(&mut driver, |_| TokenId(50));
    let purposes: Vec<_> = steps.iter().map(|step| &step.work[0].purpose).collect();
    let seen: Vec<_> = purposes
        .iter()
        .map(|purpose| match purpose {
            engine::RowPurpose::Sample { position, banned, .. } => (*position, !banned.is_empty()),
            engine::RowPurpose::PromptLogprob { .. } => panic!("nobody asked"),
        })
        .collect();
    assert_eq!(seen, [(0, true), (1, true), (2, false), (3, false)]);
}

#[test]
fn what_is_not_a_number_ends_its_sequence_although_a_later_row_runs() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 4, 5));
    driver.submit(2, request(2, 4, 5));
    let [first, second] = [driver.plan().unwrap(), driver.plan().unwrap()];
    driver.apply(Event::StepDone(StepOutput { step: 1, rows: vec![RowOutput::NotANumber, drawn(50)] }));
    assert_eq!(driver.finish(1), Some(Finish::NotANumber));
    driver.apply(Event::StepDone(StepOutput { step: 2, rows: vec![RowOutput::NotANumber, drawn(51)] }));
    assert_eq!((driver.tokens(1).len(), driver.tokens(2)), (0, [50, 51].map(TokenId).into()));
    assert_eq!((first.work.len(), second.work.len()), (2, 2));
}

#[test]
fn every_rank_puts_the_tokens_of_the_step_before_where_they_are_named() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 3, 4));
    driver.submit(2, request(2, 2, 4));
    let [first, second] = [driver.plan().unwrap(), driver.plan().unwrap()];
    let mut tables = SlotTables::new(&config()).unwrap();
    let (mut tokens, mut last) = (Vec::new(), Drawn::default());
    tables.apply(&first.plan).unwrap();
    tables.resolve(&first.plan, &last, &mut tokens).unwrap();
    assert_eq!(tokens, known(first.plan.inputs()));
    tables.apply(&second.plan).unwrap();
    let early = tables.resolve(&second.plan, &last, &mut tokens);
    assert_eq!(early, Err(Error::DrawnStep { got: 0, expected: 1 }));
    last.take(1, &[drawn(77), RowOutput::NotANumber]);
    tables.resolve(&second.plan, &last, &mut tokens).unwrap();
    assert_eq!(tokens, [77, 0].map(TokenId), "a row without a token has an input nobody cares for");
    last.take(1, &[drawn(77), drawn(1000)]);
    let error = tables.resolve(&second.plan, &last, &mut tokens).unwrap_err().to_string();
    assert!(error.contains("a drawn token = 1000"), "{error}");
}

#[test]
fn a_plan_that_names_a_row_the_step_before_did_not_have_is_refused() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 3, 4));
    driver.submit(2, request(2, 2, 4));
    let [first, second] = [driver.plan().unwrap(), driver.plan().unwrap()];
    let mut alone = Driver::new(config());
    alone.submit(1, request(1, 3, 4));
    let other = alone.plan().unwrap();
    let mut tables = SlotTables::new(&config()).unwrap();
    assert_eq!((first.plan.step(), other.plan.step()), (1, 1));
    tables.apply(&other.plan).unwrap();
    let error = tables.apply(&second.plan).unwrap_err().to_string();
    assert!(error.contains("a row of the step before, counted from 1 = 2, and must have 0 to 1"), "{error}");
}
