//! `cohort bench router`: what a router costs, in front of a leader that answers at once.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::{StreamExt, TryStreamExt, stream};
use proto::v1::{
    ChatMessage, ChatPrompt, GenerateRequest, GenerateResponse, Stopping, TokenizeRequest, generate_request,
    tokenize_request,
};
use proto::worker;
use proto::worker::worker_client::WorkerClient;
use serde::Serialize;
use tokio::runtime::{self, Runtime};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::Streaming;
use tonic::transport::Channel;

use super::leader::NullLeader;
use super::stats::Percentiles;
use crate::client::{self, Client};
use crate::out::say;
use crate::report::{Event, Line};
use crate::supervisor::{Handle, Spec, Update, child};
use crate::table::{Align, Table};

/// The leader claims this many tokens, more than any tokenizer has.
pub(super) const VOCAB_SIZE: u32 = 1 << 20;
/// Streams that are opened at once.
const OPENING: usize = 64;
/// Streams on one connection.
const STREAMS_A_CONNECTION: usize = 500;
/// Longest a router may take to stop.
pub(super) const STOP_GRACE: Duration = Duration::from_secs(2);
/// Ticks of the process times the kernel reports, a second.
const TICKS: f64 = 100.0;
const PAGE_BYTES: u64 = 4096;

/// Flags of `cohort bench router`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct RouterArgs {
    /// Directory with the tokenizer and chat template [default: the embedded demo model's]
    #[arg(long, value_name = "DIR")]
    pub model: Option<String>,
    /// Requests a second while latency is measured
    #[arg(long, value_name = "R", default_value_t = 1000.0)]
    pub rate: f64,
    /// How long latency is measured, with the router and without
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    pub seconds: f64,
    /// Tokens of each chat prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub prompt_tokens: u32,
    /// Streams that are held open at once
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    pub streams: u32,
    /// Streams that are read at once while tokens are counted
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub fan_streams: u32,
    /// Tokens of each of them
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=32_768))]
    pub fan_tokens: u32,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

impl RouterArgs {
    /// Requests while latency is measured.
    fn requests(&self) -> u32 {
        (self.rate * self.seconds).ceil().min(f64::from(u32::MAX)) as u32
    }
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
struct Report {
    prompt_tokens: usize,
    /// From sending a request to the end of its answer.
    direct_ms: Percentiles,
    routed_ms: Percentiles,
    /// The difference of the percentiles.
    added_p50_us: f64,
    added_p99_us: f64,
    /// Of the router's process, at that rate.
    cpu_us_a_request: f64,
    streams: u32,
    kib_a_stream: f64,
    tokens_per_s: f64,
    messages_per_s: f64,
    /// Of the router's process.
    cpu_us_a_token: f64,
    failed: BTreeMap<String, u64>,
}

/// A router in a process of its own, so that its memory and time can be told from ours.
pub(super) struct Router {
    pub(super) handle: Handle,
    pub(super) server: String,
    _updates: mpsc::Receiver<((), Update)>,
}

impl Router {
    async fn start(args: &RouterArgs, leader: &NullLeader) -> anyhow::Result<Self> {
        let requests_max = args.streams.max(args.fan_streams).saturating_add(1024);
        Self::start_with(args.model.as_deref(), &[format!("--requests-max={requests_max}")], leader).await
    }

