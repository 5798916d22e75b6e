//! Which part of a model a rank holds.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

mod support;

use model::{Error, ModelConfig, ShardPlan};
use serde_json::json;
use support::{Rng, config_json, parse, rank, with};
use types::{ExpertSharding, TokenId, TpSize};

fn config(changes: &serde_json::Value) -> ModelConfig {
    parse(&with(config_json(), changes)).unwrap()
}

fn plans(config: &ModelConfig, size: u32) -> Vec<ShardPlan> {
    TpSize::new(size).unwrap().ranks().map(|rank| ShardPlan::new(config, rank).unwrap()).collect()
}

#[test]
fn one_rank_holds_everything() {
    let config = config(&json!({}));
    let plan = ShardPlan::new(&config, rank(0, 1)).unwrap();
    assert_eq!((plan.query_heads, plan.kv_heads, plan.vocab_rows), (0..4, 0..2, 37));
    assert_eq!((plan.dense, plan.shared, plan.vocab), (Some(0..12), Some(0..8), 0..37));
    assert_eq!(plan.experts.map(|shard| (shard.experts, shard.width)), Some((0..4, 0..8)));
}

#[test]
fn heads_and_widths_are_dealt_out_in_equal_runs() {
    let plans = plans(&config(&json!({})), 2);
    assert_eq!(plans.iter().map(|plan| plan.query_heads.clone()).collect::<Vec<_>>(), [0..2, 2..4]);
    assert_eq!(plans.iter().map(|plan| plan.kv_heads.clone()).collect::<Vec<_>>(), [0..1, 1..2]);
    let width = |plan: &ShardPlan| plan.experts.clone().unwrap().width;
    assert_eq!(plans.iter().map(width).collect::<Vec<_>>(), [0..4, 4..8]);
    assert!(plans.iter().all(|plan| plan.experts.clone().unwrap().experts == (0..4)));
}

#[test]
fn neighbours_share_a_key_value_head_when_ranks_outnumber_heads() {
    let plans = plans(&config(&json!({})), 4);
    let heads: Vec<_> = plans.iter().map(|plan| plan.kv_heads.clone()).collect();
    assert_eq!(heads, [0..1, 0..1, 1..2, 1..2]);
}

#[test]
fn every_query_head_is_beside_its_key_value_head() {
    for (query, kv, size) in [(8, 2, 1), (8, 2, 2), (8, 2, 4), (8, 2, 8), (12, 6, 3), (8, 1, 4), (8, 8, 8)] {
        let widths = json!({
            "num_attention_heads": query, "num_key_value_heads": kv, "intermediate_size": 24,
            "prefix_dense_intermediate_size": 24,
        });
        let config = config(&widths);
        let group = config.query_heads / config.kv_heads;
        for plan in plans(&config, size) {
            let local_group = plan.query_heads.len() / plan.kv_heads.len();
            for (at, head) in plan.query_heads.clone().enumerate() {
                let held = plan.kv_heads.start + at / local_group;
                assert_eq!(head / group, held, "{query}/{kv} heads, {}", plan.rank);
            }
        }
    }
}

#[test]
fn the_vocabulary_is_padded_to_equal_rows() {
    let plans = plans(&config(&json!({})), 4);
    assert!(plans.iter().all(|plan| plan.vocab_rows == 10));
    let held: Vec<_> = plans.iter().map(|plan| plan.vocab.clone()).collect();
    assert_eq!(held, [0..10, 10..20, 20..30, 30..37]);
    assert_eq!(plans[3].first_token(), TokenId(30));
}

#[test]
fn a_rank_past_the_vocabulary_holds_only_padding() {
    let plans = plans(&config(&json!({ "vocab_size": 9, "eos_token_id": 1 })), 4);
    assert_eq!(plans[3].vocab, 9..9);
    assert_eq!((plans[3].vocab_rows, plans[3].first_token()), (3, TokenId(9)));
    let tiny = self::plans(&config(&json!({ "vocab_size": 2, "eos_token_id": 1 })), 4);
    assert_eq!(tiny.iter().map(|plan| plan.vocab.len()).collect::<Vec<_>>(), [1, 1, 0, 0]);
}

#[test]
fn ranks_that_do_not_divide_are_refused_with_the_numbers() {
    let cases = [
        (json!({}), 3, vec!["4 query heads", "2 key/value heads", "8 columns of a routed expert", "3 ranks"]),
        (json!({}), 8, vec!["4 query heads", "12 columns of the dense MLP"]),
        (json!({ "num_attention_heads": 12, "num_key_value_heads": 6 }), 4, vec!["6 key/value heads"]),
        (
            json!({ "num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 24 }),
            4,
            vec!["4 ranks cannot share 3 key/value heads"],
        ),
        (json!({ "prefix_dense_intermediate_size": 13 }), 2, vec!["13 columns of the dense MLP"]),
        (json!({ "intermediate_size": 9 }), 2, vec!["9 columns of a routed", "9 columns of the shared"]),
    ];
    for (changes, size, words) in cases {
        let error = ShardPlan::new(&config(&changes), rank(0, size)).unwrap_err();
        assert!(matches!(error, Error::Split { .. }));
        let text = error.to_string();
        assert!(text.contains("sizes that work: 1"), "{text}");
        for word in words {
            assert!(text.contains(word), "`{word}` is not in: {text}");
        }
    }
}

#[test]
fn the_sizes_that_work_are_exactly_those_that_plan() {
    let seed = 5;
    let mut rng = Rng(seed);
    for _ in 0..50 {
        let kv = 1 + rng.below(6);
        let changes = json!({
            "num_key_value_heads": kv, "num_attention_heads": kv * (1 + rng.below(6)),
            "intermediate_size": 1 + rng.below(64), "prefix_dense_intermediate_size": 1 + rng.below(64),
            "num_shared_experts": 2,
        });
        let config = config(&changes);
        for experts in [ExpertSharding::Tensor, ExpertSharding::Expert] {
            let works = ShardPlan::sizes(&config, experts);
            for size in 1..=16 {
                let plans = ShardPlan::sharded(&config, rank(size - 1, size), experts).is_ok();
                assert_eq!(works.contains(&size), plans, "seed {seed}, {size} ranks, {experts}, {changes}");
            }
        }
    }
}
