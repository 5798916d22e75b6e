//! The tokens that may be drawn, and the filters that narrow them down. Nothing sorts the vocabulary: filters select,
//! and only what is left after them is ever put in order.

use std::cmp::Ordering;

use types::TokenId;

/// A token less likely than the best by this power of e (2·10^-16) cannot change a sum in f64 and is not a candidate.
const NEGLIGIBLE: f64 = -36.0;
/// First guess of how many tokens make a nucleus; grows by this factor until they do.
const NUCLEUS_GUESS: usize = 64;
const NUCLEUS_GROWTH: usize = 4;

/// Tokens and their weights, proportional to their probabilities; the best one weighs 1. In ascending order of tokens.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Candidates(Vec<(TokenId, f64)>);

impl Candidates {
    /// softmax(logits / temperature) up to a factor; a logit of minus infinity excludes its token.
    pub(crate) fn new(logits: &[f32], temperature: f32) -> Self {
        let temperature = f64::from(temperature);
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if best == f32::NEG_INFINITY {
            return Self(Vec::new());
        }
        let floor = f64::from(best) + NEGLIGIBLE * temperature;
        let near = (0_u32..).zip(logits).filter(|&(_, &l)| f64::from(l) >= floor);
        let weight = |l: f32| ((f64::from(l) - f64::from(best)) / temperature).exp();
        Self(near.map(|(id, &l)| (TokenId(id), weight(l))).collect())
    }

    /// Keeps the `k` most likely (lowest token on a tie), then the smallest set of most likely ones whose weights
    /// reach `top_p` of what is left, then those at least `min_p` as likely as the best.
    pub(crate) fn filter(mut self, top_k: Option<u32>, top_p: f32, min_p: f32) -> Self {
        let before = self.0.len();
        if let Some(k) = top_k {
            self.keep_best(k as usize);
        }
        if top_p < 1.0 {
            self.keep_nucleus(f64::from(top_p) * self.total());
        }
        if min_p > 0.0 {
            // The best one weighs 1, whatever was filtered.
            self.0.retain(|candidate| candidate.1 >= f64::from(min_p));
        }
        // A nucleus is looked for best first, also when all of it is kept.
        if top_p < 1.0 || self.0.len() < before {
            self.0.sort_unstable_by_key(|candidate| candidate.0);
        }
        self
    }

    /// The candidate at the fraction `at` of the total weight, in ascending order of tokens; `None` without any.
    pub(crate) fn draw(&self, at: f64) -> Option<TokenId> {
        let mut left = at * self.total();
        for &(id, weight) in &self.0 {
            left -= weight;
            if left < 0.0 {
                return Some(id);
            }
        }
        self.0.last().map(|candidate| candidate.0)
    }

    fn total(&self) -> f64 {
        self.0.iter().map(|candidate| candidate.1).sum()
    }

    /// Keeps the `k` best, in any order.
    fn keep_best(&mut self, k: usize) {
        if k > 0 && k < self.0.len() {
            self.0.select_nth_unstable_by(k - 1, best_first);
            self.0.truncate(k);
        }
    }

    /// Keeps the shortest run of best candidates whose weights reach `mass`.
    fn keep_nucleus(&mut self, mass: f64) {
        let mut count = NUCLEUS_GUESS;
        while count < self.0.len() {
            self.0.select_nth_unstable_by(count - 1, best_first);
            if self.0[..count].iter().map(|candidate| candidate.1).sum::<f64>() >= mass {
                break;
            }
            count *= NUCLEUS_GROWTH;
        }
        self.0.truncate(count);
        self.0.sort_unstable_by(best_first);
        let mut sum = 0.0;
        let reached = self.0.iter().position(|candidate| {
            sum += candidate.1;
            sum >= mass
        });
        if let Some(last) = reached {
            self.0.truncate(last + 1);
        }
    }
}

/// The larger weight first, the lowest token on a tie.
pub(crate) fn best_first(a: &(TokenId, f64), b: &(TokenId, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Random;

    /// The filters as they are defined: sort everything, cut.
    fn plainly(all: &Candidates, top_k: Option<u32>, top_p: f32, min_p: f32) -> Candidates {
        let mut sorted = all.0.clone();
        sorted.sort_by(best_first);
        sorted.truncate(top_k.map_or(sorted.len(), |k| k as usize));
        let mass = f64::from(top_p) * sorted.iter().map(|c| c.1).sum::<f64>();
        let mut sum = 0.0;
        let count = 1 + sorted
            .iter()
            .take_while(|c| {
                sum += c.1;
                sum < mass
            })
            .count();
        sorted.truncate(count);
        sorted.retain(|c| c.1 >= f64::from(min_p));
        sorted.sort_by_key(|c| c.0);
        Candidates(sorted)
    }

    #[test]
    fn a_nucleus_that_keeps_all_leaves_them_in_the_order_of_tokens() {
        let all = Candidates::new(&[0.0, 1.0, 0.5], 1.0).filter(None, 0.999, 0.0);
        let tokens: Vec<u32> = all.0.iter().map(|candidate| candidate.0.0).collect();
        assert_eq!(tokens, [0, 1, 2]);
    }

    #[test]
    fn filters_keep_what_sorting_everything_would_keep() {
        let seed = 11;
        let mut random = Random::new(seed);
        for round in 0..300 {
            let vocab = 1 + random.below(3000);
            let spread = [0.1, 1.0, 4.0][random.below(3)];
            let logits: Vec<f32> = (0..vocab).map(|_| random.normal() * spread).collect();
            let all = Candidates::new(&logits, 0.2 + random.unit() as f32);
            let top_k = (random.below(2) == 1).then(|| 1 + random.below(200) as u32);
            let top_p = [1.0, 0.95, 0.5, 0.01][random.below(4)];
            let min_p = [0.0, 0.05, 1.0][random.below(3)];
            let expected = plainly(&all, top_k, top_p, min_p);
            let kept = all.filter(top_k, top_p, min_p);
            assert_eq!(kept, expected, "seed {seed}, round {round}: {top_k:?} {top_p} {min_p}");
        }
    }

    #[test]
    fn excluded_tokens_are_no_candidates() {
        let kept = Candidates::new(&[1.0, f32::NEG_INFINITY, 2.0], 1.0);
        assert_eq!(kept.0.iter().map(|c| c.0.0).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(kept.0[1].1, 1.0);
        assert_eq!(Candidates::new(&[f32::NEG_INFINITY; 2], 1.0).0, []);
    }

    #[test]
    fn the_fraction_runs_through_the_tokens_in_order() {
        let even = Candidates::new(&[0.0; 4], 1.0);
        let drawn: Vec<u32> =
            [0.0, 0.24, 0.26, 0.51, 0.99].iter().map(|&at| even.draw(at).unwrap().0).collect();
        assert_eq!(drawn, [0, 0, 1, 2, 3]);
        assert_eq!(Candidates::new(&[], 1.0).draw(0.5), None);
    }
}
