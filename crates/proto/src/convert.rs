//! Messages to our types and back, where a plain `From` or `TryFrom` says it all.

use types::limits::{STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX};
use types::{Generation, GenerationSpec, TokenId};

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
            (Self::Public, "temperature" | "top_k" | "top_p" | "min_p" | "seed") => "sampling",
            (Self::Public, "logprobs" | "prompt_logprobs") => "response",
            (Self::Public, _) => "stopping",
        };
        format!("{group}.{field}")
    }
}

impl From<&v1::GenerateRequest> for GenerationSpec {
    fn from(request: &v1::GenerateRequest) -> Self {
        let sampling = request.sampling.unwrap_or_default();
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
            ..Self::default()
        }
    }
}

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
            ..Self::default()
        }
    }
}

impl From<&Generation> for worker::Generation {
    fn from(generation: &Generation) -> Self {
        let sampling = generation.sampling();
        Self {
            max_tokens: Some(generation.max_tokens()),
            min_tokens: Some(generation.min_tokens()),
            temperature: Some(sampling.temperature()),
            top_k: sampling.top_k(),
            top_p: Some(sampling.top_p()),
            min_p: Some(sampling.min_p()),
            seed: Some(sampling.seed()),
            stop_token_ids: generation.stop_token_ids().iter().map(|&TokenId(id)| id).collect(),
            ignore_eos: generation.ignore_eos(),
            logprobs: generation.logprobs().map(types::Logprobs::top),
            prompt_logprobs: generation.prompt_logprobs().map(types::Logprobs::top),
        }
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
    let mut wrong = Vec::new();
    if stop.len() > STOP_STRINGS_MAX {
        let reason = format!("has {} entries; at most {STOP_STRINGS_MAX}", stop.len());
        return vec![Violation::new("stopping.stop", reason)];
    }
    for (index, text) in stop.iter().enumerate() {
        let reason = match text.len() {
            0 => "is empty and would match everywhere".to_owned(),
            1..=STOP_STRING_BYTES_MAX => continue,
            bytes => format!("has {bytes} bytes; at most {STOP_STRING_BYTES_MAX}"),
        };
        wrong.push(Violation::new(format!("stopping.stop[{index}]"), reason));
    }
    wrong
}
