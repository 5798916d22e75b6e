//! Messages to our types and back, where a plain `From` or `TryFrom` says it all.

use types::limits::{BAD_WORD_BYTES_MAX, BAD_WORD_TEXTS_MAX, STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX};
use types::{Constraint, Generation, GenerationSpec, Priority, TokenId};

use crate::{Failure, Violation, v1, worker};

/// How an API names the fields of a [`GenerationSpec`], so that a refusal names the field its caller sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationFields {
    /// `cohort.v1.GenerateRequest`: `sampling.top_p`, `stopping.max_tokens`, `response.logprobs`.
    Public,
    /// `cohort.worker.v1.GenerateRequest`: `generation.top_p`.
    Worker,
}

impl GenerationFields {
    /// Turns a refusal of [`GenerationSpec::validate`] into a failure whose fields are named as this API does.
    #[must_use]
    pub fn refuse(self, error: types::Error) -> Failure {
        match error {
            types::Error::Invalid(wrong) => {
                let name = |v: types::FieldViolation| Violation::new(self.name(v.field), v.reason);
                Failure::Invalid(wrong.into_iter().map(name).collect())
            }
            other @ (types::Error::Rank { .. }
            | types::Error::Count { .. }
            | types::Error::Priority { .. }
            | types::Error::TooMany { .. }) => Violation::new("generation", other.to_string()).into(),
        }
    }

    fn name(self, field: &str) -> String {
        let group = match (self, field) {
            (Self::Worker, _) => "generation",
            (Self::Public, "max_tokens" | "min_tokens" | "stop_token_ids" | "ignore_eos") => "stopping",
            (Self::Public, "logprobs" | "prompt_logprobs") => "response",
            (Self::Public, _) => "sampling",
        };
        format!("{group}.{field}")
    }

    /// A leader's refusal with the fields named as the caller of this API knows them.
    #[must_use]
    pub fn rename(self, failure: Failure) -> Failure {
        let Failure::Invalid(wrong) = failure else { return failure };
        let rename = |violation: Violation| match violation.field.strip_prefix("generation.") {
            Some(field) => Violation::new(self.name(field), violation.reason),
            None => violation,
        };
        Failure::Invalid(wrong.into_iter().map(rename).collect())
    }
}

/// A caller's priority, of which the lowest is handled first, as the engine knows it.
///
/// # Errors
/// [`Failure::Invalid`] when it is out of range.
pub fn priority(lower_first: i32) -> Result<Priority, Failure> {
    let given = Priority::new(lower_first).map_err(|error| Violation::new("priority", error.to_string()))?;
    Priority::new(-given.level()).map_err(|error| Failure::Internal { why: error.to_string() })
}

/// Everything but those `bad_words` that are text: whoever has the tokenizer adds them. Tools may make it guided too.
impl From<&v1::GenerateRequest> for GenerationSpec {
    fn from(request: &v1::GenerateRequest) -> Self {
        let sampling = request.sampling.clone().unwrap_or_default();
        let stopping = request.stopping.clone().unwrap_or_default();
        let response = request.response.unwrap_or_default();
        Self {
            max_tokens: stopping.max_tokens,
            min_tokens: stopping.min_tokens,
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            seed: sampling.seed,
            stop_token_ids: stopping.stop_token_ids,
            ignore_eos: stopping.ignore_eos,
            logprobs: response.logprobs,
            prompt_logprobs: response.prompt_logprobs,
            n: sampling.n,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            repetition_penalty: sampling.repetition_penalty,
            logit_bias: sampling.logit_bias.into_iter().collect(),
            allowed_token_ids: sampling.allowed_token_ids,
            bad_words: sampling.bad_word_token_ids.into_iter().map(|word| word.ids).collect(),
            guided: request.constraint.clone().and_then(constraint).is_some(),
        }
    }
}

/// Whether it is guided is said beside it.
impl From<worker::Generation> for GenerationSpec {
    fn from(wire: worker::Generation) -> Self {
        Self {
            max_tokens: wire.max_tokens,
            min_tokens: wire.min_tokens,
            temperature: wire.temperature,
            top_k: wire.top_k,
            top_p: wire.top_p,
            min_p: wire.min_p,
            seed: wire.seed,
            stop_token_ids: wire.stop_token_ids,
            ignore_eos: wire.ignore_eos,
            logprobs: wire.logprobs,
            prompt_logprobs: wire.prompt_logprobs,
            n: wire.n,
            presence_penalty: wire.presence_penalty,
            frequency_penalty: wire.frequency_penalty,
            repetition_penalty: wire.repetition_penalty,
            logit_bias: wire.logit_bias.into_iter().collect(),
            allowed_token_ids: wire.allowed_token_ids,
            bad_words: wire.bad_words.into_iter().map(|word| word.ids).collect(),
            guided: false,
        }
    }
}

