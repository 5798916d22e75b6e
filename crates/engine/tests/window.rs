//! The sliding group gives back what fell out of the window, and nothing that is still seen.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use engine::kv::Geometry;
use engine::{Config, KvGroup};
use proptest::prelude::*;
use support::{Driver, config, request};
use types::{BlockSize, TokenId};

fn geometry(block: u32, window_keys: u32) -> Geometry {
    Geometry { block_size: BlockSize::new(block).unwrap(), window_keys }
}

#[test]
fn a_long_sequence_keeps_every_full_block_and_a_window_of_sliding_ones() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 16, 40));
    let mut most = 0;
    for _ in 0..39 {
        let step = driver.step();
        let computed = step.plan.sequences().next().map(|s| s.start.0 + s.inputs.len() as u32).unwrap();
        let [full, sliding] = driver.used();
        assert_eq!(full, computed.div_ceil(4), "full layers keep every block");
        if computed > 16 {
            most = most.max(sliding);
        }
    }
    assert_eq!(most, 3, "8 keys in blocks of 4 touch at most 3 blocks");
}

#[test]
fn the_block_goes_back_exactly_when_its_last_key_leaves_the_window() {
    // Block 0 holds positions 0..=3. With 8 keys, the row at 10 still sees 3, the row at 11 sees 4.
    for (window_keys, last_that_sees) in [(8, 10), (9, 11), (1, 3), (4, 6), (5, 7)] {
        let group = KvGroup::Sliding;
        let geometry = geometry(4, window_keys);
        assert_eq!(geometry.first_needed(group, last_that_sees), 0, "{window_keys} keys");
        assert_eq!(geometry.first_needed(group, last_that_sees + 1), 1, "{window_keys} keys");
        let mut driver = Driver::new(Config { window_keys, ..config() });
        driver.submit(1, request(1, 3, 20));
        while let Some(step) = driver.plan() {
            let sequence = step.plan.sequences().next().unwrap();
            let due = sequence.start.0 == last_that_sees + 1;
            if sequence.start.0 <= last_that_sees + 1 {
                assert_eq!(sequence.dropped, u32::from(due), "{window_keys} keys, row {}", sequence.start);
            }
            driver.answer(&step, |_| TokenId(50));
        }
    }
}

#[test]
fn both_conventions_of_a_4096_window_are_one_key_apart() {
    let group = KvGroup::Sliding;
    assert_eq!(geometry(16, 4096).first_needed(group, 4095 + 15), 0);
    assert_eq!(geometry(16, 4096).first_needed(group, 4095 + 16), 1);
    assert_eq!(geometry(16, 4097).first_needed(group, 4095 + 16), 0);
    assert_eq!(geometry(16, 4097).first_needed(group, 4095 + 17), 1);
}

#[test]
fn a_chunk_keeps_what_its_first_row_sees() {
    let mut driver = Driver::new(Config { step_tokens_max: 8, ..config() });
    driver.submit(1, request(1, 32, 2));
    driver.step();
    let second = driver.step();
    // The row at 8 sees 1..=8: every block of the first chunk.
    assert_eq!(second.plan.sequences().next().unwrap().dropped, 0);
    let third = driver.step();
    // The row at 16 sees 9..=16: blocks 0 and 1 are past.
    assert_eq!(third.plan.sequences().next().unwrap().dropped, 2);
}

#[test]
fn a_chunk_is_shortened_to_the_sliding_blocks_there_are() {
    let mut driver = Driver::new(Config { blocks: [64, 3], ..config() });
    driver.submit(1, request(1, 32, 2));
    let mut chunks = Vec::new();
    while let Some(step) = driver.plan() {
        chunks.extend(support::rows(&step));
        driver.answer(&step, |_| TokenId(50));
    }
    assert_eq!(chunks, [12, 4, 4, 4, 4, 4, 1]);
}

#[test]
fn a_model_with_one_kind_of_layers_uses_one_pool() {
    for (blocks, used) in [([64, 0], [3, 0]), ([0, 64], [0, 3])] {
        let mut driver = Driver::new(Config { blocks, ..config() });
        driver.submit(1, request(1, 10, 2));
        driver.step();
        assert_eq!(driver.used(), used);
        driver.run();
        assert_eq!(driver.tokens(1).len(), 2);
    }
}

proptest! {
    #[test]
    fn the_peak_is_the_most_blocks_any_row_touches_or_one_more(
        block in 1_u32..20, window in 1_u32..60, tokens in 1_u32..200,
    ) {
        let geometry = geometry(block, window);
        let group = KvGroup::Sliding;
        let touched = (0..tokens).map(|row| row / block + 1 - geometry.first_needed(group, row)).max().unwrap();
        let peak = geometry.peak(group, tokens);
        prop_assert!(peak == touched || (peak == touched + 1 && tokens < window + block), "{peak} {touched}");
        for row in 0..tokens {
            let first_key = (row + 1).saturating_sub(window);
            prop_assert_eq!(geometry.first_needed(group, row), first_key / block);
        }
    }
}
