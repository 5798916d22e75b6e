//! `cohort chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::str::FromStr;

use anyhow::bail;
use proto::v1::{ChatMessage, ChatPrompt, GenerateRequest, GenerateResponse, Response, generate_request};
use tonic::Streaming;

use crate::client;
use crate::generation::GenerationFlags;
use crate::style::Paint;

const MORE: &str = "\
While chatting:
  /reset          forget the conversation
  /system TEXT    set the system message (nothing: remove it) and start anew
  /params         show the parameters; /params temperature=0 top_p=0.9 changes them
  /quit           leave, as does the end of the input";
/// What `/params` knows.
const PARAMETERS: [&str; 10] = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "reasoning",
];
/// Why a line that begins with `/` was not understood.
const COMMANDS: &str = "commands are /reset, /system TEXT, /params [NAME=VALUE …] and /quit";

/// Flags of `cohort chat`.
#[derive(Debug, Clone, Default, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct Args {
    /// The router's gRPC address
    #[arg(long, value_name = "URL", default_value = client::SERVER_DEFAULT)]
    pub server: String,
    /// Name of the model [default: whatever is served]
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub model: String,
    /// A system message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Whether the model may think before it answers [default: the template's choice]
    #[arg(long, value_name = "BOOL")]
    pub reasoning: Option<bool>,
    /// How to generate.
    #[command(flatten)]
    pub generation: GenerationFlags,
}

/// What is said and how it is answered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Session {
    /// The conversation so far, without the system message.
    pub turns: Vec<ChatMessage>,
    /// The system message.
    pub system: Option<String>,
    /// Whether the model may think first.
    pub reasoning: Option<bool>,
    /// Everything else of a request: how tokens are drawn, when to stop.
    pub asked: GenerateRequest,
}

/// What a line of the user's asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// Nothing.
    Empty,
    /// An answer to it.
    Say(String),
    /// The end.
    Quit,
    /// A command that was carried out, and what there is to tell about it.
    Done(String),
}

impl Session {
    /// Reads a line and carries out the command in it, if it is one.
    ///
    /// # Errors
    /// What is wrong with the command; nothing has changed then.
    pub fn take(&mut self, line: &str) -> Result<Line, String> {
        let line = line.trim();
        let Some(command) = line.strip_prefix('/') else {
            return Ok(if line.is_empty() { Line::Empty } else { Line::Say(line.to_owned()) });
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match name {
            "quit" | "exit" => Ok(Line::Quit),
            "reset" => {
                self.turns.clear();
                Ok(Line::Done("the conversation starts anew".to_owned()))
            }
            "system" => {
                self.turns.clear();
                self.system = Some(rest.trim().to_owned()).filter(|text| !text.is_empty());
                Ok(Line::Done("the conversation starts anew".to_owned()))
            }
            "params" => {
                let mut changed = self.clone();
                for pair in rest.split_whitespace() {
                    changed.set(pair)?;
                }
                *self = changed;
                Ok(Line::Done(self.describe()))
            }
            _ => Err(format!("/{name} is unknown; {COMMANDS}")),
        }
    }

    fn set(&mut self, pair: &str) -> Result<(), String> {
        let (name, value) = pair.split_once('=').ok_or_else(|| format!("`{pair}` must be NAME=VALUE"))?;
        let sampling = self.asked.sampling.get_or_insert_default();
        match name {
            "temperature" => assign(&mut sampling.temperature, name, value),
            "top_k" => assign(&mut sampling.top_k, name, value),
            "top_p" => assign(&mut sampling.top_p, name, value),
            "min_p" => assign(&mut sampling.min_p, name, value),
            "seed" => assign(&mut sampling.seed, name, value),
            "presence_penalty" => assign(&mut sampling.presence_penalty, name, value),
            "frequency_penalty" => assign(&mut sampling.frequency_penalty, name, value),
            "repetition_penalty" => assign(&mut sampling.repetition_penalty, name, value),
            "max_tokens" => assign(&mut self.asked.stopping.get_or_insert_default().max_tokens, name, value),
            "reasoning" => assign(&mut self.reasoning, name, value),
            _ => Err(format!("`{name}` is unknown; use {}", PARAMETERS.join(", "))),
        }
    }

    fn describe(&self) -> String {
        fn shown<T: ToString>(value: Option<T>) -> String {
            value.map_or("default".to_owned(), |value| value.to_string())
        }
        let sampling = self.asked.sampling.clone().unwrap_or_default();
        let values = [
            shown(sampling.temperature),
            shown(sampling.top_k),
            shown(sampling.top_p),
            shown(sampling.min_p),
            shown(sampling.seed),
            shown(sampling.presence_penalty),
            shown(sampling.frequency_penalty),
            shown(sampling.repetition_penalty),
            shown(self.asked.stopping.as_ref().and_then(|stopping| stopping.max_tokens)),
            shown(self.reasoning),
        ];
        let pairs = PARAMETERS.iter().zip(values).map(|(name, value)| format!("{name}={value}"));
        pairs.collect::<Vec<String>>().join(" ")
    }

    /// The request for an answer to `question` after all that was said before.
    #[must_use]
    pub fn request(&self, model: &str, question: &str) -> GenerateRequest {
        let system = self.system.as_ref().map(|text| message("system", text));
        let turns = self.turns.iter().cloned();
        let messages = system.into_iter().chain(turns).chain([message("user", question)]).collect();
        let chat = ChatPrompt { messages, reasoning: self.reasoning, ..ChatPrompt::default() };
        GenerateRequest {
            model: model.to_owned(),
            prompt: Some(generate_request::Prompt::Chat(chat)),
            response: Some(Response { parse: true, ..Response::default() }),
            ..self.asked.clone()
        }
    }

    /// Remembers a question and its answer.
    pub fn answered(&mut self, question: &str, answer: ChatMessage) {
        self.turns.extend([message("user", question), answer]);
    }
}

fn assign<T: FromStr>(to: &mut Option<T>, name: &str, value: &str) -> Result<(), String> {
    *to = Some(value.parse().map_err(|_| format!("`{value}` is no value for {name}"))?);
    Ok(())
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned(), ..ChatMessage::default() }
}

