//! The reference sampler: each parameter alone, their order, and the generator.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

use ops::sample::{Draw, Logits, philox, uniform};
use types::{Generation, GenerationSpec, History, TokenId, TokenMask};

const VOCAB: usize = 16;

fn greedy() -> GenerationSpec {
    GenerationSpec { temperature: Some(0.0), ..GenerationSpec::default() }
}

fn valid(spec: GenerationSpec) -> Generation {
    spec.validate(0, VOCAB as u32).unwrap()
}

/// Logits that fall from token 0 on: 8, 7.5, 7, …
fn falling() -> Vec<f32> {
    (0..VOCAB).map(|id| 8.0 - 0.5 * id as f32).collect()
}

fn ids(tokens: &[u32]) -> Vec<TokenId> {
    tokens.iter().copied().map(TokenId).collect()
}

/// What is drawn from `logits` behind a prompt and some output.
fn drawn(logits: &[f32], spec: GenerationSpec, prompt: &[u32], output: &[u32]) -> u32 {
    let generation = valid(spec);
    let history = History::new(&ids(prompt), &ids(output));
    let draw = Draw {
        params: generation.sampling(),
        rules: generation.rules(),
        stream: 0,
        position: output.len() as u32,
        banned: &[],
        mask: None,
    };
    Logits::new(0, logits).unwrap().sample(&draw, &history).0
}

/// Every token that comes up in 4,000 draws of different positions.
fn support(logits: &[f32], spec: &GenerationSpec) -> Vec<u32> {
    let generation = valid(spec.clone());
    let row = Logits::new(0, logits).unwrap();
    let history = History::default();
    let draw = |position| {
        let (params, rules) = (generation.sampling(), generation.rules());
        row.sample(&Draw { params, rules, stream: 0, position, banned: &[], mask: None }, &history).0
    };
    let seen: std::collections::BTreeSet<u32> = (0..4000).map(draw).collect();
    seen.into_iter().collect()
}

#[test]
fn the_generator_gives_the_published_numbers() {
    // Known answers of the Random123 distribution.
    let known = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, expected) in known {
        assert_eq!(philox(counter, key), expected);
    }
}

#[test]
fn every_part_of_the_key_changes_the_number() {
    let numbers =
        [uniform(1, 2, 3), uniform(2, 2, 3), uniform(1 | 1 << 40, 2, 3), uniform(1, 3, 3), uniform(1, 2, 4)];
    for (i, a) in numbers.iter().enumerate() {
        assert!((0.0..1.0).contains(a));
        assert!(numbers[i + 1..].iter().all(|b| a != b));
    }
    assert_ne!(uniform(1, 2, 3), uniform(1, 3, 2), "stream and position are not exchangeable");
}

#[test]
fn numbers_are_spread_evenly() {
    let mut tenths = [0; 10];
    (0..10_000).for_each(|position| tenths[(uniform(7, 1, position) * 10.0) as usize] += 1);
    assert!(tenths.iter().all(|&count| (900..1100).contains(&count)), "{tenths:?}");
}

#[test]
fn draws_follow_the_probabilities() {
    let logits = [(0.7_f32).ln(), (0.2_f32).ln(), (0.1_f32).ln()];
    let generation = GenerationSpec::default().validate(5, 3).unwrap();
    let row = Logits::new(0, &logits).unwrap();
    let mut counts = [0; 3];
    for position in 0..20_000 {
        let (params, rules) = (generation.sampling(), generation.rules());
        let draw = Draw { params, rules, stream: 3, position, banned: &[], mask: None };
        counts[row.sample(&draw, &History::default()).0 as usize] += 1;
    }
    for (count, expected) in counts.iter().zip([14_000_i32, 4_000, 2_000]) {
        assert!((count - expected).abs() < 400, "{counts:?}");
    }
}

#[test]
fn a_logit_bias_moves_a_token_up_or_down() {
    let with = |logit_bias| drawn(&falling(), GenerationSpec { logit_bias, ..greedy() }, &[], &[]);
    assert_eq!(with(vec![(9, 100.0)]), 9);
    assert_eq!(with(vec![(0, -100.0), (1, -100.0)]), 2);
}

#[test]
fn only_allowed_tokens_are_drawn() {
    let allowed = GenerationSpec { allowed_token_ids: vec![11, 3, 5, 3], ..greedy() };
    assert_eq!(drawn(&falling(), allowed.clone(), &[], &[]), 3);
    let hot = GenerationSpec { temperature: Some(10.0), ..allowed };
    assert_eq!(support(&falling(), &hot), [3, 5, 11]);
    let biased = GenerationSpec { logit_bias: vec![(0, 100.0)], ..hot };
    assert_eq!(support(&falling(), &biased), [3, 5, 11], "a bias does not allow a token");
}

#[test]
fn a_presence_penalty_counts_a_token_once_and_a_frequency_penalty_each_time() {
    let presence = GenerationSpec { presence_penalty: Some(0.75), ..greedy() };
    assert_eq!(drawn(&falling(), presence.clone(), &[], &[0, 0, 0]), 1, "8 - 0.75 < 7.5");
    assert_eq!(drawn(&falling(), presence.clone(), &[], &[0, 1, 0]), 0, "7.25 is above 6.75 and 7");
    assert_eq!(drawn(&falling(), presence, &[0], &[]), 0, "the prompt does not count");
    let frequency = GenerationSpec { frequency_penalty: Some(0.75), ..greedy() };
    assert_eq!(drawn(&falling(), frequency.clone(), &[], &[0, 1, 0]), 2, "6.5, 6.75, 7");
    assert_eq!(drawn(&falling(), frequency, &[0, 0], &[]), 0);
    let reward = GenerationSpec { frequency_penalty: Some(-2.0), ..greedy() };
    assert_eq!(drawn(&falling(), reward, &[], &[5, 5]), 5, "5.5 + 4");
}

