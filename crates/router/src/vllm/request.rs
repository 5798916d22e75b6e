//! A request of vLLM's API as one of ours. Every field works or is refused by its name.

use proto::vllm::candidate_tokens::Select;
use proto::vllm::decoding_parameters::StructuredOutput;
use proto::{Failure, Violation, v1, vllm};

/// As vLLM's server has it.
const MAX_TOKENS_DEFAULT: u32 = 20;
/// A token's rank is found among this many of the most likely ones.
const RANKED: u32 = 20;

/// A request in our terms.
pub(super) struct Asked {
    pub(super) request: v1::GenerateRequest,
    /// Most tokens of the prompt.
    pub(super) truncate: Option<usize>,
    pub(super) shown: Shown,
}

/// What the caller wants to see.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown {
    pub(super) sequences: u32,
    pub(super) include_stop: bool,
    pub(super) prompt: Part,
    pub(super) output: Part,
}

/// What is shown of the prompt's tokens, or of the output's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) text: bool,
    pub(super) token_ids: bool,
    pub(super) logprobs: Option<Logprobs>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Logprobs {
    /// Of the tokens themselves.
    pub(super) own: bool,
    /// Of others beside each.
    pub(super) candidates: u32,
}

impl Logprobs {
    /// Alternatives to ask a leader for.
    fn asked(self) -> u32 {
        if self.own { self.candidates.max(RANKED) } else { self.candidates }
    }
}

/// The fields found wrong so far.
#[derive(Default)]
struct Refused(Vec<Violation>);

impl Refused {
    /// Refuses a field that is set.
    fn unsupported(&mut self, field: &'static str, set: bool) {
        if set {
            self.0.push(Violation::new(field, "is not supported"));
        }
    }

    /// -1 is no limit.
    fn budget(&mut self, given: Option<i64>) -> Option<u32> {
        let given = given.filter(|&budget| budget != -1)?;
        let budget = u32::try_from(given).ok();
        if budget.is_none() {
            let reason = format!("must be at least 0, or -1 for no limit, not {given}");
            self.0.push(Violation::new("stopping.thinking_token_budget", reason));
        }
        budget
    }

    fn logprobs(
        &mut self,
        field: &'static str,
        own: bool,
        candidates: Option<vllm::CandidateTokens>,
    ) -> Option<Logprobs> {
        let candidates = match candidates.and_then(|candidates| candidates.select) {
            None | Some(Select::All(false)) => None,
            Some(Select::TopN(most)) => Some(most),
            Some(Select::TokenIds(_)) => {
                self.0.push(Violation::new(format!("{field}.token_ids"), "is not supported; use top_n"));
                None
            }
            Some(Select::All(true)) => {
                self.0.push(Violation::new(format!("{field}.all"), "is not supported; use top_n"));
                None
            }
        };
        (own || candidates.is_some()).then(|| Logprobs { own, candidates: candidates.unwrap_or(0) })
    }
}

impl TryFrom<vllm::GenerateRequest> for Asked {
    type Error = Failure;

    /// # Errors
    /// [`Failure::Invalid`] with every field that is not supported.
    fn try_from(wire: vllm::GenerateRequest) -> Result<Self, Failure> {
        let mut refused = Refused::default();
        refused.unsupported("media", !wire.media.is_empty());
        refused.unsupported("lora_name", !wire.lora_name.is_empty());
        refused.unsupported("kv_hints", wire.kv_hints.is_some());
        refused.unsupported("engine_reasoning_gate", wire.engine_reasoning_gate.is_some());
        let kv = wire.kv.unwrap_or_default();
        refused.unsupported("kv.kv_transfer_params", kv.kv_transfer_params.is_some());
        refused.unsupported("kv.ec_transfer_params", kv.ec_transfer_params.is_some());
        let decoding = wire.decoding.unwrap_or_default();
        let random = wire.sampling.unwrap_or_default();
        let stopping = wire.stopping.unwrap_or_default();
        let budget = refused.budget(stopping.thinking_token_budget);
        let asked = wire.response.unwrap_or_default();
        let prompt = Part {
            text: false,
            token_ids: asked.prompt_token_ids,
            logprobs: refused.logprobs(
                "response.prompt_candidates",
                asked.prompt_logprobs,
                asked.prompt_candidates,
            ),
        };
        let output = Part {
            text: asked.output_text.unwrap_or(true),
            token_ids: asked.output_token_ids,
            logprobs: refused.logprobs(
                "response.output_candidates",
                asked.output_logprobs,
                asked.output_candidates,
            ),
        };
        if !refused.0.is_empty() {
            return Err(Failure::Invalid(refused.0));
        }
        let shown = Shown {
            sequences: random.num_sequences.max(1),
            include_stop: stopping.include_stop_strings,
            prompt,
            output,
        };
        let request = v1::GenerateRequest {
            request_id: wire.request_id,
            model: wire.model,
            prompt: wire.prompt.map(ours),
            priority: wire.priority,
            cache_salt: kv.cache_salt,
            bypass_prefix_cache: kv.bypass_prefix_cache,
            constraint: decoding.structured_output.clone().map(constraint),
            sampling: Some(sampling(wire.temperature, random, decoding)),
            stopping: Some(ours_stopping(stopping, budget)),
            response: Some(v1::Response {
                logprobs: output.logprobs.map(Logprobs::asked),
                prompt_logprobs: prompt.logprobs.map(Logprobs::asked),
                keep_special_tokens: !asked.skip_special_tokens.unwrap_or(true),
                parse: false,
            }),
            session_id: wire.session_id.unwrap_or_default(),
        };
        let truncate = usize::try_from(wire.truncate_prompt_tokens).ok().filter(|&most| most > 0);
        Ok(Self { request, truncate, shown })
    }
}

