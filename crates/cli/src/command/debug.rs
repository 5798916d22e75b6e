//! `cohort debug`: what a running worker counts and remembers.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::bail;
use model::ExpertLoad;
use proto::worker::worker_client::WorkerClient;
use proto::worker::{GetActivityRequest, GetStepsRequest, GroupActivity, StepRecord};
use security::{Badge, Identified, SharedSecret};
use serde_json::json;
use tonic::Request;
use types::limits::MESSAGE_BYTES_MAX;

use crate::out::say;
use crate::table::{Align, Table};
use crate::{client, identity, run_dir};

/// Longest wait for an answer, which comes between two steps.
const PATIENCE: Duration = Duration::from_secs(30);

const MORE: &str = "\
A group's leader says where it listens when it starts, and `cohort bench` needs only the router.
Leaders of this user's `cohort up` are found, with their secret, in $XDG_RUNTIME_DIR/cohort, or in cohort-UID beside
temporary files; for others the variable COHORT_CLUSTER_SECRET holds the cluster's secret, where it has one.

Examples:
  cohort debug steps --last 20
  cohort debug collectives --worker http://127.0.0.1:7000
  cohort debug expert-load --worker http://127.0.0.1:7000 > load.json";

/// Flags of `cohort debug`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct Args {
    /// What to ask for.
    #[command(subcommand)]
    pub what: What,
}

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, clap::Subcommand)]
pub enum What {
    /// How often each expert of each layer was chosen, as `cohort plan --expert-load` reads it
    ExpertLoad(WorkerArgs),
    /// What the ranks have said to each other
    Collectives(CollectivesArgs),
    /// What the last steps were like, also while one does not end
    Steps(StepsArgs),
}

/// Whom to ask.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct WorkerArgs {
    /// Where the group's leader listens for routers [default: the only one that `cohort up` runs here]
    #[arg(long, value_name = "URL")]
    pub worker: Option<String>,
}

/// Flags of `cohort debug collectives`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct CollectivesArgs {
    /// Whom to ask.
    #[command(flatten)]
    pub worker: WorkerArgs,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Flags of `cohort debug steps`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct StepsArgs {
    /// Whom to ask.
    #[command(flatten)]
    pub worker: WorkerArgs,
    /// How many steps; 2,048 are kept
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub last: u32,
    /// Print one JSON object a step instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Asks and prints.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let runtime = super::runtime()?;
    match &args.what {
        What::ExpertLoad(worker) => expert_load(&runtime.block_on(activity(worker))?),
        What::Collectives(args) => {
            let activity = runtime.block_on(activity(&args.worker))?;
            if args.json {
                say!("{}", as_json(&activity))
            } else {
                show(&activity)
            }
            Ok(())
        }
        What::Steps(args) => {
            let steps = runtime.block_on(steps(args))?;
            if args.json {
                steps.iter().for_each(|step| say!("{}", worker::step_json(step)));
            } else {
                show_steps(&steps);
            }
            Ok(())
        }
    }
}