    /// One with these flags in front of a leader.
    pub(super) async fn start_with(
        model: Option<&str>,
        flags: &[String],
        leader: &NullLeader,
    ) -> anyhow::Result<Self> {
        let mut argv = vec![
            "router".to_owned(),
            "--supervised".to_owned(),
            "--log-level=error".to_owned(),
            "--grpc-listen=127.0.0.1:0".to_owned(),
            "--http-listen=off".to_owned(),
            format!("--workers=http://{}", leader.address),
        ];
        argv.extend_from_slice(flags);
        argv.extend(model.map(|dir| format!("--model={dir}")));
        let (send, mut updates) = mpsc::channel(16);
        let handle = child::spawn(&Spec::own(argv, None)?, (), send)?;
        loop {
            match updates.recv().await {
                Some(((), Update::Said(Line { event: Event::Serving(serving), .. }))) => {
                    let server = format!("http://{}", serving.grpc);
                    client::wait_until_serving(client::channel(&server).await?).await?;
                    return Ok(Self { handle, server, _updates: updates });
                }
                Some(((), Update::Said(_))) => {}
                Some(((), Update::Exited(exit))) => {
                    bail!("the router ended: {:?} {:?}", exit.status, exit.error)
                }
                None => bail!("the router is gone"),
            }
        }
    }

    /// Bytes of memory the process has.
    fn resident(&self) -> anyhow::Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/statm", self.handle.pid()))?;
        let pages: u64 = text.split(' ').nth(1).context("statm has no second number")?.parse()?;
        Ok(pages * PAGE_BYTES)
    }

    /// Seconds of processor time the process has used.
    fn cpu(&self) -> anyhow::Result<f64> {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.handle.pid()))?;
        let after = text.rsplit(") ").next().context("stat has no name")?;
        let ticks = after.split(' ').skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
        Ok(ticks as f64 / TICKS)
    }
}

/// Measures and prints.
pub(super) fn run(args: &RouterArgs) -> anyhow::Result<()> {
    if !args.rate.is_finite() || args.rate <= 0.0 {
        bail!("--rate {}: must be above 0", args.rate);
    }
    if !(args.seconds.is_finite() && args.seconds > 0.0) {
        bail!("--seconds {}: must be above 0", args.seconds);
    }
    let report = generator()?.block_on(measure(args))?;
    if args.json {
        say!("{}", serde_json::to_string(&report)?);
    } else {
        print(args, &report);
    }
    if report.failed.is_empty() { Ok(()) } else { bail!("some requests failed: {:?}", report.failed) }
}

/// One thread sends all requests, so that what it costs to wake another one is not part of what is measured.
fn generator() -> anyhow::Result<Runtime> {
    runtime::Builder::new_current_thread().enable_all().build().context("start the generator")
}

async fn measure(args: &RouterArgs) -> anyhow::Result<Report> {
    let leader = Arc::new(NullLeader::start(VOCAB_SIZE)?);
    let router = Router::start(args, &leader).await?;
    let routed = client::client(client::channel(&router.server).await?);
    let question = Question::of(routed.clone(), args.prompt_tokens).await?;
    let mut failed = BTreeMap::new();

    let direct = client::channel(&format!("http://{}", leader.address)).await?;
    let ids = &question.ids;
    let direct_ms = paced(args, &mut failed, |_| answered_directly(direct.clone(), ids.clone())).await?;
    let cpu = router.cpu()?;
    let routed_ms = paced(args, &mut failed, |at| answered(routed.clone(), question.request(at, 1))).await?;
    let cpu_us_a_request = (router.cpu()? - cpu) * 1e6 / f64::from(args.requests());

    let (tokens_per_s, messages_per_s, cpu_us_a_token) = fan_out(args, &router, &question).await?;
    let kib_a_stream = hold(args, &router, &leader, &question).await?;
    router.handle.stop(STOP_GRACE);
    Ok(Report {
        prompt_tokens: question.ids.len(),
        direct_ms,
        routed_ms,
        added_p50_us: (routed_ms.p50 - direct_ms.p50) * 1e3,
        added_p99_us: (routed_ms.p99 - direct_ms.p99) * 1e3,
        cpu_us_a_request,
        streams: args.streams,
        kib_a_stream,
        tokens_per_s,
        messages_per_s,
        cpu_us_a_token,
        failed,
    })
}

/// A chat prompt of a given length.
pub(super) struct Question {
    text: String,
    /// The chat as the router tokenizes it: what a leader is sent.
    ids: Vec<u32>,
}