fn sampling(
    temperature: Option<f32>,
    random: vllm::RandomSampling,
    decoding: vllm::DecodingParameters,
) -> v1::Sampling {
    v1::Sampling {
        temperature: Some(temperature.unwrap_or(0.0)),
        top_k: random.top_k,
        top_p: random.top_p,
        min_p: random.min_p,
        seed: random.seed.map(i64::cast_unsigned),
        n: Some(random.num_sequences.max(1)),
        presence_penalty: Some(decoding.presence_penalty),
        frequency_penalty: Some(decoding.frequency_penalty),
        repetition_penalty: Some(decoding.repetition_penalty).filter(|&penalty| penalty != 0.0),
        logit_bias: decoding.logit_bias.into_iter().collect(),
        allowed_token_ids: decoding.allowed_token_ids,
        bad_words: Vec::new(),
        bad_word_token_ids: decoding.bad_words_token_ids.into_iter().map(token_ids).collect(),
    }
}

fn ours_stopping(stopping: vllm::StoppingCriteria, thinking_tokens_max: Option<u32>) -> v1::Stopping {
    let most = match stopping.max_new_tokens {
        0 => MAX_TOKENS_DEFAULT,
        most => most,
    };
    v1::Stopping {
        max_tokens: Some(most),
        min_tokens: Some(stopping.min_new_tokens),
        stop: stopping.stop_strings,
        stop_token_ids: stopping.stop_token_ids,
        ignore_eos: stopping.ignore_eos,
        thinking_tokens_max,
    }
}

/// Constraints go under the same names.
fn constraint(structured: StructuredOutput) -> v1::Constraint {
    use v1::constraint::Form;
    let form = match structured {
        StructuredOutput::Json(schema) => Form::Json(schema),
        StructuredOutput::Regex(regex) => Form::Regex(regex),
        StructuredOutput::Choice(choice) => Form::Choice(v1::Choices { choices: choice.choices }),
        StructuredOutput::Grammar(grammar) => Form::Grammar(grammar),
        StructuredOutput::JsonObject(any) => Form::JsonObject(any),
        StructuredOutput::StructuralTag(tag) => Form::StructuralTag(tag),
    };
    v1::Constraint { form: Some(form) }
}

fn ours(prompt: vllm::generate_request::Prompt) -> v1::generate_request::Prompt {
    match prompt {
        vllm::generate_request::Prompt::Text(text) => v1::generate_request::Prompt::Text(text),
        vllm::generate_request::Prompt::TokenIds(ids) => {
            v1::generate_request::Prompt::TokenIds(token_ids(ids))
        }
    }
}

fn token_ids(wire: vllm::TokenIds) -> v1::TokenIds {
    v1::TokenIds { ids: wire.ids }
}

/// Fields of our sampling that this API has under `decoding`.
const DECODING: [&str; 5] =
    ["presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids"];

/// A failure whose fields have the names this API's callers sent.
pub(super) fn renamed(failure: Failure) -> Failure {
    let rename = |violation: Violation| {
        let Violation { field, reason } = violation;
        let name = match field.split(['[', '.']).next() {
            Some("prompt" | "token_ids" | "text") => field.into_owned(),
            _ => match &*field {
                "sampling.temperature" => "temperature".to_owned(),
                "sampling.n" => "sampling.num_sequences".to_owned(),
                "sampling.bad_words" => "decoding.bad_words_token_ids".to_owned(),
                "cache_salt" => "kv.cache_salt".to_owned(),
                "stopping.thinking_tokens_max" => "stopping.thinking_token_budget".to_owned(),
                "stopping.max_tokens" => "stopping.max_new_tokens".to_owned(),
                "stopping.min_tokens" => "stopping.min_new_tokens".to_owned(),
                "response.logprobs" => "response.output_candidates".to_owned(),
                "response.prompt_logprobs" => "response.prompt_candidates".to_owned(),
                other => {
                    let name = other.strip_prefix("constraint").map(|form| format!("decoding{form}"));
                    let name =
                        name.unwrap_or_else(|| other.replace("stopping.stop[", "stopping.stop_strings["));
                    match name.strip_prefix("sampling.") {
                        Some(own) if DECODING.contains(&own) => format!("decoding.{own}"),
                        _ => name,
                    }
                }
            },
        };
        // min_tokens is compared with max_tokens in the words of our own API.
        Violation::new(name, reason.replace("max_tokens", "max_new_tokens"))
    };
    match failure {
        Failure::Invalid(wrong) => Failure::Invalid(wrong.into_iter().map(rename).collect()),
        other => other,
    }
}
