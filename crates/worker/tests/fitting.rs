//! A part that is too large is refused before anything is allocated, with the numbers and the nearest plan that fits.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

use model::{ModelConfig, Preset, ShardPlan};
use types::{BlockSize, Bytes, DType, ExpertSharding, TpRank, TpSize};
use worker::{Limits, Part, RankMemory};

const GIB: u64 = 1 << 30;

fn limits(kv_tokens: u32) -> Limits {
    Limits {
        block_size: BlockSize::new(16).unwrap(),
        kv_tokens,
        step_tokens_max: 512,
        running_max: 64,
        waiting_requests_max: 256,
        waiting_tokens_max: 262_144,
    }
}

fn check(
    model: &ModelConfig,
    ranks: u32,
    limits: &Limits,
    (gib, memory): (u64, RankMemory),
) -> Result<(), String> {
    let plan = ShardPlan::new(model, TpRank::new(0, TpSize::new(ranks).unwrap()).unwrap()).unwrap();
    let (experts, weights, dtype) = (ExpertSharding::Tensor, DType::BF16, DType::BF16);
    let part = Part { model, plan: &plan, experts, weights, dtype, limits };
    part.check(Bytes(gib * GIB), memory).map_err(|error| error.to_string())
}

/// The number after `flag`.
fn proposed(said: &str, flag: &str) -> u32 {
    let rest = said.split(flag).nth(1).unwrap_or_else(|| panic!("no {flag} in {said}"));
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_cache_too_large_for_a_card_is_refused_with_the_largest_that_fits() {
    let north = Preset::NorthMiniCode.config().unwrap();
    assert_eq!(check(&north, 1, &limits(65_536), (79, RankMemory::OfEachRank)), Ok(()));
    let said = check(&north, 1, &limits(5_000_000), (79, RankMemory::OfEachRank)).unwrap_err();
    for part in ["rank 0", "experts", "all weights", "56.8 GiB", "KV cache of 5000000 tokens", "79.0 GiB"] {
        assert!(said.contains(part), "no `{part}` in {said}");
    }
    let tokens = proposed(&said, "--kv-tokens");
    assert_eq!(check(&north, 1, &limits(tokens), (79, RankMemory::OfEachRank)), Ok(()));
    assert!(check(&north, 1, &limits(tokens + 16), (79, RankMemory::OfEachRank)).is_err());
}

#[test]
fn weights_too_large_for_a_card_are_refused_with_the_ranks_that_hold_them() {
    let command = Preset::CommandAPlus.config().unwrap();
    let said = check(&command, 2, &limits(65_536), (139, RankMemory::OfEachRank)).unwrap_err();
    let (ranks, tokens) = (proposed(&said, "--tensor-parallel"), proposed(&said, "--kv-tokens"));
    assert_eq!((ranks, tokens), (4, 65_536), "{said}");
    assert_eq!(check(&command, ranks, &limits(tokens), (139, RankMemory::OfEachRank)), Ok(()));
    let said = check(&command, 2, &limits(65_536), (1, RankMemory::OfEachRank)).unwrap_err();
    assert!(said.contains("any number of ranks"), "{said}");
}

#[test]
fn more_ranks_are_no_help_where_they_share_one_memory() {
    let command = Preset::CommandAPlus.config().unwrap();
    let said = check(&command, 1, &limits(65_536), (139, RankMemory::Shared)).unwrap_err();
    assert!(said.contains("too large for this machine") && !said.contains("--tensor-parallel"), "{said}");
}
