//! `cohort bench`: measures a running cluster, or steps, operations and collectives with no cluster around them.

mod cards;
mod collectives;
mod draws;
mod floor;
mod leader;
mod load;
mod machine;
mod ops;
mod overload;
mod router;
mod stats;
mod steps;
mod strangers;

use std::time::Duration;

use anyhow::bail;
use proto::v1::{GetActivityRequest, GetModelInfoRequest, GroupActivity};

use crate::client;
use crate::out::say;
use crate::table::{Align, Table};

pub use collectives::{CollectivesArgs, Transport};
pub use floor::Floor;
pub use load::Random;
pub use machine::TargetArgs;
pub use ops::KernelsArgs;
pub use overload::OverloadArgs;
pub use router::RouterArgs;
use strangers::Strangers;

pub use stats::{GroupTraffic, Measured, Percentiles, Summary};
pub use steps::{DecodeArgs, PrefillArgs};

const MORE: &str = "\
Without a subcommand this is `bench serve`.

Prompts are random tokens and the end of sequence is ignored, so every request costs the same. By default --clients
clients each send their next request when their last one is answered; with --rate, requests arrive at random times
at that mean rate whether or not earlier ones are answered.";

const STEPS_MORE: &str = "\
Floors come from this run: bytes over the bandwidth of a large copy (read and written), operations over the rate of a
large matrix product. Without --model or --preset the embedded model is measured.

Examples:
  cohort bench decode --preset north-mini-code --batch 1,8 --context 8192
  cohort bench decode --preset north-mini-code --batch 1 --tensor-parallel 2
  cohort bench prefill --preset north-mini-code --layers 4 --device cpu --prompt 512 --chunk 512
  cohort bench kernels --preset command-a-plus --rows 1,16,256";

/// Flags of `cohort bench`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(args_conflicts_with_subcommands = true, after_help = MORE)]
pub struct Args {
    /// What to measure.
    #[command(subcommand)]
    pub what: Option<What>,
    /// Of `bench serve`.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What can be measured.
#[derive(Debug, Clone, PartialEq, clap::Subcommand)]
pub enum What {
    /// Latency and throughput of a cluster under load
    Serve(Box<ServeArgs>),
    /// Decode steps of one rank at a given context, against the bytes they must read
    #[command(after_help = STEPS_MORE)]
    Decode(Box<DecodeArgs>),
    /// Prompts of one rank, against the operations they must do
    #[command(after_help = STEPS_MORE)]
    Prefill(Box<PrefillArgs>),
    /// The operations of one layer, each against its own floor
    #[command(after_help = STEPS_MORE)]
    Kernels(Box<KernelsArgs>),
    /// All-reduce and the others between ranks of this process
    Collectives(CollectivesArgs),
    /// What a router adds to a leader that answers at once; needs no cluster
    Router(RouterArgs),
    /// How soon a full router says no; needs no cluster
    Overload(OverloadArgs),
}

/// Flags of `cohort bench serve`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct ServeArgs {
    /// The router's gRPC address
    #[arg(long, value_name = "URL", default_value = client::SERVER_DEFAULT)]
    pub server: String,
    /// How it is called.
    #[command(flatten)]
    pub tls: client::TlsFlags,
    /// Requests in flight at once (closed loop)
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "rate", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub clients: u32,
    /// Requests a second, Poisson arrivals (open loop)
    #[arg(long, value_name = "R")]
    pub rate: Option<f64>,
    /// Requests that are measured
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub requests: u32,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub prompt_tokens: u32,
    /// Tokens each request generates
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub output_tokens: u32,
    /// Requests sent before the measurement starts
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub warm_up: u32,
    /// Seed of prompts and arrival times
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Calls a second without a key that come meanwhile, to a server that asks for one and refuses them
    #[arg(long, value_name = "R")]
    pub strangers: Option<f64>,
    /// Give up on a request after this long
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0)]
    pub timeout: f64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Measures and prints.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let args = match &args.what {
        Some(What::Decode(decode)) => return steps::decode(decode),
        Some(What::Prefill(prefill)) => return steps::prefill(prefill),
        Some(What::Kernels(kernels)) => return ops::run(kernels),
        Some(What::Collectives(group)) => return collectives::run(group),
        Some(What::Serve(serve)) => serve,
        Some(What::Router(own)) => return router::run(own),
        Some(What::Overload(own)) => return overload::run(own),
        None => &args.serve,
    };
    let plan = load::Plan::try_from(args)?;
    let summary = super::runtime()?.block_on(measure(args, plan))?;
    if args.json {
        say!("{}", serde_json::to_string(&summary)?);
    } else {
        print(args, &summary);
    }
    if summary.requests_ok == 0 {
        bail!("no request was answered");
    }
    Ok(())
}

async fn measure(args: &ServeArgs, plan: load::Plan) -> anyhow::Result<Summary> {
    let mut client = client::client(client::channel_with(&args.server, &args.tls).await?);
    let info =
        client.get_model_info(GetModelInfoRequest {}).await.map_err(|status| client::explain(&status))?;
    let info = info.into_inner();
    let tokens = u64::from(args.prompt_tokens) + u64::from(args.output_tokens);
    if args.prompt_tokens == 0 || args.output_tokens == 0 || tokens > info.context_tokens_max.into() {
        bail!(
            "--prompt-tokens {} and --output-tokens {} must each be at least 1 and together at most the context of {}, {}",
            args.prompt_tokens,
            args.output_tokens,
            info.model,
            info.context_tokens_max,
        );
    }
    if !args.json {
        eprintln!("{}: {} × {} ranks, {}", info.model, info.groups_ready, info.tensor_parallel, info.dtype);
    }
    let before = activity(&mut client).await;
    let strangers = match args.strangers {
        Some(rate) => Some(Strangers::come(client::channel_with(&args.server, &args.tls).await?, rate)),
        None => None,
    };
    let mut summary = load::run(client.clone(), &plan, info.vocab_size).await;
    if let Some(strangers) = strangers {
        summary.strangers = strangers.stop().await?;
    }
    summary.groups = traffic(&before, &activity(&mut client).await);
    Ok(summary)
}

