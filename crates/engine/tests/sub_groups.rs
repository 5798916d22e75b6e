//! Sub-groups with sequences, blocks and budgets of their own: who runs where.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use std::collections::BTreeMap;

use engine::{Config, Effect, Input, SlotTables, Step};
use support::{Driver, config, request, rows};
use types::{SeqId, TokenId};

fn groups(data_parallel: u32) -> Config {
    Config { data_parallel, ..config() }
}

/// The sub-group of each sequence that draws in `step`.
fn places(config: &Config, step: &Step) -> BTreeMap<u64, u32> {
    let draws = step.plan.sequences().filter(|one| one.logit_rows > 0);
    draws.zip(&step.work).map(|(one, work)| (work.seq.0, config.sub_group(one.slot))).collect()
}

#[test]
fn requests_are_spread_over_the_sub_groups() {
    let config = groups(4);
    let mut driver = Driver::new(config.clone());
    for seq in 1..=6 {
        driver.submit(seq, request(seq as u32, 3, 4));
    }
    let placed = places(&config, &driver.step());
    assert_eq!(placed, BTreeMap::from([(1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (6, 1)]));
}

#[test]
fn budgets_slots_and_blocks_are_each_sub_groups_own() {
    let config = groups(2);
    let mut driver = Driver::new(config.clone());
    driver.submit(1, request(1, 20, 2));
    driver.submit(2, request(2, 20, 2));
    let step = driver.step();
    assert_eq!(step.plan.inputs().len(), 32, "a whole step of each");
    let load = driver.engine.load();
    assert_eq!((load.blocks, load.blocks_used), ([128, 128], [8, 8]));
    for seq in 3..=10 {
        driver.submit(seq, request(seq as u32, 1, 9));
    }
    (0..4).for_each(|_| _ = driver.step());
    assert_eq!(driver.engine.load().running, 8, "four slots of each");
}

#[test]
fn a_known_prefix_draws_a_request_to_where_it_is() {
    let config = Config { step_tokens_max: 600, context_tokens_max: 700, blocks: [400, 400], ..groups(2) };
    let config = Config { waiting_tokens_max: 2000, window_keys: 600, ..config };
    let mut driver = Driver::new(config.clone());
    driver.submit(1, request(1, 300, 1));
    driver.run();
    driver.submit(2, request(2, 3, 20));
    let other = places(&config, &driver.step());
    assert_eq!(other[&2], 0, "equal costs: the first");
    driver.submit(3, request(1, 300, 20));
    let placed = places(&config, &driver.step());
    assert_eq!((placed[&3], driver.cached(3)), (0, vec![296]), "300 tokens outweigh a running sequence");
    for seq in 4..=5 {
        driver.submit(seq, request(1, 30, 20));
        driver.step();
    }
    let placed = places(&config, &driver.step());
    assert_eq!((placed[&4], placed[&5]), (1, 1), "30 tokens do not");
}

#[test]
fn a_request_waits_a_step_rather_than_compute_a_long_prompt_again_elsewhere() {
    let config = Config { step_tokens_max: 8, context_tokens_max: 700, blocks: [400, 400], ..groups(2) };
    let config = Config { waiting_tokens_max: 2000, window_keys: 600, logit_rows_max: 8, ..config };
    let mut driver = Driver::new(config.clone());
    driver.submit(1, request(1, 300, 1));
    driver.run();
    driver.submit(2, request(2, 12, 4));
    driver.submit(3, request(1, 300, 4));
    assert_eq!(rows(&driver.step()), [8], "the first takes all rows of the sub-group that knows the prompt");
    let placed = places(&config, &driver.step());
    assert_eq!((placed, driver.cached(3)), (BTreeMap::from([(2, 0), (3, 0)]), vec![296]));
}

#[test]
fn a_sub_group_with_nothing_to_do_is_in_no_row_of_the_step_that_all_share() {
    let config = groups(2);
    let mut driver = Driver::new(config.clone());
    driver.submit(1, request(1, 3, 3));
    let step = driver.step();
    assert!(step.plan.sequences().all(|one| config.sub_group(one.slot) == 0));
    let mut tables = SlotTables::new(&config).unwrap();
    tables.apply(&step.plan).unwrap();
}

#[test]
fn a_row_of_another_sub_group_is_named_by_its_place_among_all() {
    let config = groups(2);
    let mut driver = Driver::new(config);
    driver.submit(1, request(1, 3, 3));
    driver.submit(2, request(2, 3, 3));
    let [first, second] = [driver.plan().unwrap(), driver.plan().unwrap()];
    assert_eq!(second.plan.inputs(), [Input::Drawn { row: 0 }, Input::Drawn { row: 1 }]);
    driver.answer(&first, |_| TokenId(50));
    driver.answer(&second, |_| TokenId(50));
}

#[test]
fn giving_way_concerns_one_sub_group_only() {
    let config = Config { blocks: [8, 0], ..groups(2) };
    let mut driver = Driver::new(config);
    for seq in 1..=3 {
        driver.submit(seq, request(seq as u32, 8, 16));
    }
    driver.run();
    let preempted: Vec<SeqId> = driver
        .effects
        .iter()
        .filter_map(|effect| if let Effect::Preempted { seq } = effect { Some(*seq) } else { None })
        .collect();
    assert_eq!(preempted, [SeqId(3)], "it shared a sub-group with the first");
    assert!((1..=3).all(|seq| driver.tokens(seq).len() == 16));
}

#[test]
fn the_first_that_waits_goes_first_wherever_there_is_room() {
    let config = Config { running_max: 1, logit_rows_max: 1, step_tokens_max: 8, ..groups(2) };
    let mut driver = Driver::new(config.clone());
    driver.submit(1, request(1, 3, 9));
    driver.submit(2, request(2, 3, 2));
    driver.submit(3, request(3, 3, 2));
    driver.submit(4, request(4, 3, 2));
    let first = places(&config, &driver.step());
    assert_eq!(first, BTreeMap::from([(1, 0), (2, 1)]));
    driver.step();
    assert_eq!(places(&config, &driver.step()), BTreeMap::from([(1, 0), (3, 1)]));
}
