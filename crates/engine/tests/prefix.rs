//! Prompts that begin alike are computed once, as long as both groups still have the blocks.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use engine::{Config, Finish, PrefixReuse, Request, RequestOptions, Usage};
use support::{Driver, config, prompt, request, rows, spec, valid};
use types::{GenerationSpec, TokenId};

fn salted(reuse: PrefixReuse, request: Request) -> Request {
    Request { options: RequestOptions { reuse, ..request.options.clone() }, ..request }
}

/// `first` runs to its end, then `second` starts; how many of its tokens were there.
fn cached_after(config: Config, first: Request, second: Request) -> u32 {
    let mut driver = Driver::new(config);
    driver.submit(1, first);
    driver.run();
    driver.submit(2, second);
    driver.run();
    assert_eq!(driver.finish(2), Some(Finish::Length));
    driver.cached(2)[0]
}

fn with_prompt(prompt: Vec<TokenId>) -> Request {
    Request { prompt, ..request(0, 1, 2) }
}

#[test]
fn a_prompt_seen_before_is_taken_over_block_by_block() {
    assert_eq!(cached_after(config(), request(1, 18, 2), request(1, 18, 2)), 16, "whole blocks only");
    let mut longer = prompt(1, 18);
    longer.extend(prompt(9, 20));
    assert_eq!(cached_after(config(), request(1, 18, 2), with_prompt(longer)), 16);
}

#[test]
fn at_least_one_row_is_computed() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 16, 2));
    driver.run();
    driver.submit(2, request(1, 16, 2));
    let step = driver.step();
    assert_eq!((driver.cached(2), rows(&step)), (vec![12], vec![4]), "the last block is computed again");
    assert_eq!(step.plan.sequences().next().unwrap().start.0, 12);
}

#[test]
fn one_different_token_ends_the_common_part() {
    let mut other = prompt(1, 18);
    other[9] = TokenId(3);
    assert_eq!(cached_after(config(), request(1, 18, 2), with_prompt(other.clone())), 8);
    other[0] = TokenId(3);
    assert_eq!(cached_after(config(), request(1, 18, 2), with_prompt(other)), 0);
}

#[test]
fn what_was_generated_is_found_by_the_next_turn() {
    let mut next = prompt(1, 10);
    next.extend([TokenId(50); 6]);
    next.extend(prompt(5, 3));
    // The last token generated was no input: 15 of the 16 are computed.
    assert_eq!(cached_after(config(), request(1, 10, 6), with_prompt(next.clone())), 12);
    assert_eq!(cached_after(config(), request(1, 10, 7), with_prompt(next)), 16);
}

#[test]
fn another_salt_finds_nothing() {
    let with = |reuse| salted(reuse, request(1, 18, 2));
    let found = |first, second| cached_after(config(), with(first), with(second));
    use PrefixReuse::{Bypass, Open, Salted};
    assert_eq!(found(Salted(1), Salted(1)), 16);
    assert_eq!(found(Salted(1), Salted(2)), 0);
    assert_eq!(found(Salted(1), Salted(1 << 64 | 1)), 0, "all of its bits count");
    assert_eq!((found(Open, Salted(0)), found(Salted(0), Open)), (0, 0), "no salt is not a salt");
    assert_eq!((found(Bypass, Open), found(Open, Bypass), found(Bypass, Bypass)), (0, 0, 0));
}

#[test]
fn a_bypassing_request_leaves_nothing_behind() {
    let mut driver = Driver::new(config());
    driver.submit(1, salted(PrefixReuse::Bypass, request(1, 18, 2)));
    driver.run();
    assert_eq!(driver.engine.load().blocks_cached, [0, 0]);
}

#[test]
fn usage_reports_the_cached_tokens_of_the_prompt() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 18, 2));
    driver.run();
    driver.submit(2, request(1, 18, 2));
    driver.run();
    let usage = |cached_tokens| Some(Usage { prompt_tokens: 18, cached_tokens, output_tokens: 2 });
    assert_eq!((driver.usage(1), driver.usage(2)), (usage(0), usage(16)));
}

