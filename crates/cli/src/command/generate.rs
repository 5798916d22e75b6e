//! `cohort generate`: one prompt to a running cluster.

use std::time::Duration;

use anyhow::{Context, bail};
use proto::v1::{
    ChatMessage, ChatPrompt, Finish, FinishReason, GenerateRequest, GenerateResponse, PromptInfo, Response,
    TokenIds, TokenLogprob, Usage, generate_request,
};
use serde::Serialize;
use tonic::{Request, Streaming};

use crate::client;
use crate::generation::GenerationFlags;
use crate::out::{self, say};
use crate::style::Paint;

const MORE: &str = "\
Examples:
  cohort generate --chat \"What does Vec::push do?\" --reasoning false --temperature 0
  cohort generate --token-ids 5,8,10 --max-tokens 4 --logprobs 2 --json
  cohort generate --chat \"Is Vec::len O(1)?\" --choice yes --choice no
  cohort generate --chat \"Name two traits.\" --json-schema answer.schema.json --max-tokens 200

With a form (--json-schema, --json-object, --regex, --choice, --grammar) only the answer of a chat is printed, not the thoughts
before it.";

/// Flags of `cohort generate`.
#[derive(Debug, Clone, Default, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct Args {
    /// The router's gRPC address
    #[arg(long, value_name = "URL", default_value = client::SERVER_DEFAULT)]
    pub server: String,
    /// How it is called.
    #[command(flatten)]
    pub tls: client::TlsFlags,
    /// Name of the model [default: whatever is served]
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub model: String,
    /// Give up after this long
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
    /// What to answer.
    #[command(flatten)]
    pub prompt: PromptFlags,
    /// How to generate.
    #[command(flatten)]
    pub generation: GenerationFlags,
    /// Answers to generate [default: 1]
    #[arg(short, value_name = "N", help_heading = "Output")]
    pub n: Option<u32>,
    /// Log-probability of each generated token, with K alternatives
    #[arg(long, value_name = "K", help_heading = "Output")]
    pub logprobs: Option<u32>,
    /// Log-probability of each prompt token, with K alternatives
    #[arg(long, value_name = "K", help_heading = "Output")]
    pub prompt_logprobs: Option<u32>,
    /// Keep marker tokens such as <|END_TEXT|> in the text
    #[arg(long, help_heading = "Output")]
    pub keep_special_tokens: bool,
    /// Print one JSON object: token_ids, text, finish_reason, logprobs, prompt_logprobs, usage; others with -n
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// What to answer: exactly one of text, chat and token ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Prompt (one of --prompt, --chat, --token-ids)")]
pub struct PromptFlags {
    /// Plain text to continue
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["chat", "token_ids"])]
    pub prompt: Option<String>,
    /// A user's message; given again, turns alternate between assistant and user
    #[arg(long, value_name = "TEXT", conflicts_with = "token_ids")]
    pub chat: Vec<String>,
    /// A system message before the chat; may be given again
    #[arg(long, value_name = "TEXT", requires = "chat", conflicts_with_all = ["prompt", "token_ids"])]
    pub system: Vec<String>,
    /// Whether the model may think before it answers a chat [default: the template's choice]
    #[arg(long, value_name = "BOOL", requires = "chat", conflicts_with_all = ["prompt", "token_ids"])]
    pub reasoning: Option<bool>,
    /// Token ids, separated by commas, used as they are
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    pub token_ids: Option<Vec<u32>>,
}

impl Args {
    /// The request these flags describe.
    ///
    /// # Errors
    /// When no prompt is given, or a file with the form of the answer cannot be read.
    pub fn to_request(&self) -> anyhow::Result<GenerateRequest> {
        let mut request = self.generation.to_request()?;
        request.model.clone_from(&self.model);
        request.prompt = Some(self.prompt.to_prompt()?);
        request.sampling.get_or_insert_default().n = self.n;
        request.response = Some(Response {
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            keep_special_tokens: self.keep_special_tokens,
            // The form is that of the answer; thoughts before it would be in its way.
            parse: request.constraint.is_some() && !self.prompt.chat.is_empty() && !self.keep_special_tokens,
        });
        Ok(request)
    }
}

impl PromptFlags {
    fn to_prompt(&self) -> anyhow::Result<generate_request::Prompt> {
        if let Some(text) = &self.prompt {
            return Ok(generate_request::Prompt::Text(text.clone()));
        }
        if let Some(ids) = &self.token_ids {
            return Ok(generate_request::Prompt::TokenIds(TokenIds { ids: ids.clone() }));
        }
        if self.chat.is_empty() {
            bail!("give one of --prompt TEXT, --chat TEXT and --token-ids 1,2,3");
        }
        let message = |role: &str, content: &String| ChatMessage {
            role: role.into(),
            content: content.clone(),
            ..ChatMessage::default()
        };
        let system = self.system.iter().map(|content| message("system", content));
        let turns = ["user", "assistant"].into_iter().cycle();
        let turns = turns.zip(&self.chat).map(|(role, content)| message(role, content));
        let messages = system.chain(turns).collect();
        Ok(generate_request::Prompt::Chat(ChatPrompt {
            messages,
            reasoning: self.reasoning,
            ..ChatPrompt::default()
        }))
    }
}

