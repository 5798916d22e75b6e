//! The flags that say how to generate, the same wherever a request is made.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use proto::v1::{Choices, Constraint, GenerateRequest, Sampling, Stopping, constraint};

/// How tokens are drawn, when to stop, and how the request is treated.
#[derive(Debug, Clone, Default, PartialEq, clap::Args)]
pub struct GenerationFlags {
    /// How tokens are drawn.
    #[command(flatten)]
    pub sampling: SamplingFlags,
    /// When to stop.
    #[command(flatten)]
    pub stopping: StoppingFlags,
    /// What the answer must look like.
    #[command(flatten)]
    pub form: FormFlags,
    /// How the request is treated beside others.
    #[command(flatten)]
    pub scheduling: SchedulingFlags,
}

/// How tokens are drawn.
#[derive(Debug, Clone, Default, PartialEq, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingFlags {
    /// Divides the logits; 0 always takes the most likely token [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Only the K most likely tokens; 0 means all [default: 0]
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Only the most likely tokens that together reach this probability [default: 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Only tokens at least this fraction as likely as the most likely one [default: 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Same request, same seed: same tokens [default: drawn at random]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Subtracted once from the logit of every token generated so far [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Subtracted from a token's logit for each time it was generated [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Makes every token of prompt and output less likely, when above 1 [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Added to the logits of these tokens, separated by commas
    #[arg(long, value_name = "ID=X,…", value_delimiter = ',', value_parser = bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may come, separated by commas
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    pub allowed_token_ids: Vec<u32>,
    /// Text that is not generated; may be given again
    #[arg(long = "bad-word", value_name = "TEXT")]
    pub bad_words: Vec<String>,
}

/// When to stop.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Stopping")]
pub struct StoppingFlags {
    /// Most tokens to generate [default: what the context allows, at most 1024]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// Do not stop before this many tokens
    #[arg(long, value_name = "N")]
    pub min_tokens: Option<u32>,
    /// Text that ends the answer and is not part of it; may be given again
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Tokens that end the answer, separated by commas
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    pub stop_token_ids: Vec<u32>,
    /// Go on past the model's own end-of-sequence tokens
    #[arg(long)]
    pub ignore_eos: bool,
    /// Most tokens of reasoning; after them the model must come to its answer [default: no limit]
    #[arg(long, value_name = "N")]
    pub thinking_tokens_max: Option<u32>,
}

/// What the answer must look like: at most one of these.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Form of the answer (at most one)")]
#[group(multiple = false)]
pub struct FormFlags {
    /// File with the JSON schema that the answer keeps to
    #[arg(long, value_name = "FILE")]
    pub json_schema: Option<PathBuf>,
    /// Any JSON object
    #[arg(long)]
    pub json_object: bool,
    /// Regular expression for the whole answer
    #[arg(long, value_name = "REGEX")]
    pub regex: Option<String>,
    /// One of these texts; given again for each
    #[arg(long, value_name = "TEXT")]
    pub choice: Vec<String>,
    /// File with a Lark grammar
    #[arg(long, value_name = "FILE")]
    pub grammar: Option<PathBuf>,
}

impl FormFlags {
    /// Reads the files that are named.
    ///
    /// # Errors
    /// A file that cannot be read as text, by its flag and path.
    fn to_constraint(&self) -> anyhow::Result<Option<Constraint>> {
        use constraint::Form;
        let read = |flag: &str, path: &Path| {
            fs::read_to_string(path).with_context(|| format!("{flag} {}: cannot be read", path.display()))
        };
        let form = if let Some(path) = &self.json_schema {
            Some(Form::Json(read("--json-schema", path)?))
        } else if let Some(path) = &self.grammar {
            Some(Form::Grammar(read("--grammar", path)?))
        } else if let Some(regex) = &self.regex {
            Some(Form::Regex(regex.clone()))
        } else if self.json_object {
            Some(Form::JsonObject(true))
        } else {
            let choices = || Form::Choice(Choices { choices: self.choice.clone() });
            (!self.choice.is_empty()).then(choices)
        };
        Ok(form.map(|form| Constraint { form: Some(form) }))
    }
}

/// How the request is treated beside others.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Scheduling")]
pub struct SchedulingFlags {
    /// Lower is handled earlier, -100 to 100 [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub priority: Option<i32>,
    /// Share the computed blocks of a prompt only with requests of the same salt
    #[arg(long, value_name = "TEXT", conflicts_with = "bypass_prefix_cache")]
    pub cache_salt: Option<String>,
    /// Share computed blocks with no other request
    #[arg(long)]
    pub bypass_prefix_cache: bool,
}

impl GenerationFlags {
    /// A request without a prompt that asks for what these flags say.
    ///
    /// # Errors
    /// A file with the form of the answer that cannot be read.
    pub fn to_request(&self) -> anyhow::Result<GenerateRequest> {
        let Self { sampling, stopping, form, scheduling } = self;
        Ok(GenerateRequest {
            sampling: Some(Sampling {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                min_p: sampling.min_p,
                seed: sampling.seed,
                n: None,
                presence_penalty: sampling.presence_penalty,
                frequency_penalty: sampling.frequency_penalty,
                repetition_penalty: sampling.repetition_penalty,
                logit_bias: sampling.logit_bias.iter().copied().collect(),
                allowed_token_ids: sampling.allowed_token_ids.clone(),
                bad_words: sampling.bad_words.clone(),
                bad_word_token_ids: Vec::new(),
            }),
            stopping: Some(Stopping {
                max_tokens: stopping.max_tokens,
                min_tokens: stopping.min_tokens,
                stop: stopping.stop.clone(),
                stop_token_ids: stopping.stop_token_ids.clone(),
                ignore_eos: stopping.ignore_eos,
                thinking_tokens_max: stopping.thinking_tokens_max,
            }),
            constraint: form.to_constraint()?,
            priority: scheduling.priority.unwrap_or_default(),
            cache_salt: scheduling.cache_salt.clone().unwrap_or_default(),
            bypass_prefix_cache: scheduling.bypass_prefix_cache,
            ..GenerateRequest::default()
        })
    }
}

fn bias(pair: &str) -> Result<(u32, f32), String> {
    let read = || {
        let (id, value) = pair.split_once('=')?;
        Some((id.trim().parse().ok()?, value.trim().parse().ok()?))
    };
    read().ok_or_else(|| format!("`{pair}` must be a token id, = and a number, such as 42=-1.5"))
}
