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
mod recipe;

use std::borrow::Cow;

use types::{History, SamplingParams, TokenId, TokenMask, TokenRules};

use crate::Error;
use crate::candidates::{Candidates, best_first};

pub use generator::{philox, uniform};
pub use recipe::{Ask, Penalties, Recipe};

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

/// What turns a row's logits into log-probabilities: the logarithm of the sum of their exponentials.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogSum(f64);

impl LogSum {
    /// Of logits whose largest is `max`, `sum` being that of exp(logit - `max`).
    #[must_use]
    pub fn new(max: f32, sum: f64) -> Self {
        Self(f64::from(max) + sum.ln())
    }

    /// The log-probability of a token with this logit.
    #[must_use]
    pub fn of(self, logit: f32) -> f32 {
        (f64::from(logit) - self.0) as f32
    }
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

/// How to draw once bias, penalties and exclusions are done with.
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

/// What became of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Choice {
    /// Its token.
    Token {
        /// The token drawn.
        token: TokenId,
        /// How likely it was, when that was asked for.
        logprob: Option<TokenLogprob>,
    },
    /// How likely a known token was.
    Likelihood(TokenLogprob),
    /// One of its logits is not a number.
    NotANumber,
    /// Nothing was asked for, or more than a device takes: [`answer`] makes it on the host.
    Left,
}

/// What `ask` makes of row number `row` of logits [V], already scaled: the reference for every device.
#[must_use]
pub fn answer(row: usize, logits: &[f32], ask: &Ask<'_>) -> Choice {
    if *ask == Ask::Nothing {
        return Choice::Left;
    }
    let Ok(logits) = Logits::new(row, logits) else { return Choice::NotANumber };
    match ask {
        Ask::Nothing => Choice::Left,
        Ask::Token(recipe) => {
            let token = logits.make(recipe);
            Choice::Token { token, logprob: recipe.report.map(|top| logits.logprob(token, top)) }
        }
        Ask::Likelihood { token, top } => Choice::Likelihood(logits.logprob(*token, *top)),
    }
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
        self.make(&draw.recipe(history, None))
    }

    /// The token that `recipe` makes.
    #[must_use]
    pub fn make(&self, recipe: &Recipe<'_>) -> TokenId {
        let logits = match recipe.is_plain() {
            true => Cow::Borrowed(self.0),
            false => Cow::Owned(adjust::adjusted(self.0, recipe)),
        };
        Logits(&logits).draw(&recipe.how)
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
        let max = self.max();
        let sum: f64 = self.0.iter().map(|&l| (f64::from(l) - f64::from(max)).exp()).sum();
        let sum = LogSum::new(max, sum);
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
        let top = best.into_iter().map(|(id, logit)| (id, sum.of(logit as f32))).collect();
        let logprob = self.0.get(token.0 as usize).map_or(f32::NEG_INFINITY, |&l| sum.of(l));
        TokenLogprob { token, logprob, top }
    }
}