impl Question {
    /// Words until the rendered chat has `tokens` tokens.
    pub(super) async fn of(mut client: Client, tokens: u32) -> anyhow::Result<Self> {
        const SENTENCE: &str =
            "The trait Iterator has a method that returns the next value of the sequence, or None. ";
        let mut text = String::new();
        loop {
            text.push_str(SENTENCE);
            let question = Self { text: text.clone(), ids: Vec::new() };
            let request = TokenizeRequest { prompt: Some(tokenize_request::Prompt::Chat(question.chat(0))) };
            let answer = client.tokenize(request).await.map_err(|status| client::explain(&status))?;
            let ids = answer.into_inner().token_ids;
            if ids.len() >= tokens as usize {
                return Ok(Self { text, ids });
            }
        }
    }

    fn chat(&self, number: u32) -> ChatPrompt {
        let content = format!("Question {number:06}. {}", self.text);
        let message = ChatMessage { role: "user".to_owned(), content, ..ChatMessage::default() };
        ChatPrompt { messages: vec![message], ..ChatPrompt::default() }
    }

    pub(super) fn request(&self, number: u32, max_tokens: u32) -> GenerateRequest {
        GenerateRequest {
            prompt: Some(generate_request::Prompt::Chat(self.chat(number))),
            stopping: Some(Stopping { max_tokens: Some(max_tokens), ..Stopping::default() }),
            ..GenerateRequest::default()
        }
    }
}

type Outcome = Result<Duration, &'static str>;

/// Sends requests at the rate that is asked for; how long each took from its sending.
async fn paced<F>(
    args: &RouterArgs,
    failed: &mut BTreeMap<String, u64>,
    send: impl Fn(u32) -> F,
) -> anyhow::Result<Percentiles>
where
    F: Future<Output = Outcome> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    let count = args.requests();
    let started = Instant::now();
    for at in 0..count {
        tokio::time::sleep_until(started + Duration::from_secs_f64(f64::from(at) / args.rate)).await;
        tasks.spawn(send(at));
    }
    let mut took = Vec::new();
    for outcome in tasks.join_all().await {
        match outcome {
            Ok(time) => took.push(time.as_secs_f64() * 1e3),
            Err(code) => *failed.entry(code.to_owned()).or_default() += 1,
        }
    }
    Percentiles::of(took).context("no request was answered")
}

async fn answered(mut client: Client, request: GenerateRequest) -> Outcome {
    let started = Instant::now();
    let code = |status: tonic::Status| client::code_name(status.code());
    let mut stream = client.generate(request).await.map_err(code)?.into_inner();
    while stream.message().await.map_err(code)?.is_some() {}
    Ok(started.elapsed())
}

async fn answered_directly(channel: Channel, prompt: Vec<u32>) -> Outcome {
    let started = Instant::now();
    let code = |status: tonic::Status| client::code_name(status.code());
    let generation = worker::Generation { max_tokens: Some(1), ..worker::Generation::default() };
    let request = worker::GenerateRequest {
        prompt,
        generation: Some(generation),
        ..worker::GenerateRequest::default()
    };
    let mut stream = WorkerClient::new(channel).generate(request).await.map_err(code)?.into_inner();
    while stream.message().await.map_err(code)?.is_some() {}
    Ok(started.elapsed())
}

