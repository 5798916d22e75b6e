//! The fields that chat and plain completions share.

use std::collections::BTreeMap;

use proto::{Failure, Violation, v1};
use serde::Deserialize;

use super::fields::Fields;
use super::form::{self, AskedBy};

/// Most answers to one request: each holds a place among the admitted ones.
pub(super) const CHOICES_MAX: usize = 128;

/// Fields that have no effect at this value. A field without a value is always refused.
const WITHOUT_EFFECT: [(&str, &str); 6] = [
    ("store", "false"),
    ("metadata", "{}"),
    ("service_tier", "\"auto\""),
    ("use_beam_search", "false"),
    ("length_penalty", "1"),
    ("spaces_between_special_tokens", "true"),
];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// What a caller wants to see of its answers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Shown {
    pub(super) include_usage: bool,
    pub(super) include_stop: bool,
    pub(super) return_token_ids: bool,
    /// How many answers to a prompt are shown, the likeliest first; all of them, as they come, when unset.
    pub(super) best: Option<usize>,
}

/// What a request says beside its prompt.
#[derive(Debug)]
pub(super) struct Common {
    /// Everything but the prompt and log-probabilities.
    pub(super) request: v1::GenerateRequest,
    pub(super) stream: bool,
    /// Whether log-probabilities are shown.
    pub(super) logprobs: bool,
    pub(super) shown: Shown,
    /// Which field asked for the form of the text.
    pub(super) asked_by: AskedBy,
}

impl Common {
    /// Takes the shared fields.
    pub(super) fn take(fields: &mut Fields) -> Self {
        let stream = fields.take("stream").unwrap_or(false);
        let options: Option<StreamOptions> = fields.take("stream_options");
        if options.is_some() && !stream {
            fields.refuse("stream_options", "is for streams; set stream as well");
        }
        let (constraint, asked_by) = form::take(fields);
        let request = v1::GenerateRequest {
            request_id: fields.take("request_id").unwrap_or_default(),
            model: fields.take("model").unwrap_or_default(),
            prompt: None,
            sampling: Some(take_sampling(fields)),
            stopping: Some(take_stopping(fields)),
            response: Some(v1::Response {
                prompt_logprobs: fields.take("prompt_logprobs"),
                keep_special_tokens: !fields.take("skip_special_tokens").unwrap_or(true),
                ..v1::Response::default()
            }),
            priority: fields.take("priority").unwrap_or_default(),
            cache_salt: take_salt(fields),
            bypass_prefix_cache: fields.take("bypass_prefix_cache").unwrap_or(false),
            constraint,
            session_id: fields.take("session_id").unwrap_or_default(),
        };
        if stream && request.response.is_some_and(|response| response.prompt_logprobs.is_some()) {
            fields.refuse("prompt_logprobs", "is not for streams");
        }
        for name in ["user", "safety_identifier"] {
            if let Some(caller) = fields.take::<String>(name) {
                tracing::debug!(request = request.request_id, caller, "asked on behalf of");
            }
        }
        let shown = Shown {
            include_usage: options.is_some_and(|options| options.include_usage),
            include_stop: fields.take("include_stop_str_in_output").unwrap_or(false),
            return_token_ids: fields.take("return_token_ids").unwrap_or(false),
            best: None,
        };
        fields.without_effect(&WITHOUT_EFFECT);
        Self { request, stream, logprobs: false, shown, asked_by }
    }

    /// A refusal of the form with the name of the field that asked for it.
    pub(super) fn named(&self, failure: Failure) -> Failure {
        let Failure::Invalid(wrong) = failure else { return failure };
        let rename = |violation: Violation| match self.asked_by.rename(&violation.field) {
            Some(field) => Violation::new(field, violation.reason),
            None => violation,
        };
        Failure::Invalid(wrong.into_iter().map(rename).collect())
    }

    /// Answers to each prompt.
    pub(super) fn count(&self) -> usize {
        self.request.sampling.as_ref().and_then(|sampling| sampling.n).unwrap_or(1) as usize
    }
}

fn take_salt(fields: &mut Fields) -> String {
    let salt: Option<String> = fields.take("cache_salt");
    if salt.as_ref().is_some_and(String::is_empty) {
        fields.refuse("cache_salt", "is empty; leave it out to share with everybody");
    }
    salt.unwrap_or_default()
}

/// A map from token ids, which are texts as JSON has it, to numbers.
fn take_bias(fields: &mut Fields) -> BTreeMap<u32, f32> {
    let given: BTreeMap<String, f32> = fields.take("logit_bias").unwrap_or_default();
    let mut bias = BTreeMap::new();
    for (key, value) in given {
        match key.parse() {
            Ok(id) if bias.insert(id, value).is_none() => {}
            Ok(id) => fields.refuse("logit_bias", format!("has token {id} twice; it must have each once")),
            Err(_) => fields.refuse("logit_bias", format!("has `{key}`, which is not a token id")),
        }
    }
    bias
}

fn take_sampling(fields: &mut Fields) -> v1::Sampling {
    let top_k = match fields.take::<i64>("top_k") {
        // Both are in use for "all tokens".
        None | Some(-1) => None,
        Some(k) => u32::try_from(k).map(Some).unwrap_or_else(|_| {
            fields.refuse("top_k", format!("must be at least 0, or -1 for all, not {k}"));
            None
        }),
    };
    let allowed_token_ids: Option<Vec<u32>> = fields.take("allowed_token_ids");
    if allowed_token_ids.as_ref().is_some_and(Vec::is_empty) {
        fields.refuse("allowed_token_ids", "is empty; leave it out to allow all");
    }
    v1::Sampling {
        temperature: fields.take("temperature"),
        top_k,
        top_p: fields.take("top_p"),
        min_p: fields.take("min_p"),
        // A negative seed is as good as any: its 64 bits are taken.
        seed: fields.take::<i64>("seed").map(i64::cast_unsigned),
        n: fields.take("n"),
        presence_penalty: fields.take("presence_penalty"),
        frequency_penalty: fields.take("frequency_penalty"),
        repetition_penalty: fields.take("repetition_penalty"),
        logit_bias: take_bias(fields),
        allowed_token_ids: allowed_token_ids.unwrap_or_default(),
        bad_words: fields.take("bad_words").unwrap_or_default(),
        bad_word_token_ids: Vec::new(),
    }
}

fn take_stopping(fields: &mut Fields) -> v1::Stopping {
    let older: Option<u32> = fields.take("max_tokens");
    let newer: Option<u32> = fields.take("max_completion_tokens");
    if let (Some(older), Some(newer)) = (older, newer)
        && older != newer
    {
        fields.refuse("max_tokens", format!("is {older} and max_completion_tokens {newer}; set one of them"));
    }
    v1::Stopping {
        max_tokens: newer.or(older),
        min_tokens: fields.take("min_tokens"),
        stop: match fields.take("stop") {
            None => Vec::new(),
            Some(OneOrMore::One(stop)) => vec![stop],
            Some(OneOrMore::More(stop)) => stop,
        },
        stop_token_ids: fields.take("stop_token_ids").unwrap_or_default(),
        ignore_eos: fields.take("ignore_eos").unwrap_or(false),
        thinking_tokens_max: fields.take("thinking_token_budget"),
    }
}
