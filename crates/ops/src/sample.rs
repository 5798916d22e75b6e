//! The reference sampler: from one row of logits to a token, on the host. Every backend's sampler must draw the same
//! token from the same logits.
//!
//! Order: logits / temperature → softmax → top-k → top-p → min-p → renormalise → draw by one uniform number.
//! Among equally likely tokens filters prefer the lowest id; the draw runs through what is left in order of ids. The uniform number depends on (seed, position)
//! alone, so a request draws the same tokens whatever it is batched with and wherever it is resumed.

use types::{SamplingParams, TokenId};

use crate::Error;
use crate::candidates::{Candidates, best_first};

/// Log-probability of a token and of the most likely alternatives, from the unmodified distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// Its log-probability.
    pub logprob: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// One row of logits [V] (already scaled).
#[derive(Debug, Clone, Copy)]
pub struct Logits<'a>(&'a [f32]);

impl<'a> Logits<'a> {
    /// The logits of row number `row`, which must all be numbers.
    ///
    /// # Errors
    /// [`Error::NotANumber`] when one is NaN.
    pub fn new(row: usize, logits: &'a [f32]) -> Result<Self, Error> {
        match logits.iter().position(|l| l.is_nan()) {
            Some(token) => Err(Error::NotANumber { row, token }),
            None => Ok(Self(logits)),
        }
    }

    /// The next token. `banned` are never drawn (stop tokens before `min_tokens`), unless nothing else is left.
    #[must_use]
    pub fn sample(&self, params: &SamplingParams, position: u32, banned: &[TokenId]) -> TokenId {
        if params.is_greedy() {
            return self.most_likely(banned);
        }
        let candidates = Candidates::new(self.0, params.temperature(), banned);
        let kept = candidates.filter(params.top_k(), params.top_p(), params.min_p());
        kept.draw(uniform(params.seed(), position)).unwrap_or_else(|| self.most_likely(banned))
    }

    fn most_likely(&self, banned: &[TokenId]) -> TokenId {
        let mut best: Option<(u32, f32)> = None;
        for (id, &logit) in (0_u32..).zip(self.0) {
            if best.is_none_or(|(_, most)| logit > most) && !banned.contains(&TokenId(id)) {
                best = Some((id, logit));
            }
        }
        TokenId(best.map_or(0, |(id, _)| id))
    }

    fn max(&self) -> f32 {
        self.0.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// Log-probability of `token` and of the `top` most likely tokens, before temperature and filters.
    #[must_use]
    pub fn logprob(&self, token: TokenId, top: u32) -> TokenLogprob {
        let max = f64::from(self.max());
        let sum: f64 = self.0.iter().map(|&l| (f64::from(l) - max).exp()).sum();
        let log_sum = max + sum.ln();
        let of = |logit: f32| (f64::from(logit) - log_sum) as f32;
        let mut best: Vec<(TokenId, f64)> = if top == 0 {
            Vec::new()
        } else {
            (0_u32..).zip(self.0).map(|(i, &l)| (TokenId(i), f64::from(l))).collect()
        };
        if top > 0 && (top as usize) < best.len() {
            best.select_nth_unstable_by(top as usize - 1, best_first);
            best.truncate(top as usize);
        }
        best.sort_unstable_by(best_first);
        let top = best.into_iter().map(|(id, logit)| (id, of(logit as f32))).collect();
        let logprob = self.0.get(token.0 as usize).map_or(f32::NEG_INFINITY, |&l| of(l));
        TokenLogprob { token, logprob, top }
    }
}

/// A number in [0, 1) from a counter-based generator: Philox 2x32-10 (Salmon et al., 2011, "Parallel random
/// numbers: as easy as 1, 2, 3") keyed by the seed, counting positions.
#[must_use]
pub fn uniform(seed: u64, position: u32) -> f64 {
    const MULTIPLIER: u64 = 0xD256_D193;
    const WEYL: u32 = 0x9E37_79B9;
    let (mut key, high) = (seed as u32, (seed >> 32) as u32);
    let (mut left, mut right) = (position, high);
    for _ in 0..10 {
        let product = u64::from(left) * MULTIPLIER;
        (left, right) = ((product >> 32) as u32 ^ key ^ right, product as u32);
        key = key.wrapping_add(WEYL);
    }
    let bits = (u64::from(left) << 32) | u64::from(right);
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}
