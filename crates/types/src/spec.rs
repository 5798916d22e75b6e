//! What came over the wire, and the checks that turn it into a [`Generation`].

use std::fmt;
use std::sync::Arc;

use crate::limits::{
    BAD_WORD_TOKENS_MAX, BAD_WORDS_MAX, LOGIT_BIAS_ABS_MAX, LOGIT_BIAS_MAX, MAX_TOKENS_DEFAULT,
    PENALTY_ABS_MAX, REPETITION_PENALTY_MAX, SEQUENCES_MAX, STOP_TOKENS_MAX, TEMPERATURE_MAX, TOP_K_MAX,
};
use crate::{Error, FieldViolation, Generation, Logprobs, SamplingParams, TokenId, TokenRules};

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
    /// Sequences to generate from the prompt; default 1.
    pub n: Option<u32>,
    /// See [`SamplingParams::presence_penalty`]; default 0.
    pub presence_penalty: Option<f32>,
    /// See [`SamplingParams::frequency_penalty`]; default 0.
    pub frequency_penalty: Option<f32>,
    /// See [`SamplingParams::repetition_penalty`]; default 1.
    pub repetition_penalty: Option<f32>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may be drawn; empty means all.
    pub allowed_token_ids: Vec<u32>,
    /// Runs of tokens that must not be generated.
    pub bad_words: Vec<Vec<u32>>,
    /// Whether a grammar says what may be drawn, and so where the sequence ends.
    pub guided: bool,
}

impl GenerationSpec {
    /// Checks every field and names all that are wrong.
    ///
    /// `seed_default` is used when the request has no seed; `vocab_size` bounds the token ids.
    ///
    /// # Errors
    /// [`Error::Invalid`] with one entry for each refused field.
    pub fn validate(self, seed_default: u64, vocab_size: u32) -> Result<Generation, Error> {
        let mut checks = Checks { wrong: Vec::new(), vocab_size };
        let sampling = checks.sampling(&self, seed_default);
        let (max_tokens, min_tokens) = checks.lengths(&self);
        checks.stops(&self.stop_token_ids);
        let logprobs = checks.alternatives("logprobs", self.logprobs);
        let prompt_logprobs = checks.alternatives("prompt_logprobs", self.prompt_logprobs);
        let sequences = self.n.unwrap_or(1);
        if !(1..=SEQUENCES_MAX).contains(&sequences) {
            checks.refuse("n", format!("must be between 1 and {SEQUENCES_MAX}, not {sequences}"));
        }
        if self.guided {
            checks.guided(&self);
        }
        let rules = checks.rules(self.logit_bias, self.allowed_token_ids, self.bad_words);
        if !checks.wrong.is_empty() {
            return Err(Error::Invalid(checks.wrong));
        }
        Ok(Generation {
            sampling,
            rules: Arc::new(rules),
            sequences,
            max_tokens,
            min_tokens,
            stop_token_ids: ids(self.stop_token_ids),
            ignore_eos: self.ignore_eos,
            logprobs,
            prompt_logprobs,
        })
    }
}

fn ids(raw: Vec<u32>) -> Vec<TokenId> {
    raw.into_iter().map(TokenId).collect()
}

/// The fields found wrong so far.
struct Checks {
    wrong: Vec<FieldViolation>,
    vocab_size: u32,
}

impl Checks {
    fn refuse(&mut self, field: &'static str, reason: impl Into<String>) {
        self.wrong.push(FieldViolation::new(field, reason));
    }

    /// Refuses a number for which `right` is false; no comparison holds for one that is not a number.
    fn number(&mut self, field: &'static str, got: f32, right: bool, range: impl fmt::Display) {
        if !right {
            self.refuse(field, format!("must be {range}, not {got}"));
        }
    }