#[test]
fn a_running_sequence_shares_its_blocks_without_copies() {
    let mut driver = Driver::new(config());
    driver.submit(1, request(1, 18, 20));
    driver.step();
    driver.step();
    let [full, sliding] = driver.used();
    driver.submit(2, request(1, 18, 20));
    driver.step();
    // Its first four full blocks, and of the sliding ones those its next row sees, are the other's.
    assert_eq!(driver.cached(2), [16]);
    assert_eq!(driver.used(), [full + 1, sliding + 1]);
    driver.run();
    assert_eq!((driver.tokens(1).len(), driver.tokens(2).len()), (20, 20));
}

#[test]
fn a_hit_needs_the_windows_blocks_in_the_sliding_group() {
    // 8 keys in blocks of 4. Six sliding blocks: another sequence of 20 tokens pushes the first one's out.
    let tight = Config { blocks: [64, 4], ..config() };
    let mut driver = Driver::new(tight);
    driver.submit(1, request(1, 18, 2));
    driver.run();
    driver.submit(2, request(2, 18, 2));
    driver.run();
    driver.submit(3, request(1, 18, 2));
    driver.run();
    assert_eq!(driver.cached(3), [0], "the full blocks are there, the sliding ones are not");
    assert_eq!(driver.finish(3), Some(Finish::Length));
}

#[test]
fn prompt_logprobs_need_their_rows_and_reuse_nothing() {
    let spec = GenerationSpec { prompt_logprobs: Some(0), ..spec(2) };
    let asking = Request { generation: valid(spec), ..request(1, 18, 2) };
    assert_eq!(cached_after(config(), request(1, 18, 2), asking.clone()), 0);
    assert_eq!(cached_after(config(), asking, request(1, 18, 2)), 16, "but what they computed is reused");
}

#[test]
fn the_longest_unused_prefix_is_evicted_first_from_its_end() {
    // 13 blocks: two prompts of 4 full blocks each stay behind, a third of 8 takes the free ones and the oldest.
    let mut driver = Driver::new(Config { blocks: [13, 0], ..config() });
    for tag in [1, 2] {
        driver.submit(u64::from(tag), request(tag, 17, 1));
        driver.run();
    }
    assert_eq!(driver.engine.load().blocks_cached, [8, 0]);
    driver.submit(3, request(3, 28, 1));
    driver.run();
    driver.submit(4, request(2, 17, 1));
    driver.submit(5, request(1, 17, 1));
    driver.run();
    assert_eq!(driver.cached(4), [16], "used after the first");
    assert_eq!(driver.cached(5), [4], "the third took its last two blocks, the fourth one more");
}

#[test]
fn everything_cached_gives_way_to_a_request_that_needs_it() {
    let mut driver = Driver::new(Config { blocks: [15, 15], ..config() });
    for tag in 1..=3 {
        driver.submit(u64::from(tag), request(tag, 17, 2));
        driver.run();
    }
    driver.submit(4, request(4, 50, 11));
    driver.run();
    assert_eq!(driver.tokens(4).len(), 11);
    assert_eq!(driver.used(), [0, 0]);
}

#[test]
fn a_preempted_sequence_takes_over_what_is_left_of_itself() {
    let mut driver = Driver::new(Config { blocks: [8, 0], step_tokens_max: 32, ..config() });
    driver.submit(1, request(1, 8, 16));
    driver.submit(2, request(2, 8, 16));
    driver.run();
    let starts = driver.cached(2);
    assert!(starts.len() == 2 && starts[0] == 0 && starts[1] > 0, "{starts:?}");
    assert_eq!(driver.usage(2).unwrap().cached_tokens, 0, "its own work is not another's");
}

#[test]
fn a_prompt_that_cannot_start_yet_is_not_looked_up_at_every_step() {
    let mut driver = Driver::new(Config { blocks: [20, 20], ..config() });
    driver.submit(1, request(1, 30, 30));
    driver.step();
    driver.submit(2, request(2, 60, 2));
    let before = driver.engine.load().prefix_look_ups;
    for _ in 0..20 {
        driver.step();
    }
    assert_eq!(driver.cached(2), [], "it waits");
    assert_eq!(driver.engine.load().prefix_look_ups - before, 1);
    driver.run();
    assert_eq!(driver.tokens(2).len(), 2);
}
