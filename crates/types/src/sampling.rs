//! What a request asks of generation. A [`GenerationSpec`] is what came over the wire; a [`Generation`] is valid by
//! construction, and the only thing the engine accepts.

use crate::limits::{LOGPROBS_TOP_MAX, MAX_TOKENS_DEFAULT, STOP_TOKENS_MAX, TEMPERATURE_MAX, TOP_K_MAX};
use crate::{Error, FieldViolation, TokenId};

/// How the next token is chosen from the logits. Applied in this order: temperature, top-k, top-p, min-p, draw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    temperature: f32,
    top_k: Option<u32>,
    top_p: f32,
    min_p: f32,
    seed: u64,
}

impl SamplingParams {
    /// Always the most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: None, top_p: 1.0, min_p: 0.0, seed: 0 };

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

/// Generation fields as they came over the wire: nothing has been checked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationSpec {
    /// Most tokens to generate.
    pub max_tokens: Option<u32>,
    /// End-of-sequence and stop tokens are not drawn before this many.
    pub min_tokens: Option<u32>,
    /// See [`SamplingParams::temperature`]; default 1.
    pub temperature: Option<f32>,
    /// See [`SamplingParams::top_k`]; 0 means all.
    pub top_k: Option<u32>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// See [`SamplingParams::seed`]; without one, `seed_default` of [`GenerationSpec::validate`] is used.
    pub seed: Option<u64>,
    /// Tokens that end the sequence besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Go on past the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Alternatives to report at each generated position.
    pub logprobs: Option<u32>,
    /// Alternatives to report at each prompt position.
    pub prompt_logprobs: Option<u32>,
}

/// Everything about one request's generation that the engine needs, valid by construction.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    sampling: SamplingParams,
    max_tokens: u32,
    min_tokens: u32,
    stop_token_ids: Vec<TokenId>,
    ignore_eos: bool,
    logprobs: Option<Logprobs>,
    prompt_logprobs: Option<Logprobs>,
}