    fn sampling(&mut self, spec: &GenerationSpec, seed_default: u64) -> SamplingParams {
        let temperature = spec.temperature.unwrap_or(1.0);
        let right = (0.0..=TEMPERATURE_MAX).contains(&temperature);
        self.number("temperature", temperature, right, format_args!("between 0 and {TEMPERATURE_MAX}"));
        let top_p = spec.top_p.unwrap_or(1.0);
        self.number("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1");
        let min_p = spec.min_p.unwrap_or(0.0);
        self.number("min_p", min_p, (0.0..=1.0).contains(&min_p), "between 0 and 1");
        let top_k = spec.top_k.filter(|&k| k != 0);
        if let Some(k) = top_k
            && k > TOP_K_MAX
        {
            self.refuse("top_k", format!("must be at most {TOP_K_MAX}, not {k}; 0 means all"));
        }
        let penalties =
            [("presence_penalty", spec.presence_penalty), ("frequency_penalty", spec.frequency_penalty)];
        let [presence_penalty, frequency_penalty] = penalties.map(|(field, got)| {
            let got = got.unwrap_or(0.0);
            let right = (-PENALTY_ABS_MAX..=PENALTY_ABS_MAX).contains(&got);
            self.number(field, got, right, format_args!("between -{PENALTY_ABS_MAX} and {PENALTY_ABS_MAX}"));
            got
        });
        let repetition_penalty = spec.repetition_penalty.unwrap_or(1.0);
        let right = repetition_penalty > 0.0 && repetition_penalty <= REPETITION_PENALTY_MAX;
        let range = format_args!("above 0 and at most {REPETITION_PENALTY_MAX}");
        self.number("repetition_penalty", repetition_penalty, right, range);
        SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            seed: spec.seed.unwrap_or(seed_default),
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
        }
    }

    fn lengths(&mut self, spec: &GenerationSpec) -> (u32, u32) {
        if spec.max_tokens == Some(0) {
            self.refuse("max_tokens", "must be at least 1");
        }
        let max_tokens = spec.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT);
        let min_tokens = spec.min_tokens.unwrap_or(0);
        if min_tokens > max_tokens {
            self.refuse("min_tokens", format!("{min_tokens} is above max_tokens, {max_tokens}"));
        }
        (max_tokens, min_tokens)
    }

    fn stops(&mut self, stops: &[u32]) {
        if stops.len() > STOP_TOKENS_MAX {
            self.refuse("stop_token_ids", format!("has {} entries; at most {STOP_TOKENS_MAX}", stops.len()));
        }
        self.in_vocabulary("stop_token_ids", stops.iter().copied());
    }

    /// Refuses what would take from a grammar the only tokens it allows.
    fn guided(&mut self, spec: &GenerationSpec) {
        const REASON: &str =
            "cannot be combined with a form of the answer, which says what may be drawn and where it ends";
        if spec.min_tokens.unwrap_or(0) > 0 {
            self.refuse("min_tokens", REASON);
        }
        if spec.ignore_eos {
            self.refuse("ignore_eos", REASON);
        }
        if !spec.allowed_token_ids.is_empty() {
            self.refuse("allowed_token_ids", REASON);
        }
    }

    fn in_vocabulary(&mut self, field: &'static str, mut ids: impl Iterator<Item = u32>) {
        let vocab_size = self.vocab_size;
        if let Some(id) = ids.find(|&id| id >= vocab_size) {
            self.refuse(field, format!("token id {id} is not below the vocabulary size {vocab_size}"));
        }
    }

    fn rules(
        &mut self,
        bias: Vec<(u32, f32)>,
        mut allowed: Vec<u32>,
        bad_words: Vec<Vec<u32>>,
    ) -> TokenRules {
        self.bias(&bias);
        self.in_vocabulary("allowed_token_ids", allowed.iter().copied());
        allowed.sort_unstable();
        allowed.dedup();
        if bad_words.len() > BAD_WORDS_MAX {
            self.refuse("bad_words", format!("has {} entries; at most {BAD_WORDS_MAX}", bad_words.len()));
        }
        if let Some(word) = bad_words.iter().find(|word| !(1..=BAD_WORD_TOKENS_MAX).contains(&word.len())) {
            let reason = format!("a word has {} tokens; it must have 1 to {BAD_WORD_TOKENS_MAX}", word.len());
            self.refuse("bad_words", reason);
        }
        self.in_vocabulary("bad_words", bad_words.iter().flatten().copied());
        TokenRules {
            logit_bias: bias.into_iter().map(|(id, bias)| (TokenId(id), bias)).collect(),
            allowed: ids(allowed),
            bad_words: bad_words.into_iter().map(ids).collect(),
        }
    }

    fn bias(&mut self, bias: &[(u32, f32)]) {
        if bias.len() > LOGIT_BIAS_MAX {
            self.refuse("logit_bias", format!("has {} entries; at most {LOGIT_BIAS_MAX}", bias.len()));
            return;
        }
        self.in_vocabulary("logit_bias", bias.iter().map(|entry| entry.0));
        let range = -LOGIT_BIAS_ABS_MAX..=LOGIT_BIAS_ABS_MAX;
        if let Some(&(id, got)) = bias.iter().find(|entry| !range.contains(&entry.1)) {
            let most = LOGIT_BIAS_ABS_MAX;
            self.refuse("logit_bias", format!("of token {id} must be between -{most} and {most}, not {got}"));
        }
        let mut ids: Vec<u32> = bias.iter().map(|entry| entry.0).collect();
        ids.sort_unstable();
        if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            self.refuse("logit_bias", format!("has token {} twice; it must have each once", twice[0]));
        }
    }

    fn alternatives(&mut self, field: &'static str, top: Option<u32>) -> Option<Logprobs> {
        match top.map(Logprobs::new)? {
            Ok(logprobs) => Some(logprobs),
            Err(error) => {
                self.refuse(field, error.to_string());
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::LOGPROBS_TOP_MAX;

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
    fn every_bad_rule_is_named_at_once() {
        let spec = GenerationSpec {
            n: Some(0),
            presence_penalty: Some(2.5),
            frequency_penalty: Some(f32::NAN),
            repetition_penalty: Some(0.0),
            logit_bias: vec![(100, 1.0), (3, 101.0), (3, 1.0)],
            allowed_token_ids: vec![5, 100],
            bad_words: vec![vec![], vec![100]],
            ..GenerationSpec::default()
        };
        let expected = [
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "n",
            "logit_bias",
            "logit_bias",
            "logit_bias",
            "allowed_token_ids",
            "bad_words",
            "bad_words",
        ];
        assert_eq!(refused(spec), expected);
    }

    #[test]
    fn what_would_starve_a_grammar_is_refused_by_its_name() {
        let spec = GenerationSpec {
            guided: true,
            min_tokens: Some(1),
            ignore_eos: true,
            allowed_token_ids: vec![4],
            ..GenerationSpec::default()
        };
        assert_eq!(refused(spec), ["min_tokens", "ignore_eos", "allowed_token_ids"]);
        assert!(refused(GenerationSpec { guided: true, ..GenerationSpec::default() }).is_empty());
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
