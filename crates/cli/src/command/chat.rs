//! `cohort chat`: a conversation in the terminal.

use std::io::{self, BufRead, IsTerminal, Write};
use std::str::FromStr;
use std::thread;

use anyhow::{Context, bail};
use proto::v1::{ChatMessage, ChatPrompt, GenerateRequest, GenerateResponse, Response, generate_request};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tonic::Streaming;

use crate::client::{self, Client};
use crate::generation::GenerationFlags;
use crate::style::Paint;

const MORE: &str = "\
While chatting:
  /reset          forget the conversation
  /system TEXT    set the system message (nothing: remove it) and start anew
  /params         show the parameters; /params temperature=0 top_p=0.9 changes them
  /quit           leave, as does the end of the input (ctrl-D)
ctrl-C ends an answer; what was said of it stays in the conversation.";
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
/// What ctrl-C says when there is no answer to end.
const HOW_TO_LEAVE: &str = "/quit or ctrl-D leaves";
/// Why a line that begins with `/` was not understood.
const COMMANDS: &str = "commands are /reset, /system TEXT, /params [NAME=VALUE …] and /quit";

/// Flags of `cohort chat`.
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
    let session = Session {
        turns: Vec::new(),
        system: args.system.clone(),
        reasoning: args.reasoning,
        asked: args.generation.to_request()?,
    };
    super::runtime()?.block_on(async {
        let client = client::client(client::channel_with(&args.server, &args.tls).await?);
        let terminal = io::stdin().is_terminal();
        Conversation {
            client,
            session,
            terminal,
            paint: Paint::stdout(),
            interrupts: Interrupts::of(terminal)?,
        }
        .run(&args.model)
        .await
    })
}

/// Ctrl-C, where a person sits at the terminal; a script it ends.
struct Interrupts(Option<Signal>);

impl Interrupts {
    fn of(terminal: bool) -> anyhow::Result<Self> {
        let signal = terminal.then(|| signal(SignalKind::interrupt())).transpose();
        Ok(Self(signal.context("listen for ctrl-C")?))
    }

    async fn next(&mut self) {
        match &mut self.0 {
            Some(signal) => _ = signal.recv().await,
            None => std::future::pending().await,
        }
    }
}

/// A conversation at a terminal, or one that a script leads.
struct Conversation {
    client: Client,
    session: Session,
    terminal: bool,
    paint: Paint,
    interrupts: Interrupts,
}

impl Conversation {
    async fn run(mut self, model: &str) -> anyhow::Result<()> {
        let paint = self.paint;
        if self.terminal {
            println!("{}", paint.dim(MORE));
        }
        let mut lines = lines()?;
        while let Some(line) = self.line(&mut lines).await? {
            match self.session.take(&line) {
                Ok(Line::Empty) => {}
                Ok(Line::Quit) => return Ok(()),
                Ok(Line::Done(told)) => println!("{}", paint.dim(told)),
                Ok(Line::Say(question)) => match self.answer(model, &question).await {
                    Ok(answer) => self.session.answered(&question, answer),
                    // A person may go on with another question; a script should hear of it.
                    Err(error) if self.terminal => eprintln!("{}", Paint::stderr().bad(format!("{error:#}"))),
                    Err(error) => return Err(error),
                },
                Err(wrong) => eprintln!("{}", Paint::stderr().bad(wrong)),
            }
        }
        Ok(())
    }

    /// The next line; `None` at the end of the input.
    async fn line(
        &mut self,
        lines: &mut mpsc::Receiver<io::Result<String>>,
    ) -> anyhow::Result<Option<String>> {
        loop {
            if self.terminal {
                print!("{} ", self.paint.accent(">"));
                io::stdout().flush()?;
            }
            tokio::select! {
                line = lines.recv() => return line.transpose().context("read a line"),
                // The terminal has forgotten what was typed of the line.
                () = self.interrupts.next() => println!("\n{}", self.paint.dim(HOW_TO_LEAVE)),
            }
        }
    }

    /// Shows the answer to a question as it comes, until it ends or is interrupted, and returns it.
    async fn answer(&mut self, model: &str, question: &str) -> anyhow::Result<ChatMessage> {
        let mut answer = ChatMessage { role: "assistant".to_owned(), ..ChatMessage::default() };
        let request = self.session.request(model, question);
        let (client, paint) = (&mut self.client, self.paint);
        let shown = async {
            let stream = client.generate(request).await.map_err(|status| client::explain(&status))?;
            show(stream.into_inner(), paint, &mut answer).await
        };
        // Leaving the stream ends the request at the server.
        tokio::select! {
            shown = shown => shown?,
            () = self.interrupts.next() => println!("\n{}", paint.dim("(ended)")),
        }
        Ok(answer)
    }
}

/// The lines of the input, read on a thread of their own: reading a terminal cannot be left off.
fn lines() -> anyhow::Result<mpsc::Receiver<io::Result<String>>> {
    let (give, take) = mpsc::channel(1);
    let read = move || {
        for line in io::stdin().lock().lines() {
            if give.blocking_send(line).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("input".into()).spawn(read).context("start the reader")?;
    Ok(take)
}

/// Prints an answer as it comes, reasoning dimmed, and adds it to `answer`.
async fn show(
    mut stream: Streaming<GenerateResponse>,
    paint: Paint,
    answer: &mut ChatMessage,
) -> anyhow::Result<()> {
    let mut stdout = io::stdout();
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
    Ok(())
}
