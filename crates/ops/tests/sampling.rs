//! The sampler draws what the logits say, and the same again for the same seed and position.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use ops::Error;
use ops::sample::{Logits, uniform};
use types::{GenerationSpec, SamplingParams, TokenId};

fn params(change: impl FnOnce(&mut GenerationSpec)) -> SamplingParams {
    let mut spec = GenerationSpec::default();
    change(&mut spec);
    *spec.validate(1, 1000).unwrap().sampling()
}

#[test]
fn tokens_are_drawn_as_often_as_they_are_likely() {
    let logits = [0.0_f32, 1.0, 2.0, -1.0];
    let row = Logits::new(0, &logits).unwrap();
    let params = params(|s| s.temperature = Some(1.0));
    let draws = 20_000;
    let mut counts = [0_u32; 4];
    for position in 0..draws {
        counts[row.sample(&params, position, &[]).0 as usize] += 1;
    }
    let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    for (count, logit) in counts.iter().zip(logits) {
        let (p, n) = (f64::from(logit).exp() / sum, f64::from(draws));
        // Five standard deviations of a binomial.
        let off = (f64::from(*count) - n * p).abs();
        assert!(off < 5.0 * (n * p * (1.0 - p)).sqrt(), "{counts:?}");
    }
}

#[test]
fn a_draw_depends_on_seed_and_position_and_on_nothing_else() {
    let logits: Vec<f32> = (0..500).map(|i| (i as f32 * 0.7).sin()).collect();
    let row = Logits::new(3, &logits).unwrap();
    let with = |seed| params(|s| s.seed = Some(seed));
    let drawn = |seed| (0..40).map(|at| row.sample(&with(seed), at, &[]).0).collect::<Vec<_>>();
    assert_eq!(drawn(5), drawn(5));
    assert_ne!(drawn(5), drawn(6));
    assert!(drawn(5).iter().collect::<std::collections::BTreeSet<_>>().len() > 10, "positions do not matter");
}

#[test]
fn the_generator_is_even_and_its_streams_differ() {
    let count = 4096_u32;
    for seed in [0, 1, u64::MAX, 1 << 40] {
        let values: Vec<f64> = (0..count).map(|at| uniform(seed, at)).collect();
        assert!(values.iter().all(|v| (0.0..1.0).contains(v)));
        let mean = values.iter().sum::<f64>() / f64::from(count);
        assert!(
            (mean - 0.5).abs() < 5.0 * (1.0 / 12.0_f64).sqrt() / f64::from(count).sqrt(),
            "seed {seed}: {mean}"
        );
    }
    assert_ne!(uniform(0, 0), uniform(1, 0));
    assert_ne!(uniform(1, 0), uniform(1 << 32, 0));
}

#[test]
fn greedy_takes_the_lowest_of_equal_logits_and_skips_banned_tokens() {
    let row = [1.0, 3.0, 3.0, 2.0];
    let row = Logits::new(0, &row).unwrap();
    assert_eq!(row.sample(&SamplingParams::GREEDY, 0, &[]), TokenId(1));
    assert_eq!(row.sample(&SamplingParams::GREEDY, 0, &[TokenId(1), TokenId(2)]), TokenId(3));
}

#[test]
fn reported_log_probabilities_are_those_of_the_whole_distribution() {
    let row = [0.5_f32, 2.0, 1.0, 2.0];
    let reported = Logits::new(0, &row).unwrap().logprob(TokenId(2), 2);
    let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
    assert!((f64::from(reported.logprob) - (1.0 - sum.ln())).abs() < 1e-6);
    assert_eq!(reported.top.iter().map(|t| t.0.0).collect::<Vec<_>>(), [1, 3]);
    assert!((f64::from(reported.top[0].1) - (2.0 - sum.ln())).abs() < 1e-6);
}

#[test]
fn a_logit_that_is_not_a_number_is_refused_by_row_and_entry() {
    let refused = Logits::new(7, &[0.0, f32::NAN]).err().unwrap();
    assert!(matches!(refused, Error::NotANumber { row: 7, token: 1 }), "{refused}");
}