async fn connect(args: &WorkerArgs) -> anyhow::Result<WorkerClient<Identified>> {
    let url = match &args.worker {
        Some(url) => url.clone(),
        None => only_leader(&run_dir::leaders())?,
    };
    let channel = client::channel_of(("--worker", &url), &client::TlsFlags::default()).await?;
    let told = identity::from_variable()?;
    let address = url.rsplit_once("://").map_or(url.as_str(), |(_, address)| address).trim_end_matches('/');
    let secret = told.or_else(|| run_dir::secret_of(address.parse().ok()?));
    let badge = Badge::new(secret.map(SharedSecret::from).as_ref());
    let worker = WorkerClient::with_interceptor(channel, badge);
    Ok(worker.max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// The leader to ask when none was named.
fn only_leader(leaders: &[SocketAddr]) -> anyhow::Result<String> {
    let named = |leader: &SocketAddr| format!("--worker http://{leader}");
    match leaders {
        [] => {
            bail!("no cohort up of this user runs here; name a group's leader with --worker http://HOST:PORT")
        }
        [leader] => Ok(format!("http://{leader}")),
        several => {
            let all: Vec<String> = several.iter().map(named).collect();
            bail!("there are several leaders here; name one:\n  {}", all.join("\n  "))
        }
    }
}

async fn steps(args: &StepsArgs) -> anyhow::Result<Vec<StepRecord>> {
    let mut worker = connect(&args.worker).await?;
    let mut request = Request::new(GetStepsRequest { last: args.last });
    request.set_timeout(PATIENCE);
    let answer = worker.get_steps(request).await.map_err(|status| client::explain(&status))?;
    Ok(answer.into_inner().steps)
}

async fn activity(args: &WorkerArgs) -> anyhow::Result<GroupActivity> {
    let mut worker = connect(args).await?;
    let mut request = Request::new(GetActivityRequest {});
    request.set_timeout(PATIENCE);
    let answer = worker.get_activity(request).await.map_err(|status| client::explain(&status))?;
    Ok(answer.into_inner())
}

fn expert_load(activity: &GroupActivity) -> anyhow::Result<()> {
    if activity.layers.is_empty() {
        bail!(
            "this group has counted no choices of experts: none were made, or its device does not count them"
        );
    }
    let chosen = activity.layers.iter().map(|layer| layer.chosen.clone()).collect();
    let text = ExpertLoad::new("worker", chosen).to_json();
    say!("{}", text.trim_end());
    Ok(())
}

fn as_json(activity: &GroupActivity) -> serde_json::Value {
    let ranks = activity.ranks.iter().map(|rank| {
        let collectives = rank.collectives.iter().map(|of| {
            json!({
                "operation": of.operation,
                "calls": of.calls,
                "messages_sent": of.messages_sent,
                "bytes_sent": of.bytes_sent,
                "bytes_received": of.bytes_received,
            })
        });
        json!({
            "steps": rank.steps,
            "rows": rank.rows,
            "rows_sent": rank.rows_sent,
            "rows_received": rank.rows_received,
            "collectives": collectives.collect::<Vec<_>>(),
        })
    });
    json!({ "plan": activity.plan, "tokens": activity.tokens, "ranks": ranks.collect::<Vec<_>>() })
}

fn show(activity: &GroupActivity) {
    let steps = activity.ranks.first().map_or(0, |rank| rank.steps);
    say!("{}: {} tokens in {steps} steps", activity.plan, activity.tokens);
    let mut table =
        Table::new([Align::Right, Align::Left, Align::Right, Align::Right, Align::Right, Align::Right]);
    let heads = ["rank", "operation", "calls", "messages sent", "bytes sent", "bytes received"];
    table.row(heads.map(str::to_owned));
    for (at, rank) in activity.ranks.iter().enumerate() {
        for of in &rank.collectives {
            table.row([
                at.to_string(),
                of.operation.clone(),
                of.calls.to_string(),
                of.messages_sent.to_string(),
                of.bytes_sent.to_string(),
                of.bytes_received.to_string(),
            ]);
        }
    }
    table.lines().for_each(|line| say!("{line}"));
}

fn show_steps(steps: &[StepRecord]) {
    if steps.is_empty() {
        say!("this group has run no step yet");
        return;
    }
    let heads = [
        "step",
        "at s",
        "prefill",
        "decode",
        "logits",
        "running",
        "waiting",
        "free full",
        "sliding",
        "plan µs",
        "gap µs",
        "step µs",
        "rows of sub-groups",
    ];
    let mut align = [Align::Right; 13];
    align[12] = Align::Left;
    let mut table = Table::new(align);
    table.row(heads.map(str::to_owned));
    let known = |time: Option<u32>| time.map_or_else(|| "-".to_owned(), |time| time.to_string());
    for step in steps {
        let rows: Vec<String> = step.sub_group_rows.iter().map(u32::to_string).collect();
        table.row([
            step.step.to_string(),
            format!("{}.{:03}", step.planned_us / 1_000_000, step.planned_us / 1000 % 1000),
            step.prefill_rows.to_string(),
            step.decode_rows.to_string(),
            step.logit_rows.to_string(),
            step.running.to_string(),
            step.waiting.to_string(),
            step.kv_free_full.to_string(),
            step.kv_free_sliding.to_string(),
            step.plan_us.to_string(),
            known(step.gap_us),
            known(step.step_us),
            rows.join(" "),
        ]);
    }
    table.lines().for_each(|line| say!("{line}"));
}