/// Chats until the input ends.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let terminal = std::io::stdin().is_terminal();
    let mut session = Session {
        turns: Vec::new(),
        system: args.system.clone(),
        reasoning: args.reasoning,
        asked: args.generation.to_request()?,
    };
    let runtime = super::runtime()?;
    let mut client = client::client(runtime.block_on(client::channel(&args.server))?);
    let paint = Paint::stdout();
    if terminal {
        println!("{}", paint.dim(MORE));
    }
    let mut input = std::io::stdin().lock();
    loop {
        if terminal {
            print!("{} ", paint.accent(">"));
            std::io::stdout().flush()?;
        }
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let question = match session.take(&line) {
            Ok(Line::Empty) => continue,
            Ok(Line::Quit) => return Ok(()),
            Ok(Line::Done(told)) => {
                println!("{}", paint.dim(told));
                continue;
            }
            Ok(Line::Say(question)) => question,
            Err(wrong) => {
                eprintln!("{}", Paint::stderr().bad(wrong));
                continue;
            }
        };
        let request = session.request(&args.model, &question);
        let answer = runtime.block_on(async {
            let stream = client.generate(request).await.map_err(|status| client::explain(&status))?;
            show(stream.into_inner(), paint).await
        });
        match answer {
            Ok(answer) => session.answered(&question, answer),
            // A person may go on with another question; a script should hear of it.
            Err(error) if terminal => eprintln!("{}", Paint::stderr().bad(format!("{error:#}"))),
            Err(error) => return Err(error),
        }
    }
}

/// Prints an answer as it comes, reasoning dimmed, and returns it.
async fn show(mut stream: Streaming<GenerateResponse>, paint: Paint) -> anyhow::Result<ChatMessage> {
    let mut answer = ChatMessage { role: "assistant".to_owned(), ..ChatMessage::default() };
    let mut stdout = std::io::stdout();
    let mut finished = false;
    while let Some(message) = stream.message().await.map_err(|status| client::explain(&status))? {
        if !message.reasoning.is_empty() {
            write!(stdout, "{}", paint.dim(&message.reasoning))?;
        }
        if answer.content.is_empty() && !message.text.is_empty() && !answer.reasoning.is_empty() {
            writeln!(stdout, "\n")?;
        }
        write!(stdout, "{}", message.text)?;
        stdout.flush()?;
        answer.reasoning.push_str(&message.reasoning);
        answer.content.push_str(&message.text);
        finished |= message.finish.is_some();
    }
    println!();
    if !finished {
        bail!("the stream ended without saying why; the answer above is not complete");
    }
    Ok(answer)
}