impl From<&Generation> for worker::Generation {
    fn from(generation: &Generation) -> Self {
        let (sampling, rules) = (generation.sampling(), generation.rules());
        let raw = |ids: &[TokenId]| ids.iter().map(|&TokenId(id)| id).collect::<Vec<u32>>();
        Self {
            max_tokens: Some(generation.max_tokens()),
            min_tokens: Some(generation.min_tokens()),
            temperature: Some(sampling.temperature()),
            top_k: sampling.top_k(),
            top_p: Some(sampling.top_p()),
            min_p: Some(sampling.min_p()),
            seed: Some(sampling.seed()),
            stop_token_ids: raw(generation.stop_token_ids()),
            ignore_eos: generation.ignore_eos(),
            logprobs: generation.logprobs().map(types::Logprobs::top),
            prompt_logprobs: generation.prompt_logprobs().map(types::Logprobs::top),
            n: Some(generation.sequences()),
            presence_penalty: Some(sampling.presence_penalty()),
            frequency_penalty: Some(sampling.frequency_penalty()),
            repetition_penalty: Some(sampling.repetition_penalty()),
            logit_bias: rules.logit_bias().iter().map(|&(TokenId(id), bias)| (id, bias)).collect(),
            allowed_token_ids: raw(rules.allowed().unwrap_or_default()),
            bad_words: rules.bad_words().iter().map(|word| worker::TokenIds { ids: raw(word) }).collect(),
        }
    }
}

/// The form of an answer's text as a caller gave it; `None` for one that asks nothing.
#[must_use]
pub fn constraint(wire: v1::Constraint) -> Option<Constraint> {
    use v1::constraint::Form;
    match wire.form? {
        Form::Json(schema) => Some(Constraint::Json(schema)),
        Form::Regex(regex) => Some(Constraint::Regex(regex)),
        Form::Choice(v1::Choices { choices }) => Some(Constraint::Choice(choices)),
        Form::Grammar(grammar) => Some(Constraint::Grammar(grammar)),
        Form::JsonObject(wanted) => wanted.then_some(Constraint::JsonObject),
        Form::StructuralTag(tag) => Some(Constraint::StructuralTag(tag)),
    }
}

impl From<worker::TokenLogprob> for v1::TokenLogprob {
    fn from(wire: worker::TokenLogprob) -> Self {
        let top = wire.top.into_iter().map(|a| v1::Alternative { token_id: a.token_id, logprob: a.logprob });
        Self { token_id: wire.token_id, logprob: wire.logprob, top: top.collect() }
    }
}

impl From<worker::PromptLogprob> for v1::PromptLogprob {
    fn from(wire: worker::PromptLogprob) -> Self {
        Self { value: wire.value.map(Into::into) }
    }
}

impl TryFrom<worker::Finish> for v1::Finish {
    type Error = Failure;

    fn try_from(wire: worker::Finish) -> Result<Self, Failure> {
        let reason = match wire.reason() {
            worker::FinishReason::Eos | worker::FinishReason::StopToken => v1::FinishReason::Stop,
            worker::FinishReason::Length => v1::FinishReason::Length,
            worker::FinishReason::Unspecified => {
                let why =
                    format!("the leader ended a stream with finish reason {}, which is unknown", wire.reason);
                return Err(Failure::Internal { why });
            }
        };
        let matched = match reason {
            v1::FinishReason::Stop => wire.token_id.map(v1::finish::Matched::TokenId),
            v1::FinishReason::Length | v1::FinishReason::Unspecified => None,
        };
        Ok(Self { reason: reason.into(), matched })
    }
}

/// Checks a request's stop strings: at most [`STOP_STRINGS_MAX`], none empty, none above [`STOP_STRING_BYTES_MAX`]
/// bytes. One violation for each that is refused, named `stopping.stop[i]`.
#[must_use]
pub fn stop_strings(stop: &[String]) -> Vec<Violation> {
    texts("stopping.stop", stop, (STOP_STRINGS_MAX, STOP_STRING_BYTES_MAX))
}

/// Checks a request's bad words: at most [`BAD_WORD_TEXTS_MAX`], none empty, none above [`BAD_WORD_BYTES_MAX`] bytes.
/// One violation for each that is refused, named `sampling.bad_words[i]`.
#[must_use]
pub fn bad_words(words: &[String]) -> Vec<Violation> {
    texts("sampling.bad_words", words, (BAD_WORD_TEXTS_MAX, BAD_WORD_BYTES_MAX))
}

fn texts(field: &'static str, texts: &[String], max: (usize, usize)) -> Vec<Violation> {
    let (texts_max, bytes_max) = max;
    let mut wrong = Vec::new();
    if texts.len() > texts_max {
        return vec![Violation::new(field, format!("has {} entries; at most {texts_max}", texts.len()))];
    }
    for (index, text) in texts.iter().enumerate() {
        let reason = match text.len() {
            0 => "is empty and would match everywhere".to_owned(),
            bytes if bytes <= bytes_max => continue,
            bytes => format!("has {bytes} bytes; at most {bytes_max}"),
        };
        wrong.push(Violation::new(format!("{field}[{index}]"), reason));
    }
    wrong
}