#[test]
fn a_repetition_penalty_counts_prompt_and_output_once() {
    let spec = GenerationSpec { repetition_penalty: Some(1.1), ..greedy() };
    assert_eq!(drawn(&falling(), spec.clone(), &[0], &[]), 1, "8 / 1.1 < 7.5");
    assert_eq!(drawn(&falling(), spec.clone(), &[0, 0], &[0, 0, 1]), 0, "7.27 is above 6.82 and 7");
    let negative = [-1.0, -1.05, -9.0];
    let spec = GenerationSpec { allowed_token_ids: vec![0, 1, 2], ..spec };
    assert_eq!(drawn(&negative, spec, &[0], &[]), 1, "a negative logit gets smaller too");
}

#[test]
fn a_bad_word_is_never_completed() {
    let spec = GenerationSpec { bad_words: vec![vec![4, 5, 0], vec![1]], ..greedy() };
    assert_eq!(drawn(&falling(), spec.clone(), &[], &[4, 5]), 2, "0 would complete one word, 1 is the other");
    assert_eq!(drawn(&falling(), spec.clone(), &[], &[5, 4]), 0);
    assert_eq!(drawn(&falling(), spec.clone(), &[4], &[5]), 0, "a word is one of the output");
    assert_eq!(drawn(&falling(), spec, &[], &[5]), 0, "too short");
}

#[test]
fn bad_words_that_leave_nothing_are_let_through() {
    let spec =
        GenerationSpec { bad_words: vec![vec![3], vec![5]], allowed_token_ids: vec![3, 5], ..greedy() };
    assert_eq!(drawn(&falling(), spec, &[], &[]), 3);
}

#[test]
fn banned_tokens_are_not_drawn_whatever_their_bias() {
    let generation = valid(GenerationSpec { logit_bias: vec![(0, 50.0)], ..greedy() });
    let (params, rules) = (generation.sampling(), generation.rules());
    let banned = ids(&[0, 1]);
    let draw = Draw { params, rules, stream: 0, position: 0, banned: &banned, mask: None };
    assert_eq!(Logits::new(0, &falling()).unwrap().sample(&draw, &History::default()).0, 2);
}

#[test]
fn filters_narrow_the_candidates() {
    let hot = GenerationSpec { temperature: Some(2.0), ..GenerationSpec::default() };
    assert_eq!(support(&falling(), &GenerationSpec { top_k: Some(3), ..hot.clone() }), [0, 1, 2]);
    // Weights fall by exp(-0.25) = 0.78 each: 0.78^2 = 0.61 is the last of at least 0.6.
    assert_eq!(support(&falling(), &GenerationSpec { min_p: Some(0.6), ..hot.clone() }), [0, 1, 2]);
    assert_eq!(support(&falling(), &GenerationSpec { top_p: Some(0.4), ..hot }), [0, 1]);
}

#[test]
fn penalties_come_before_the_filters() {
    let spec = GenerationSpec {
        temperature: Some(1.0),
        top_k: Some(1),
        presence_penalty: Some(2.0),
        ..GenerationSpec::default()
    };
    assert_eq!(drawn(&falling(), spec, &[], &[0, 1, 2]), 3, "the penalised are not among the best any more");
}

#[test]
fn reported_log_probabilities_are_those_of_the_model() {
    let row = falling();
    let reported = Logits::new(0, &row).unwrap().logprob(TokenId(2), 2);
    assert_eq!(reported.top.iter().map(|entry| entry.0.0).collect::<Vec<_>>(), [0, 1]);
    assert!((reported.top[0].1 - reported.logprob - 1.0).abs() < 1e-6, "8 and 7");
}

#[test]
fn a_row_with_something_that_is_no_number_is_refused() {
    assert!(Logits::new(3, &[0.0, f32::NAN]).unwrap_err().to_string().contains("row 3"));
}

#[test]
fn nothing_outside_the_mask_is_drawn() {
    let (spec, logits) = (GenerationSpec { temperature: Some(5.0), ..GenerationSpec::default() }, falling());
    let generation = valid(spec);
    let mask = TokenMask::of(&ids(&[3, 9, 12]));
    let mut seen = std::collections::BTreeSet::new();
    for position in 0..2000 {
        let (params, rules) = (generation.sampling(), generation.rules());
        let draw = Draw { params, rules, stream: 0, position, banned: &ids(&[9]), mask: Some(&mask) };
        seen.insert(Logits::new(0, &logits).unwrap().sample(&draw, &History::default()).0);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [3, 12]);
}

#[test]
fn a_mask_shorter_than_the_vocabulary_excludes_the_rest() {
    let logits: Vec<f32> = (0..100).map(|id| id as f32).collect();
    let generation = greedy().validate(0, 100).unwrap();
    let mask = TokenMask::of(&ids(&[1, 31]));
    let (params, rules) = (generation.sampling(), generation.rules());
    let draw = Draw { params, rules, stream: 0, position: 0, banned: &[], mask: Some(&mask) };
    assert_eq!(Logits::new(0, &logits).unwrap().sample(&draw, &History::default()), TokenId(31));
}

#[test]
fn a_mask_knows_whether_a_ban_leaves_anything() {
    let mask = TokenMask::of(&ids(&[4, 40]));
    assert!(mask.leaves(&ids(&[4, 4, 5])));
    assert!(!mask.leaves(&ids(&[40, 4, 4])));
    assert!(!TokenMask::of(&[]).leaves(&[]));
}
