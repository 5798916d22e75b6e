//! The reference sampler: from one row of logits to a token, on the host. Every backend's sampler must draw the same
//! token from the same logits.
//!
//! The order, of which a request uses what it asks for:
//! 1. logit bias is added;
//! 2. repetition penalty (tokens of prompt and output), then frequency and presence penalty (tokens of the output);
//! 3. tokens that are not allowed (by the request or by its grammar), that would end the sequence too early, or would
//!    complete a bad word are excluded;
//! 4. greedy: the largest logit, lowest id on a tie. Otherwise: logits / temperature → softmax → top-k → top-p → min-p
//!    → renormalise → draw by one uniform number.
//!
//! Bias and penalties come first, so that a bias cannot bring an excluded token back. Among equally
//! likely tokens filters prefer the lowest id; the draw runs through what is left in order of ids. The uniform number depends on (seed, stream, position) alone, so a request
//! draws the same tokens whatever it is batched with and wherever it is resumed. Log-probabilities that are reported
//! are those of the model, before all of this.

mod adjust;
mod generator;

use std::borrow::Cow;

use types::{History, SamplingParams, TokenId, TokenMask, TokenRules};

use crate::Error;
use crate::candidates::{Candidates, best_first};

pub use generator::{philox, uniform};

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

/// How to draw one token.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a> {
    /// Penalties, temperature and filters.
    pub params: &'a SamplingParams,
    /// Which tokens the request wants more, less, or not at all.
    pub rules: &'a TokenRules,
    /// Which of the request's sequences it is for.
    pub stream: u32,
    /// Tokens generated before it.
    pub position: u32,
    /// Tokens that must not be drawn now (stop tokens before `min_tokens`).
    pub banned: &'a [TokenId],
    /// The only tokens that may be drawn now, when a grammar says; it must leave one that is not banned.
    pub mask: Option<&'a TokenMask>,
}

/// How to draw from logits as they are, when nothing biases, penalises or excludes a token: what a device needs to know
/// to draw by itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plain {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// As [`SamplingParams::top_k`].
    pub top_k: Option<u32>,
    /// As [`SamplingParams::top_p`].
    pub top_p: f32,
    /// As [`SamplingParams::min_p`].
    pub min_p: f32,
    /// The uniform number in [0, 1) of this draw.
    pub at: f64,
}

impl Plain {
    /// The most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: None, top_p: 1.0, min_p: 0.0, at: 0.0 };

    /// Whether the most likely token is taken.
    #[must_use]
    pub const fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}

/// What became of a row that a device was to draw a token of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Its token.
    Token(TokenId),
    /// One of its logits is not a number.
    NotANumber,
    /// None was asked for: its logits are wanted on the host.
    Left,
}

impl Draw<'_> {
    /// What a device needs to know, when the logits are used as they are.
    #[must_use]
    pub fn plain(&self) -> Option<Plain> {
        self.is_plain().then(|| self.filters())
    }

    /// What follows once bias, penalties and exclusions are done with.
    fn filters(&self) -> Plain {
        let params = self.params;
        Plain {
            temperature: params.temperature(),
            top_k: params.top_k(),
            top_p: params.top_p(),
            min_p: params.min_p(),
            at: uniform(params.seed(), self.stream, self.position),
        }
    }

    /// Whether the logits are used as they are.
    fn is_plain(&self) -> bool {
        self.mask.is_none() && self.banned.is_empty() && self.rules.is_empty() && !self.params.has_penalties()
    }
}

/// The token of row number `row` of logits [V], already scaled, when nothing is biased, penalised or excluded.
#[must_use]
pub fn drawn(row: usize, logits: &[f32], how: &Plain) -> Choice {
    Logits::new(row, logits).map_or(Choice::NotANumber, |logits| Choice::Token(logits.draw(how)))
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

    /// The next token of a sequence with this `history`, which matters only for penalties and bad words.
    #[must_use]
    pub fn sample(&self, draw: &Draw<'_>, history: &History) -> TokenId {
        let logits = match draw.is_plain() {
            true => Cow::Borrowed(self.0),
            false => Cow::Owned(adjust::adjusted(self.0, draw, history)),
        };
        Logits(&logits).draw(&draw.filters())
    }

    /// The next token when nothing is biased, penalised or excluded.
    #[must_use]
    pub fn draw(&self, how: &Plain) -> TokenId {
        if how.is_greedy() {
            return self.most_likely();
        }
        let kept = Candidates::new(self.0, how.temperature).filter(how.top_k, how.top_p, how.min_p);
        kept.draw(how.at).unwrap_or_else(|| self.most_likely())
    }

    fn most_likely(&self) -> TokenId {
        let mut best = (TokenId(0), f32::NEG_INFINITY);
        for (id, &logit) in (0_u32..).zip(self.0) {
            if logit > best.1 {
                best = (TokenId(id), logit);
            }
        }
        best.0
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
