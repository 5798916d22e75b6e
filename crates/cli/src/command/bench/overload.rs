//! `cohort bench overload`: how soon a router says no when all its places and its waiting room are taken.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::future::try_join_all;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use super::leader::NullLeader;
use super::router::{Question, Router, STOP_GRACE, VOCAB_SIZE};
use super::stats::Percentiles;
use crate::client::{self, Client};
use crate::out::say;
use crate::table::{Align, Table};

/// A request that was let into the waiting room gives up after this, and another one is tried.
const PROBE_PATIENCE: Duration = Duration::from_millis(100);

/// Flags of `cohort bench overload`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct OverloadArgs {
    /// Directory with the tokenizer and chat template [default: the embedded demo model's]
    #[arg(long, value_name = "DIR")]
    pub model: Option<String>,
    /// Answers that are held open: all places of the router
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub requests_max: u32,
    /// Requests that wait behind them
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub waiting: u32,
    /// Requests a second beyond them, each of which is refused
    #[arg(long, value_name = "R", default_value_t = 1000.0)]
    pub rate: f64,
    /// How long they come
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    pub seconds: f64,
    /// Tokens of each chat prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub prompt_tokens: u32,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
struct Report {
    refused: usize,
    /// From sending a request to its refusal.
    refused_ms: Percentiles,
    refused_max_ms: f64,
    /// Requests that were to be refused and ended otherwise, by how.
    others: BTreeMap<String, u64>,
    /// Answers that were held, and those that waited, which came to their end afterwards.
    held_finished: usize,
    waited_finished: usize,
}

/// Measures and prints.
pub(super) fn run(args: &OverloadArgs) -> anyhow::Result<()> {
    if !(args.rate.is_finite() && args.rate > 0.0 && args.seconds.is_finite() && args.seconds > 0.0) {
        bail!("--rate {} and --seconds {}: must be above 0", args.rate, args.seconds);
    }
    let report = super::super::runtime()?.block_on(measure(args))?;
    if args.json {
        say!("{}", serde_json::to_string(&report)?);
    } else {
        print(args, &report);
    }
    if report.others.is_empty() { Ok(()) } else { bail!("not all were refused: {:?}", report.others) }
}

async fn measure(args: &OverloadArgs) -> anyhow::Result<Report> {
    let leader = Arc::new(NullLeader::start(VOCAB_SIZE)?);
    let flags = [
        format!("--requests-max={}", args.requests_max),
        format!("--queue-requests-max={}", args.waiting),
        "--queue-wait-max=3600".to_owned(),
    ];
    let router = Router::start_with(args.model.as_deref(), &flags, &leader).await?;
    let client = client::client(client::channel(&router.server).await?);
    let question = Arc::new(Question::of(client.clone(), args.prompt_tokens).await?);
    let held = try_join_all((0..args.requests_max).map(|at| opened(client.clone(), &question, at)));
    let held = held.await.map_err(|status| client::explain(&status))?;
    let mut waiting = JoinSet::new();
    for at in 0..args.waiting {
        let (client, question) = (client.clone(), Arc::clone(&question));
        waiting.spawn(async move { finish(let_in(&client, &question, at).await?).await });
    }
    fill(&client, &question).await?;

    let mut tasks = JoinSet::new();
    let (started, count) =
        (Instant::now(), (args.rate * args.seconds).ceil().min(f64::from(u32::MAX)) as u32);
    for at in 0..count {
        tokio::time::sleep_until(started + Duration::from_secs_f64(f64::from(at) / args.rate)).await;
        let (client, question) = (client.clone(), Arc::clone(&question));
        tasks.spawn(async move { refused(client, &question, at).await });
    }
    let (mut took, mut others) = (Vec::new(), BTreeMap::new());
    for outcome in tasks.join_all().await {
        match outcome {
            Ok(time) => took.push(time.as_secs_f64() * 1e3),
            Err(how) => *others.entry(how.to_owned()).or_default() += 1,
        }
    }
    leader.release();
    let held_finished = try_join_all(held.into_iter().map(finish)).await;
    let held_finished = held_finished.map_err(|status| client::explain(&status))?.len();
    let waited = waiting.join_all().await.into_iter().collect::<Result<Vec<()>, Status>>();
    let waited_finished = waited.map_err(|status| client::explain(&status))?.len();
    router.handle.stop(STOP_GRACE);
    let refused_max_ms = took.iter().copied().fold(0.0, f64::max);
    Ok(Report {
        refused: took.len(),
        refused_ms: Percentiles::of(took).context("no request was refused")?,
        refused_max_ms,
        others,
        held_finished,
        waited_finished,
    })
}

type Answer = tonic::Streaming<proto::v1::GenerateResponse>;

/// An answer that has come to its first token, and stays there until the leader lets go.
async fn opened(mut client: Client, question: &Question, at: u32) -> Result<Answer, Status> {
    let mut request = question.request(at, 2);
    request.stopping.get_or_insert_default().ignore_eos = true;
    let mut stream = client.generate(request).await?.into_inner();
    stream.message().await?;
    Ok(stream)
}

/// As [`opened`], again for as long as a probe takes the last place in the waiting room.
async fn let_in(client: &Client, question: &Question, at: u32) -> Result<Answer, Status> {
    loop {
        match opened(client.clone(), question, at).await {
            Err(status) if status.code() == Code::ResourceExhausted => {
                tokio::time::sleep(PROBE_PATIENCE / 10).await;
            }
            result => return result,
        }
    }
}

async fn finish(mut stream: Answer) -> Result<(), Status> {
    while stream.message().await?.is_some() {}
    Ok(())
}

/// Until the waiting room is full.
async fn fill(client: &Client, question: &Question) -> anyhow::Result<()> {
    loop {
        let mut request = Request::new(question.request(0, 1));
        request.set_timeout(PROBE_PATIENCE);
        match client.clone().generate(request).await.map(drop).map_err(|status| status.code()) {
            Err(Code::ResourceExhausted) => return Ok(()),
            Err(Code::DeadlineExceeded | Code::Cancelled) => {}
            other => bail!("a full router answered {other:?}"),
        }
    }
}

/// How long a refusal took.
async fn refused(mut client: Client, question: &Question, at: u32) -> Result<Duration, &'static str> {
    let request = question.request(at, 1);
    let started = Instant::now();
    match client.generate(request).await {
        Err(status) if status.code() == Code::ResourceExhausted => Ok(started.elapsed()),
        Err(status) => Err(client::code_name(status.code())),
        Ok(_) => Err("OK"),
    }
}

fn print(args: &OverloadArgs, report: &Report) {
    say!(
        "{} requests/s for {} s beyond {} open answers and {} that wait",
        args.rate,
        args.seconds,
        args.requests_max,
        args.waiting
    );
    let mut table = Table::new([Align::Left, Align::Right]);
    table.row(["refused".into(), report.refused.to_string()]);
    for (name, ms) in
        [("p50", report.refused_ms.p50), ("p99", report.refused_ms.p99), ("worst", report.refused_max_ms)]
    {
        table.row([format!("{name} until the refusal, ms"), format!("{ms:.2}")]);
    }
    table.row(["open answers that finished".into(), report.held_finished.to_string()]);
    table.row(["waiting requests that were answered".into(), report.waited_finished.to_string()]);
    for line in table.lines() {
        say!("{line}");
    }
}
