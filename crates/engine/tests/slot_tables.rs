//! The tables every rank keeps: they follow the plans, and refuse a plan that does not fit.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use engine::{Config, Error, SlotTables, Step};
use support::{Driver, config, request};
use types::{SlotId, TokenId};

/// A few steps of two sequences, long enough for the window to move.
fn steps() -> Vec<Step> {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 20, 8));
    driver.submit(2, request(2, 5, 8));
    let mut steps = Vec::new();
    while let Some(step) = driver.plan() {
        driver.answer(&step, |_| TokenId(50));
        steps.push(step);
    }
    steps
}

fn mirror(config: &Config) -> SlotTables {
    SlotTables::new(config).unwrap()
}

#[test]
fn the_tables_cover_every_position_a_step_reads_and_writes() {
    let mut mirror = mirror(&config());
    for step in steps() {
        mirror.apply(&step.plan).unwrap();
        for sequence in step.plan.sequences() {
            let [full, sliding] = mirror.tables(sequence.slot);
            let end = sequence.start.0 + sequence.inputs.len() as u32;
            assert_eq!((full.first, full.blocks.len() as u32), (0, end.div_ceil(4)));
            let first_seen = (sequence.start.0 + 1).saturating_sub(8);
            assert!(sliding.first * 4 <= first_seen, "the window's first key is there");
            assert!((sliding.first + 1) * 4 > first_seen, "and nothing before its block");
            assert_eq!(sliding.first + sliding.blocks.len() as u32, end.div_ceil(4));
        }
    }
}

#[test]
fn a_released_slot_is_empty_until_it_is_used_again() {
    let mut driver = Driver::new(config());
    let mut mirror = mirror(&config());
    driver.submit(1, request(1, 20, 1));
    driver.submit(2, request(2, 3, 9));
    for _ in 0..3 {
        let step = driver.step();
        mirror.apply(&step.plan).unwrap();
        driver.engine.check_mirror(&mirror);
    }
    assert!(mirror.tables(SlotId(0)).iter().all(|table| table.blocks.is_empty()));
    assert!(mirror.tables(SlotId(1)).iter().all(|table| !table.blocks.is_empty()));
}

#[test]
fn a_plan_that_was_lost_or_came_twice_is_refused() {
    let steps = steps();
    let mut mirror = mirror(&config());
    mirror.apply(&steps[0].plan).unwrap();
    assert_eq!(mirror.apply(&steps[0].plan), Err(Error::PlanOrder { got: 1, expected: 2 }));
    assert_eq!(mirror.clone().apply(&steps[2].plan), Err(Error::PlanOrder { got: 3, expected: 2 }));
}

#[test]
fn a_plan_for_other_budgets_is_refused_by_name() {
    let cases: [(Config, &str); 6] = [
        (Config { blocks: [2, 64], ..config() }, "full block 2 is not below the pool size 2"),
        (Config { blocks: [64, 2], ..config() }, "sliding block 2 is not below the pool size 2"),
        (Config { blocks: [0, 64], ..config() }, "number of new blocks is 4 in the plan and 0"),
        (Config { vocab_size: 110, ..config() }, "a token"),
        (Config { step_tokens_max: 15, logit_rows_max: 15, ..config() }, "rows = 16"),
        (Config { context_tokens_max: 15, ..config() }, "the end position is 16"),
    ];
    for (other, words) in cases {
        let error = mirror(&other).apply(&steps()[0].plan).unwrap_err().to_string();
        assert!(error.contains(words), "`{error}` should say `{words}`");
    }
}

#[test]
fn a_rank_with_another_window_or_block_size_is_refused() {
    let others = [
        Config { window_keys: 9, ..config() },
        Config { block_size: types::BlockSize::new(8).unwrap(), ..config() },
        Config { running_max: 1, ..config() },
    ];
    for other in others {
        let mut mirror = mirror(&other);
        let refused = steps().iter().find_map(|step| mirror.apply(&step.plan).err());
        assert!(refused.is_some(), "{other:?}");
    }
}