impl Generation {
    /// How tokens are drawn.
    #[must_use]
    pub const fn sampling(&self) -> &SamplingParams {
        &self.sampling
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

impl GenerationSpec {
    /// Checks every field and names all that are wrong.
    ///
    /// `seed_default` is used when the request has no seed; `vocab_size` bounds the stop token ids.
    ///
    /// # Errors
    /// [`Error::Invalid`] with one entry for each refused field.
    pub fn validate(self, seed_default: u64, vocab_size: u32) -> Result<Generation, Error> {
        let mut wrong = Vec::new();
        let temperature = self.temperature.unwrap_or(1.0);
        if !(temperature.is_finite() && (0.0..=TEMPERATURE_MAX).contains(&temperature)) {
            let reason = format!("must be between 0 and {TEMPERATURE_MAX}, not {temperature}");
            wrong.push(FieldViolation::new("temperature", reason));
        }
        let top_p = self.top_p.unwrap_or(1.0);
        if !(top_p.is_finite() && top_p > 0.0 && top_p <= 1.0) {
            wrong.push(FieldViolation::new("top_p", format!("must be above 0 and at most 1, not {top_p}")));
        }
        let min_p = self.min_p.unwrap_or(0.0);
        if !(min_p.is_finite() && (0.0..=1.0).contains(&min_p)) {
            wrong.push(FieldViolation::new("min_p", format!("must be between 0 and 1, not {min_p}")));
        }
        let top_k = self.top_k.filter(|&k| k != 0);
        if let Some(k) = top_k
            && k > TOP_K_MAX
        {
            wrong.push(FieldViolation::new(
                "top_k",
                format!("must be at most {TOP_K_MAX}, not {k}; 0 means all"),
            ));
        }
        if self.max_tokens == Some(0) {
            wrong.push(FieldViolation::new("max_tokens", "must be at least 1"));
        }
        let max_tokens = self.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT);
        let min_tokens = self.min_tokens.unwrap_or(0);
        if min_tokens > max_tokens {
            let reason = format!("{min_tokens} is above max_tokens, {max_tokens}");
            wrong.push(FieldViolation::new("min_tokens", reason));
        }
        if self.stop_token_ids.len() > STOP_TOKENS_MAX {
            let reason = format!("has {} entries; at most {STOP_TOKENS_MAX}", self.stop_token_ids.len());
            wrong.push(FieldViolation::new("stop_token_ids", reason));
        }
        if let Some(&id) = self.stop_token_ids.iter().find(|&&id| id >= vocab_size) {
            let reason = format!("token id {id} is not below the vocabulary size {vocab_size}");
            wrong.push(FieldViolation::new("stop_token_ids", reason));
        }
        let logprobs = alternatives("logprobs", self.logprobs, &mut wrong);
        let prompt_logprobs = alternatives("prompt_logprobs", self.prompt_logprobs, &mut wrong);
        if !wrong.is_empty() {
            return Err(Error::Invalid(wrong));
        }
        Ok(Generation {
            sampling: SamplingParams {
                temperature,
                top_k,
                top_p,
                min_p,
                seed: self.seed.unwrap_or(seed_default),
            },
            max_tokens,
            min_tokens,
            stop_token_ids: self.stop_token_ids.into_iter().map(TokenId).collect(),
            ignore_eos: self.ignore_eos,
            logprobs,
            prompt_logprobs,
        })
    }
}

fn alternatives(field: &'static str, top: Option<u32>, wrong: &mut Vec<FieldViolation>) -> Option<Logprobs> {
    match top.map(Logprobs::new)? {
        Ok(logprobs) => Some(logprobs),
        Err(error) => {
            wrong.push(FieldViolation::new(field, error.to_string()));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(spec: GenerationSpec) -> Vec<&'static str> {
        match spec.validate(0, 100) {
            Ok(_) => Vec::new(),
            Err(Error::Invalid(wrong)) => wrong.iter().map(|v| v.field).collect(),
            Err(other) => panic!("unexpected {other}"),
        }
    }

    #[test]
    fn defaults_are_valid() {
        let generation = GenerationSpec::default().validate(7, 100).unwrap();
        assert_eq!(generation.sampling().temperature(), 1.0);
        assert_eq!(generation.sampling().seed(), 7);
        assert_eq!(generation.max_tokens(), MAX_TOKENS_DEFAULT);
    }

    #[test]
    fn every_bad_field_is_named_at_once() {
        let spec = GenerationSpec {
            temperature: Some(f32::NAN),
            top_p: Some(0.0),
            min_p: Some(f32::INFINITY),
            top_k: Some(u32::MAX),
            max_tokens: Some(0),
            min_tokens: Some(5),
            stop_token_ids: vec![100],
            logprobs: Some(LOGPROBS_TOP_MAX + 1),
            prompt_logprobs: Some(u32::MAX),
            ..GenerationSpec::default()
        };
        let expected = [
            "temperature",
            "top_p",
            "min_p",
            "top_k",
            "max_tokens",
            "min_tokens",
            "stop_token_ids",
            "logprobs",
            "prompt_logprobs",
        ];
        assert_eq!(refused(spec), expected);
    }

    #[test]
    fn a_top_k_of_zero_means_all() {
        let spec = GenerationSpec { top_k: Some(0), ..GenerationSpec::default() };
        assert_eq!(spec.validate(0, 100).unwrap().sampling().top_k(), None);
    }

    #[test]
    fn room_in_the_context_limits_min_tokens_too() {
        let spec = GenerationSpec { max_tokens: Some(50), min_tokens: Some(40), ..GenerationSpec::default() };
        let generation = spec.validate(0, 100).unwrap().limited_to(8);
        assert_eq!((generation.max_tokens(), generation.min_tokens()), (8, 8));
    }
}
