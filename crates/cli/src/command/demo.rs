//! `cohort demo`: the whole house in one command.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use proto::v1::{ChatMessage, ChatPrompt, GenerateRequest, Sampling, Stopping, generate_request};
use settings::{HttpListen, Settings};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use types::{Bytes, DType, TpSize};
use worker::Device;

use super::up;
use crate::args::LogFlags;
use crate::out::{self, say};
use crate::report::{Event, Line, Serving};
use crate::style::Paint;
use crate::supervisor::cluster::{Happening, Member};
use crate::supervisor::signals;
use crate::table::{Align, Table};
use crate::{client, embedded};

/// What is asked when nothing else is: the model was trained on the standard library's documentation.
pub(crate) const QUESTION: &str = "What does `Vec::push` do?";
const RANKS: u32 = 2;
/// Room for a few answers; the model's own context is shorter.
const KV_TOKENS: u32 = 4096;
/// The model stops by itself long before.
const ANSWER_TOKENS_MAX: u32 = 256;

/// Flags of `cohort demo`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Args {
    /// What to ask
    #[arg(default_value = QUESTION)]
    pub prompt: String,
}

/// What the processes told of themselves.
#[derive(Debug, Default)]
struct Facts {
    pids: BTreeMap<Member, u32>,
    /// Process id and resident weight bytes of each rank.
    ranks: BTreeMap<u32, (u32, u64)>,
}

/// When the answer came, since the question was sent.
#[derive(Debug)]
struct Answered {
    first: Duration,
    last: Duration,
    tokens: usize,
    first_since_start: Duration,
}

/// Runs the demo.
pub(crate) fn run(args: &Args, log: &LogFlags) -> anyhow::Result<()> {
    let started = Instant::now();
    let stop = signals::stop_token(false)?;
    let mut settings = settings()?;
    // Its processes are stopped in the middle of nothing: that they miss each other then is no trouble.
    settings.telemetry = super::quiet(&log.telemetry(), "error");
    let settings = Mutex::new(settings);
    let paint = Paint::stdout();
    say!(
        "{}  one router and {RANKS} tensor-parallel CPU workers serve {}",
        paint.bold("cohort demo"),
        embedded::NAME
    );
    super::runtime()?.block_on(async {
        let (up, is_up) = oneshot::channel();
        let facts = Arc::new(Mutex::new(Facts::default()));
        let noted = Arc::clone(&facts);
        let mut up = Some(up);
        let (_, unchanged) = mpsc::channel(1);
        let cluster = up::supervise(&settings, &stop, unchanged, move |happening| {
            note(&mut noted.lock().unwrap_or_else(PoisonError::into_inner), &happening);
            if let Happening::Up(serving) = happening
                && let Some(up) = up.take()
            {
                let _ = up.send(serving);
            }
        });
        let conversation = async {
            let result = converse(args, is_up, &stop, started).await;
            if let Ok(Some((serving, answered))) = &result {
                print_summary(
                    &facts.lock().unwrap_or_else(PoisonError::into_inner),
                    *serving,
                    answered,
                    paint,
                );
            }
            stop.cancel();
            result
        };
        let (ran, conversed) = tokio::join!(cluster, conversation);
        ran?;
        conversed.map(drop)
    })
}

fn settings() -> anyhow::Result<Settings> {
    let mut settings = Settings::default();
    let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    settings.model.device = Device::Cpu;
    settings.model.dtype = DType::F32;
    settings.router.grpc_listen = anywhere;
    settings.router.http_listen = HttpListen::Off;
    settings.group.tensor_parallel = TpSize::new(RANKS)?;
    settings.group.kv_tokens = KV_TOKENS;
    Ok(settings)
}

fn note(facts: &mut Facts, happening: &Happening) {
    match happening {
        Happening::Started { member, pid } => _ = facts.pids.insert(*member, *pid),
        Happening::Said { line: Line { pid, rank: Some(rank), event: Event::Loaded(loaded) }, .. } => {
            facts.ranks.insert(*rank, (*pid, loaded.resident));
        }
        Happening::Said { .. } | Happening::Up(_) | Happening::Restarting { .. } | Happening::Left(_) => {}
    }
}

