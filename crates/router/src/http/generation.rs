//! The fields that chat and plain completions share.

use std::num::NonZeroU32;

use proto::v1;
use serde::Deserialize;

use super::fields::Fields;

/// Most answers to one request: each holds a place among the admitted ones.
pub(super) const CHOICES_MAX: u32 = 128;

/// Fields that have no effect at this value. A field without a value is always refused.
const WITHOUT_EFFECT: [(&str, &str); 18] = [
    ("frequency_penalty", "0"),
    ("presence_penalty", "0"),
    ("repetition_penalty", "1"),
    ("logit_bias", "{}"),
    ("bad_words", "[]"),
    ("priority", "0"),
    ("best_of", "1"),
    ("response_format", "{\"type\":\"text\"}"),
    ("store", "false"),
    ("metadata", "{}"),
    ("service_tier", "\"auto\""),
    ("use_beam_search", "false"),
    ("length_penalty", "1"),
    ("spaces_between_special_tokens", "true"),
    ("allowed_token_ids", ""),
    ("structured_outputs", ""),
    ("cache_salt", ""),
    ("session_id", ""),
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
}

/// What a request says beside its prompt.
#[derive(Debug)]
pub(super) struct Common {
    /// Everything but the prompt and log-probabilities.
    pub(super) request: v1::GenerateRequest,
    /// Answers to each prompt.
    pub(super) count: NonZeroU32,
    pub(super) stream: bool,
    pub(super) shown: Shown,
}

impl Common {
    /// Takes the shared fields.
    pub(super) fn take(fields: &mut Fields) -> Self {
        let stream = fields.take("stream").unwrap_or(false);
        let options: Option<StreamOptions> = fields.take("stream_options");
        if options.is_some() && !stream {
            fields.refuse("stream_options", "is for streams; set stream as well");
        }
        let count = take_count(fields);
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
        };
        fields.without_effect(&WITHOUT_EFFECT);
        Self { request, count, stream, shown }
    }
}

fn take_count(fields: &mut Fields) -> NonZeroU32 {
    let count: u32 = fields.take("n").unwrap_or(1);
    match NonZeroU32::new(count).filter(|count| count.get() <= CHOICES_MAX) {
        Some(count) => count,
        None => {
            fields.refuse("n", format!("must be between 1 and {CHOICES_MAX}, not {count}"));
            NonZeroU32::MIN
        }
    }
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
    v1::Sampling {
        temperature: fields.take("temperature"),
        top_k,
        top_p: fields.take("top_p"),
        min_p: fields.take("min_p"),
        // A negative seed is as good as any: its 64 bits are taken.
        seed: fields.take::<i64>("seed").map(i64::cast_unsigned),
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
    }
}
