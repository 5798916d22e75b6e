//! `cohort batch`: a file of requests to a running cluster.

mod lines;
mod output;
mod send;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tokio_stream::wrappers::ReceiverStream;

use crate::client;
use crate::out::say;
use crate::supervisor::signals;
use crate::table::{Align, Table};

pub use lines::{Checked, Line};
pub use output::Output;

const SERVER_DEFAULT: &str = "http://127.0.0.1:8080";
const MORE: &str = "\
IN has a request on each line, in OpenAI's batch form:
  {\"custom_id\": \"a\", \"method\": \"POST\", \"url\": \"/v1/chat/completions\", \"body\": {\"messages\": [...]}}
OUT gets a line for each: {\"id\", \"custom_id\", \"response\": {\"status_code\", \"request_id\", \"body\"}, \"error\"}, in the order
they are answered. When OUT has lines already, their requests are not sent again: a batch that was stopped goes on.";

/// Flags of `cohort batch`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct Args {
    /// File of requests, one JSON object a line
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// File of answers; it is added to
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// The router's HTTP address
    #[arg(long, value_name = "URL", default_value = SERVER_DEFAULT)]
    pub server: String,
    /// How it is called.
    #[command(flatten)]
    pub tls: client::TlsFlags,
    /// Requests in flight at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub in_flight: u32,
    /// How often a request is sent again when the server is full, restarting or cannot be reached
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub retries: u32,
    /// Give up on an answer after this long
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub timeout: f64,
    /// Print the summary as one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// What came of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    /// Answered with a status of success.
    answered: u64,
    /// Answered with any other status.
    refused: u64,
    /// Of an earlier run.
    before: u64,
}

/// Sends what has no answer yet.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let Ok(timeout) = Duration::try_from_secs_f64(args.timeout) else {
        bail!("--timeout {}: must be a number of seconds of at least 0", args.timeout);
    };
    let sender = send::Sender::new((&args.server, &args.tls), args.retries, timeout)?;
    let checked = Checked::read(&args.input)?;
    let output = Output::open(&args.output)?;
    if let Some(stranger) = output.done().iter().find(|id| !checked.ids().contains(*id)) {
        bail!(
            "{} has an answer to `{stranger}`, which is not in {}: choose another file for this batch's answers",
            args.output.display(),
            args.input.display()
        );
    }
    let stop = signals::stop_token(false)?;
    let started = Instant::now();
    let before = output.done().len() as u64;
    let total = checked.ids().len() as u64;
    let bar = progress(total, before);
    let work = work(args, sender, output, &bar, &stop);
    let (counts, failed) = super::runtime()?.block_on(work)?;
    bar.finish_and_clear();
    let counts = Counts { before, ..counts };
    print(args, &counts, total, started.elapsed())?;
    if let Some(why) = failed {
        bail!("{why:#}; the answers so far are kept, the same command goes on");
    }
    if counts.answered + counts.refused + counts.before < total {
        bail!("stopped; the same command goes on");
    }
    Ok(())
}

async fn work(
    args: &Args,
    sender: send::Sender,
    mut output: Output,
    bar: &ProgressBar,
    stop: &tokio_util::sync::CancellationToken,
) -> anyhow::Result<(Counts, Option<anyhow::Error>)> {
    let lines = lines::stream(&args.input, output.done().clone(), stop.clone())
        .with_context(|| format!("read {}", args.input.display()))?;
    let answers = ReceiverStream::new(lines).map(|line| {
        let sender = sender.clone();
        async move {
            let line = line?;
            let answer = sender.send(&line).await?;
            Ok::<_, anyhow::Error>((line, answer))
        }
    });
    let mut answers = answers.buffer_unordered(args.in_flight as usize);
    let mut counts = Counts::default();
    let mut failed = None;
    while let Some(answer) = answers.next().await {
        match answer {
            Ok((line, answer)) => {
                match answer.status {
                    200..300 => counts.answered += 1,
                    _ => counts.refused += 1,
                }
                output.write(&line, &answer)?;
                bar.inc(1);
            }
            // What is in flight is still worth having; nothing new is sent.
            Err(error) => {
                stop.cancel();
                failed.get_or_insert(error);
            }
        }
    }
    output.finish()?;
    Ok((counts, failed))
}

fn progress(total: u64, before: u64) -> ProgressBar {
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let template = "{bar:32.cyan/dim}  {pos} of {len}  {per_sec}  {eta} left";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(total), target).with_style(style.progress_chars("━╸─"));
    bar.set_position(before);
    bar.reset_eta();
    bar
}

fn print(args: &Args, counts: &Counts, total: u64, took: Duration) -> anyhow::Result<()> {
    let Counts { answered, refused, before } = *counts;
    let left = total.saturating_sub(answered + refused + before);
    if args.json {
        let summary = json!({
            "requests": total, "answered": answered, "refused": refused, "answered_before": before, "left": left,
            "duration_s": took.as_secs_f64(),
        });
        say!("{}", serde_json::to_string(&summary)?);
        return Ok(());
    }
    let mut table = Table::new([Align::Left, Align::Right]);
    let rows = [
        ("requests", total),
        ("answered", answered),
        ("refused", refused),
        ("answered before", before),
        ("left", left),
    ];
    for (name, count) in rows {
        table.row([name.into(), count.to_string()]);
    }
    table.row(["seconds".into(), format!("{:.2}", took.as_secs_f64())]);
    for line in table.lines() {
        say!("{line}");
    }
    Ok(())
}