/// What the groups have done so far; nothing when the router does not say.
async fn activity(client: &mut client::Client) -> Vec<GroupActivity> {
    match client.get_activity(GetActivityRequest {}).await {
        Ok(answer) => answer.into_inner().groups,
        Err(status) => {
            tracing::warn!(%status, "the router does not say what its groups did");
            Vec::new()
        }
    }
}

/// What each group did between two answers. A group that was not there before, or started again, is left out.
fn traffic(before: &[GroupActivity], after: &[GroupActivity]) -> Vec<GroupTraffic> {
    let of_group = |now: &GroupActivity| {
        let then = before.iter().find(|then| then.address == now.address)?;
        let since = |of: fn(&GroupActivity) -> u64| of(now).checked_sub(of(then));
        let tokens = since(|of| of.tokens)?;
        let bytes_sent = since(|of| of.bytes_sent)?;
        let each = |amount: u64| if tokens == 0 { 0.0 } else { amount as f64 / tokens as f64 };
        let messages_sent = since(|of| of.messages_sent)?;
        Some(GroupTraffic {
            plan: now.plan.clone(),
            ranks: now.ranks,
            steps: since(|of| of.steps)?,
            tokens,
            bytes_sent,
            messages_sent,
            bytes_per_token: each(bytes_sent),
            messages_per_token: each(messages_sent),
        })
    };
    after.iter().filter_map(of_group).collect()
}

impl TryFrom<&ServeArgs> for load::Plan {
    type Error = anyhow::Error;

    fn try_from(args: &ServeArgs) -> anyhow::Result<Self> {
        let arrivals = match args.rate {
            None => load::Arrivals::Closed { clients: args.clients },
            Some(rate) if rate.is_finite() && rate > 0.0 => load::Arrivals::Poisson { per_second: rate },
            Some(rate) => bail!("--rate {rate}: must be above 0"),
        };
        if let Some(rate) = args.strangers.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
            bail!("--strangers {rate}: must be above 0");
        }
        let Ok(timeout) = Duration::try_from_secs_f64(args.timeout) else {
            bail!("--timeout {}: must be a number of seconds of at least 0", args.timeout);
        };
        Ok(Self {
            arrivals,
            requests: args.requests,
            warm_up: args.warm_up,
            prompt_tokens: args.prompt_tokens,
            output_tokens: args.output_tokens,
            seed: args.seed,
            timeout,
        })
    }
}

fn print(args: &ServeArgs, summary: &Summary) {
    let arrivals = match args.rate {
        None => format!("{} client(s)", args.clients),
        Some(rate) => format!("{rate} requests/s"),
    };
    say!(
        "{arrivals}, {} requests of {} prompt and {} output tokens, {:.2} s",
        args.requests,
        args.prompt_tokens,
        args.output_tokens,
        summary.duration_s
    );
    let mut latency = Table::new([Align::Left, Align::Right, Align::Right, Align::Right, Align::Right]);
    latency.row(["ms".into(), "mean".into(), "p50".into(), "p90".into(), "p99".into()]);
    let rows = [
        ("time to first token", &summary.ttft_ms),
        ("inter-token latency", &summary.itl_ms),
        ("time per output token", &summary.tpot_ms),
        ("end to end", &summary.e2e_ms),
    ];
    for (name, percentiles) in rows {
        if let Some(p) = percentiles {
            let cell = |value: f64| format!("{value:.2}");
            latency.row([name.into(), cell(p.mean), cell(p.p50), cell(p.p90), cell(p.p99)]);
        }
    }
    let mut totals = Table::new([Align::Left, Align::Right]);
    totals.row(["output tokens/s".into(), format!("{:.1}", summary.output_tokens_per_s)]);
    totals.row(["requests/s".into(), format!("{:.2}", summary.requests_per_s)]);
    totals.row(["answered".into(), summary.requests_ok.to_string()]);
    for (code, count) in &summary.errors {
        totals.row([format!("failed with {code}"), count.to_string()]);
    }
    for (code, count) in &summary.strangers {
        totals.row([format!("strangers answered with {code}"), count.to_string()]);
    }
    for line in latency.lines() {
        say!("{line}");
    }
    say!();
    for line in totals.lines() {
        say!("{line}");
    }
    print_traffic(&summary.groups);
}

/// What the ranks of each group sent each other, when they are several.
fn print_traffic(groups: &[GroupTraffic]) {
    let several: Vec<_> = groups.iter().filter(|group| group.ranks > 1).collect();
    if several.is_empty() {
        return;
    }
    let mut table =
        Table::new([Align::Left, Align::Right, Align::Right, Align::Right, Align::Right, Align::Right]);
    let heads = ["group", "ranks", "tokens", "MB sent", "bytes a token", "messages a token"];
    table.row(heads.map(str::to_owned));
    for group in several {
        table.row([
            group.plan.clone(),
            group.ranks.to_string(),
            group.tokens.to_string(),
            format!("{:.2}", group.bytes_sent as f64 / 1e6),
            format!("{:.0}", group.bytes_per_token),
            format!("{:.1}", group.messages_per_token),
        ]);
    }
    say!("\nSent between ranks, over all ranks of a group");
    for line in table.lines() {
        say!("{line}");
    }
}