/// Tokens and messages a second over all streams, and the router's processor time for a token in µs.
async fn fan_out(args: &RouterArgs, router: &Router, question: &Question) -> anyhow::Result<(f64, f64, f64)> {
    let client = client::client(client::channel(&router.server).await?);
    let (started, cpu) = (Instant::now(), router.cpu()?);
    let mut tasks = JoinSet::new();
    for at in 0..args.fan_streams {
        let (mut client, request) = (client.clone(), question.request(at, args.fan_tokens));
        tasks.spawn(async move {
            let mut stream = client.generate(request).await?.into_inner();
            let (mut tokens, mut messages) = (0_u64, 0_u64);
            while let Some(message) = stream.message().await? {
                tokens += message.token_ids.len() as u64;
                messages += 1;
            }
            Ok::<_, tonic::Status>((tokens, messages))
        });
    }
    let (mut tokens, mut messages) = (0, 0);
    for outcome in tasks.join_all().await {
        let (own, sent) = outcome.map_err(|status| client::explain(&status))?;
        tokens += own;
        messages += sent;
    }
    let (took, cpu) = (started.elapsed().as_secs_f64(), router.cpu()? - cpu);
    Ok((tokens as f64 / took, messages as f64 / took, cpu * 1e6 / tokens as f64))
}

/// Opens all streams, and says how much memory the router has for each.
async fn hold(
    args: &RouterArgs,
    router: &Router,
    leader: &NullLeader,
    question: &Question,
) -> anyhow::Result<f64> {
    let count = args.streams as usize;
    let mut clients = Vec::new();
    for _ in 0..count.div_ceil(STREAMS_A_CONNECTION) {
        clients.push(client::client(client::channel(&router.server).await?));
    }
    let before = router.resident()?;
    let open = |at: u32| {
        let mut client = clients[at as usize / STREAMS_A_CONNECTION].clone();
        let mut request = question.request(at, 2);
        request.stopping.get_or_insert_default().ignore_eos = true;
        async move {
            let mut stream = client.generate(request).await?.into_inner();
            // The first token: the stream is open all the way to the leader.
            stream.message().await?;
            Ok::<Streaming<GenerateResponse>, tonic::Status>(stream)
        }
    };
    let streams = stream::iter((0..args.streams).map(open)).buffer_unordered(OPENING);
    let streams: Vec<Streaming<GenerateResponse>> =
        streams.try_collect().await.map_err(|status| client::explain(&status))?;
    let grown = router.resident()?.saturating_sub(before);
    leader.release();
    let ends = streams.into_iter().map(|mut stream| async move {
        while stream.message().await?.is_some() {}
        Ok::<(), tonic::Status>(())
    });
    futures::future::try_join_all(ends).await.map_err(|status| client::explain(&status))?;
    Ok(grown as f64 / 1024.0 / f64::from(args.streams))
}

fn print(args: &RouterArgs, report: &Report) {
    say!(
        "{} requests/s for {} s, chat prompts of {} tokens, one token answered",
        args.rate,
        args.seconds,
        report.prompt_tokens
    );
    let mut latency = Table::new([Align::Left, Align::Right, Align::Right]);
    latency.row(["µs".into(), "p50".into(), "p99".into()]);
    for (name, p) in
        [("straight to the leader", &report.direct_ms), ("through the router", &report.routed_ms)]
    {
        latency.row([name.into(), format!("{:.0}", p.p50 * 1e3), format!("{:.0}", p.p99 * 1e3)]);
    }
    latency.row([
        "added by the router".into(),
        format!("{:.0}", report.added_p50_us),
        format!("{:.0}", report.added_p99_us),
    ]);
    for line in latency.lines() {
        say!("{line}");
    }
    say!();
    let mut rest = Table::new([Align::Left, Align::Right]);
    rest.row([format!("KiB a stream, {} open", report.streams), format!("{:.1}", report.kib_a_stream)]);
    rest.row([format!("tokens/s over {} streams", args.fan_streams), format!("{:.0}", report.tokens_per_s)]);
    rest.row(["router's CPU a request, µs".into(), format!("{:.0}", report.cpu_us_a_request)]);
    rest.row(["messages/s".into(), format!("{:.0}", report.messages_per_s)]);
    rest.row(["router's CPU a token, µs".into(), format!("{:.2}", report.cpu_us_a_token)]);
    for line in rest.lines() {
        say!("{line}");
    }
}
