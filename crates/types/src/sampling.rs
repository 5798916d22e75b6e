//! What a request asks of generation: a [`Generation`] is valid by construction, and the only thing the engine
//! accepts.

use std::sync::Arc;

use crate::limits::LOGPROBS_TOP_MAX;
use crate::{Error, TokenId, TokenRules};

/// How the next token is chosen from the logits. Applied in this order: repetition, frequency and presence penalty,
/// temperature, top-k, top-p, min-p, draw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    pub(crate) temperature: f32,
    pub(crate) top_k: Option<u32>,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    pub(crate) seed: u64,
    pub(crate) presence_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) repetition_penalty: f32,
}

impl SamplingParams {
    /// Always the most likely token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        seed: 0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
    };

    /// Divides the logits; 0 means greedy.
    #[must_use]
    pub const fn temperature(&self) -> f32 {
        self.temperature
    }

    /// Whether the most likely token is always taken (lowest id on a tie).
    #[must_use]
    pub const fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Only the `k` most likely tokens may be drawn; `None` means all.
    #[must_use]
    pub const fn top_k(&self) -> Option<u32> {
        self.top_k
    }

    /// Only the smallest set of most likely tokens whose probabilities reach this sum may be drawn; 1 means all.
    #[must_use]
    pub const fn top_p(&self) -> f32 {
        self.top_p
    }

    /// Only tokens at least this fraction as likely as the most likely one may be drawn; 0 means all.
    #[must_use]
    pub const fn min_p(&self) -> f32 {
        self.min_p
    }

    /// Seed of the counter-based generator; the same request with the same seed draws the same tokens.
    #[must_use]
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// Subtracted once from the logit of every token generated so far; 0 means none.
    #[must_use]
    pub const fn presence_penalty(&self) -> f32 {
        self.presence_penalty
    }

    /// Subtracted from a token's logit for each time it was generated; 0 means none.
    #[must_use]
    pub const fn frequency_penalty(&self) -> f32 {
        self.frequency_penalty
    }

    /// Divides a positive logit, and multiplies a negative one, of every token of the prompt and the output; 1 means
    /// none.
    #[must_use]
    pub const fn repetition_penalty(&self) -> f32 {
        self.repetition_penalty
    }

    /// Whether any penalty changes a logit.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }
}

/// How many alternatives to report beside the token's own log-probability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Logprobs {
    top: u32,
}

impl Logprobs {
    /// The `top` most likely alternatives at each position; 0 asks for the token's own value only.
    ///
    /// # Errors
    /// [`Error::TooMany`] above [`LOGPROBS_TOP_MAX`].
    pub const fn new(top: u32) -> Result<Self, Error> {
        if top > LOGPROBS_TOP_MAX {
            return Err(Error::TooMany { got: top as u64, max: LOGPROBS_TOP_MAX as u64 });
        }
        Ok(Self { top })
    }

    /// The number of alternatives.
    #[must_use]
    pub const fn top(self) -> u32 {
        self.top
    }
}

/// Everything about one request's generation that the engine needs, valid by construction.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    pub(crate) sampling: SamplingParams,
    pub(crate) rules: Arc<TokenRules>,
    pub(crate) sequences: u32,
    pub(crate) max_tokens: u32,
    pub(crate) min_tokens: u32,
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) ignore_eos: bool,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) prompt_logprobs: Option<Logprobs>,
}

impl Generation {
    /// How tokens are drawn.
    #[must_use]
    pub const fn sampling(&self) -> &SamplingParams {
        &self.sampling
    }

    /// Which tokens it wants more, less, or not at all.
    #[must_use]
    pub const fn rules(&self) -> &Arc<TokenRules> {
        &self.rules
    }

    /// How many sequences to generate from the prompt (`n`); at least 1.
    #[must_use]
    pub const fn sequences(&self) -> u32 {
        self.sequences
    }

    /// Whether drawing a token needs to know the tokens before it.
    #[must_use]
    pub fn needs_history(&self) -> bool {
        self.sampling.has_penalties() || !self.rules.bad_words.is_empty()
    }

    /// Most tokens to generate; at least 1.
    #[must_use]
    pub const fn max_tokens(&self) -> u32 {
        self.max_tokens
    }

    /// Stop tokens are not drawn before this many tokens; at most [`Generation::max_tokens`].
    #[must_use]
    pub const fn min_tokens(&self) -> u32 {
        self.min_tokens
    }

    /// Tokens that end the sequence besides the model's own.
    #[must_use]
    pub fn stop_token_ids(&self) -> &[TokenId] {
        &self.stop_token_ids
    }

    /// Whether the model's end-of-sequence tokens are treated as ordinary ones.
    #[must_use]
    pub const fn ignore_eos(&self) -> bool {
        self.ignore_eos
    }

    /// Log-probabilities of generated tokens, when asked for.
    #[must_use]
    pub const fn logprobs(&self) -> Option<Logprobs> {
        self.logprobs
    }

    /// Log-probabilities of prompt tokens, when asked for.
    #[must_use]
    pub const fn prompt_logprobs(&self) -> Option<Logprobs> {
        self.prompt_logprobs
    }

    /// The same generation with at most `room` tokens, for a prompt that leaves no more in the context.
    #[must_use]
    pub fn limited_to(mut self, room: u32) -> Self {
        self.max_tokens = self.max_tokens.min(room.max(1));
        self.min_tokens = self.min_tokens.min(self.max_tokens);
        self
    }
}
