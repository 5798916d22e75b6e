//! Budgets that cannot work are refused at start, with the numbers.

mod support;

use engine::{Config, Engine};
use support::config;
use types::TokenId;

/// A change to a working configuration, and the words its refusal must hold.
type Case = (fn(&mut Config), &'static [&'static str]);

#[test]
fn impossible_budgets_are_refused_with_the_numbers() {
    let cases: &[Case] = &[
        (|c| c.blocks = [0, 0], &["both KV pools", "0 blocks"]),
        (|c| c.blocks[0] = u32::MAX, &["blocks (full)", "4294967295"]),
        (|c| c.blocks[1] = u32::MAX, &["blocks (sliding)", "4294967295"]),
        (|c| c.window_keys = 0, &["window_keys is 0", "at least 1"]),
        (|c| c.context_tokens_max = 1, &["context_tokens_max is 1", "at least 2"]),
        (|c| c.context_tokens_max = u32::MAX, &["context_tokens_max", "at most 16777216"]),
        (|c| c.vocab_size = 0, &["vocab_size is 0"]),
        (|c| c.eos_token_ids = vec![TokenId(1000)], &["token 1000", "vocabulary size 1000"]),
        (|c| c.running_max = 0, &["running_max is 0"]),
        (|c| c.data_parallel = 0, &["data_parallel is 0"]),
        (|c| c.data_parallel = 129, &["data_parallel is 129", "at most 128"]),
        (|c| c.running_max = 1 << 17, &["running_max is 131072", "at most 65536"]),
        (|c| c.step_tokens_max = 3, &["step_tokens_max is 3", "at least 4"]),
        (|c| c.step_tokens_max = u32::MAX, &["step_tokens_max", "at most 1048576"]),
        (|c| c.logit_rows_max = 3, &["logit_rows_max is 3", "at least 4"]),
        (|c| c.waiting_requests_max = 0, &["waiting_requests_max is 0"]),
        (|c| c.waiting_tokens_max = 63, &["waiting_tokens_max is 63", "at least 64"]),
    ];
    for (change, words) in cases {
        let mut changed = config();
        change(&mut changed);
        let error = Engine::new(changed).map(|_| ()).expect_err("it cannot work").to_string();
        for word in *words {
            assert!(error.contains(word), "`{error}` should say `{word}`");
        }
    }
}

#[test]
fn a_model_without_sliding_layers_needs_no_window() {
    let changed = Config { blocks: [16, 0], window_keys: 0, ..config() };
    assert!(Engine::new(changed).is_ok());
}