/// Asks as soon as the cluster serves; `None` when it was told to stop before the answer was complete.
async fn converse(
    args: &Args,
    is_up: oneshot::Receiver<Serving>,
    stop: &CancellationToken,
    started: Instant,
) -> anyhow::Result<Option<(Serving, Answered)>> {
    let ask = async {
        let serving = is_up.await.context("the cluster ended before it served")?;
        let channel = client::channel(&serving.grpc.to_string()).await?;
        client::wait_until_serving(channel.clone()).await?;
        let answered = ask(client::client(channel), &args.prompt, started).await?;
        Ok(Some((serving, answered)))
    };
    tokio::select! {
        result = ask => result,
        () = stop.cancelled() => Ok(None),
    }
}

async fn ask(mut client: client::Client, question: &str, started: Instant) -> anyhow::Result<Answered> {
    let paint = Paint::stdout();
    say!("\n{} {}\n", paint.accent(">"), paint.bold(question));
    let message = ChatMessage { role: "user".into(), content: question.to_owned(), ..ChatMessage::default() };
    let chat = ChatPrompt { messages: vec![message], reasoning: Some(false), ..ChatPrompt::default() };
    let request = GenerateRequest {
        prompt: Some(generate_request::Prompt::Chat(chat)),
        sampling: Some(Sampling { temperature: Some(0.0), ..Sampling::default() }),
        stopping: Some(Stopping { max_tokens: Some(ANSWER_TOKENS_MAX), ..Stopping::default() }),
        ..GenerateRequest::default()
    };
    let sent = Instant::now();
    let mut stream = client.generate(request).await.map_err(|status| client::explain(&status))?.into_inner();
    let mut first = None;
    let (mut last, mut tokens) = (Duration::ZERO, 0);
    while let Some(message) = stream.message().await.map_err(|status| client::explain(&status))? {
        if !message.token_ids.is_empty() {
            last = sent.elapsed();
            tokens += message.token_ids.len();
            first.get_or_insert((last, started.elapsed()));
        }
        out::write_text(&message.text);
    }
    say!("\n");
    let Some((first, first_since_start)) = first else { bail!("the answer has no tokens") };
    Ok(Answered { first, last, tokens, first_since_start })
}

fn print_summary(facts: &Facts, serving: Serving, answered: &Answered, paint: Paint) {
    let ms = |span: Duration| format!("{:.0} ms", span.as_secs_f64() * 1000.0);
    let mut numbers = Table::new([Align::Left, Align::Right]);
    numbers.row(["time to first token".into(), ms(answered.first)]);
    numbers.row(["from process start to first token".into(), ms(answered.first_since_start)]);
    numbers.row(["tokens generated".into(), answered.tokens.to_string()]);
    let decode = answered.last.saturating_sub(answered.first).as_secs_f64();
    if answered.tokens > 1 && decode > 0.0 {
        numbers.row(["tokens per second".into(), format!("{:.1}", (answered.tokens - 1) as f64 / decode)]);
    }
    let mut processes = Table::new([Align::Left, Align::Right, Align::Right, Align::Left]);
    let pid = |member| facts.pids.get(&member).map(u32::to_string).unwrap_or_default();
    let own = std::process::id().to_string();
    processes.row(["process".into(), "pid".into(), "weights".into(), "did".into()]);
    processes.row(["demo".into(), own, String::new(), "asked, and supervised the cluster".into()]);
    let router = format!("text to tokens and back, gRPC at {}", serving.grpc);
    processes.row(["router".into(), pid(Member::Router), String::new(), router]);
    let supervisor = "supervised its ranks".to_owned();
    processes.row(["group 0".into(), pid(Member::Group(0)), String::new(), supervisor]);
    for (rank, (pid, bytes)) in &facts.ranks {
        let role = if *rank == 0 {
            "leader: planned every step, computed, sampled"
        } else {
            "follower: computed its share"
        };
        processes.row([format!("rank {rank}"), pid.to_string(), Bytes(*bytes).to_string(), role.into()]);
    }
    for line in numbers.lines() {
        say!("{line}");
    }
    say!();
    for (index, line) in processes.lines().enumerate() {
        say!("{}", if index == 0 { paint.dim(line) } else { line });
    }
}
