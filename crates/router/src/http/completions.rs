//! The request of `/v1/completions`.

use proto::v1;
use proto::v1::generate_request::Prompt;
use serde::Deserialize;

use super::fields::Fields;
use super::generation::{CHOICES_MAX, Common};

/// As OpenAI's API has it.
const MAX_TOKENS_DEFAULT: u32 = 16;
const WITHOUT_EFFECT: [(&str, &str); 3] =
    [("echo", "false"), ("suffix", "\"\""), ("add_special_tokens", "true")];

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a text, a list of texts, token ids or a list of lists of token ids")]
enum Prompts {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<u32>>),
}

impl Prompts {
    fn each(self) -> Vec<Prompt> {
        let ids = |ids| Prompt::TokenIds(v1::TokenIds { ids });
        match self {
            Self::Text(text) => vec![Prompt::Text(text)],
            Self::Ids(list) => vec![ids(list)],
            Self::Texts(list) => list.into_iter().map(Prompt::Text).collect(),
            Self::IdLists(list) => list.into_iter().map(ids).collect(),
        }
    }
}

/// Takes the fields of a completion, and its prompts.
pub(super) fn take(fields: &mut Fields) -> (Common, Vec<Prompt>) {
    let mut common = Common::take(fields);
    take_best_of(fields, &mut common);
    let prompts = fields.take::<Prompts>("prompt").map(Prompts::each).unwrap_or_default();
    let choices = prompts.len().saturating_mul(common.count());
    if prompts.is_empty() {
        fields.refuse("prompt", "give a text, token ids, or a list of either");
    } else if choices > CHOICES_MAX {
        fields.refuse("prompt", format!("asks for {choices} answers; at most {CHOICES_MAX}"));
    }
    let response = common.request.response.get_or_insert_default();
    let logprobs: Option<u32> = fields.take("logprobs");
    common.logprobs = logprobs.is_some();
    // Those that are compared are needed whether or not they are shown.
    response.logprobs = logprobs.or(common.shown.best.map(|_| 0));
    let stopping = common.request.stopping.get_or_insert_default();
    let least = stopping.min_tokens.unwrap_or(0).max(MAX_TOKENS_DEFAULT);
    stopping.max_tokens = stopping.max_tokens.or(Some(least));
    fields.without_effect(&WITHOUT_EFFECT);
    (common, prompts)
}

/// Of `best_of` answers, the `n` likeliest are shown.
fn take_best_of(fields: &mut Fields, common: &mut Common) {
    let shown = common.count();
    let Some(best_of) = fields.take::<u32>("best_of") else { return };
    if (best_of as usize) < shown {
        fields.refuse("best_of", format!("is {best_of} and n {shown}; it must be at least n"));
    } else if common.stream && best_of as usize > shown {
        fields.refuse("best_of", "is not for streams: which answers are best is known at their end");
    } else if best_of as usize > shown {
        common.shown.best = Some(shown);
        common.request.sampling.get_or_insert_default().n = Some(best_of);
    }
}