/// A whole answer, and the others that were asked for beside it, put together from their stream.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// The generated tokens.
    pub token_ids: Vec<u32>,
    /// Their text.
    pub text: String,
    /// One for each token, when asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Facts of the prompt.
    pub prompt: Option<PromptInfo>,
    /// How it ended.
    pub finish: Option<Finish>,
    /// What was counted.
    pub usage: Option<Usage>,
    /// The answers after the first.
    pub others: Vec<Answer>,
}

impl Answer {
    /// Adds the next message of the stream.
    pub fn add(&mut self, mut message: GenerateResponse) {
        if let Some(other) = std::mem::take(&mut message.index).checked_sub(1) {
            let other = other as usize;
            if self.others.len() <= other {
                self.others.resize(other + 1, Self::default());
            }
            return self.others[other].add(message);
        }
        self.token_ids.extend(message.token_ids);
        self.text.push_str(&message.text);
        self.logprobs.extend(message.logprobs);
        self.prompt = self.prompt.take().or(message.prompt);
        self.finish = self.finish.take().or(message.finish);
        self.usage = self.usage.or(message.usage);
    }

    /// The answer as `--json` prints it; log-probabilities are null where the request did not ask for them.
    #[must_use]
    pub fn to_json(&self, request: &GenerateRequest) -> AnswerJson<'_> {
        let asked = request.response.unwrap_or_default();
        let logprobs = asked.logprobs.map(|_| self.logprobs.iter().map(LogprobJson::from).collect());
        let prompt = self.prompt.iter().flat_map(|prompt| &prompt.logprobs);
        let position = |logprob: &proto::v1::PromptLogprob| logprob.value.as_ref().map(LogprobJson::from);
        AnswerJson {
            token_ids: &self.token_ids,
            text: &self.text,
            finish_reason: self.finish.as_ref().map(finish_name),
            logprobs,
            prompt_logprobs: asked.prompt_logprobs.map(|_| prompt.map(position).collect()),
            usage: self.usage.map(|usage| UsageJson {
                prompt_tokens: usage.prompt_tokens,
                cached_tokens: usage.cached_tokens,
                output_tokens: usage.output_tokens,
            }),
            others: self.others.iter().map(|other| other.to_json(request)).collect(),
        }
    }

    fn is_complete(&self) -> bool {
        self.finish.is_some() && self.others.iter().all(Self::is_complete)
    }
}

/// An answer as it is printed; floats keep their shortest single-precision form.
#[derive(Debug, Serialize)]
pub struct AnswerJson<'a> {
    token_ids: &'a [u32],
    text: &'a str,
    finish_reason: Option<&'static str>,
    logprobs: Option<Vec<LogprobJson>>,
    prompt_logprobs: Option<Vec<Option<LogprobJson>>>,
    usage: Option<UsageJson>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    others: Vec<AnswerJson<'a>>,
}

#[derive(Debug, Serialize)]
struct UsageJson {
    prompt_tokens: u32,
    cached_tokens: u32,
    output_tokens: u32,
}

#[derive(Debug, Serialize)]
struct LogprobJson {
    token_id: u32,
    logprob: f32,
    top: Vec<(u32, f32)>,
}

impl From<&TokenLogprob> for LogprobJson {
    fn from(entry: &TokenLogprob) -> Self {
        let top = entry.top.iter().map(|other| (other.token_id, other.logprob)).collect();
        Self { token_id: entry.token_id, logprob: entry.logprob, top }
    }
}

fn finish_name(finish: &Finish) -> &'static str {
    match finish.reason() {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Unspecified => "unspecified",
    }
}

/// Sends the prompt and prints the answer.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let request = args.to_request()?;
    let mut call = Request::new(request.clone());
    let timeout = args.timeout.map(seconds).transpose()?;
    // Several answers come mixed: they are shown one after the other when all are there.
    let several = args.n.is_some_and(|n| n > 1);
    let live = !args.json && !several;
    if let Some(timeout) = timeout {
        call.set_timeout(timeout);
    }
    super::runtime()?.block_on(async {
        let mut client = client::client(client::channel_with(&args.server, &args.tls).await?);
        let answer = async {
            let stream = client.generate(call).await.map_err(|status| client::explain(&status))?.into_inner();
            receive(stream, live).await
        };
        let answer = match timeout {
            None => answer.await?,
            Some(timeout) => {
                client::within(timeout, answer).await.context("the server did not keep the deadline")??
            }
        };
        if args.json {
            say!("{}", serde_json::to_string(&answer.to_json(&request))?);
        } else if several {
            print_all(&answer);
        } else {
            say!();
        }
        Ok(())
    })
}

fn print_all(first: &Answer) {
    let paint = Paint::stdout();
    for (index, answer) in std::iter::once(first).chain(&first.others).enumerate() {
        say!("{}\n{}", paint.dim(format!("answer {}", index + 1)), answer.text);
    }
}

fn seconds(seconds: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(seconds)
        .with_context(|| format!("--timeout {seconds}: must be a number of seconds of at least 0"))
}

/// Reads the stream to its end; with `print`, text goes to stdout as it comes.
async fn receive(mut stream: Streaming<GenerateResponse>, print: bool) -> anyhow::Result<Answer> {
    let mut answer = Answer::default();
    loop {
        let message = match stream.message().await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(status) => {
                if print && !answer.text.is_empty() {
                    say!();
                }
                return Err(client::explain(&status));
            }
        };
        if print {
            out::write_text(&message.text);
        }
        answer.add(message);
    }
    if !answer.is_complete() {
        bail!("the stream ended without saying why; the answer above is not complete");
    }
    Ok(answer)
}
