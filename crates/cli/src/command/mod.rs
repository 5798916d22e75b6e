//! The subcommands, one file each.

pub mod batch;
pub mod bench;
pub mod chat;
pub mod config;
pub mod debug;
pub mod demo;
pub mod generate;
pub mod group;
pub mod kernels;
pub mod keys;
pub mod plan;
pub mod router;
pub mod top;
pub mod up;
pub mod worker;

use anyhow::Context;
use clap::{Parser, Subcommand};
use tokio::runtime::Runtime;

use crate::args::LogFlags;
use crate::telemetry::{self, Role};

const MORE: &str = "\
Start with:
  cohort demo
  cohort up --tensor-parallel 2
  cohort generate --chat \"What does Vec::push do?\"";

/// A serving cluster for Cohere MoE models: a gRPC router and tensor-parallel workers.
#[derive(Debug, Parser)]
#[command(name = "cohort", version, after_help = MORE)]
pub struct Cli {
    /// Where logs go.
    #[command(flatten)]
    pub log: LogFlags,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a router and two workers on the embedded model, ask one question, and stop
    Demo(demo::Args),
    /// Run a cluster on this machine: a router and its worker groups
    Up(Box<up::Args>),
    /// Send one prompt to a running cluster
    Generate(Box<generate::Args>),
    /// Chat with a running cluster in the terminal
    Chat(Box<chat::Args>),
    /// Send a file of requests to a running cluster
    Batch(batch::Args),
    /// Measure a running cluster
    Bench(bench::Args),
    /// Check, show or explain a configuration
    Config(config::Args),
    /// Say whether a group would fit and what it would serve; needs no weights and no GPU
    Plan(Box<plan::Args>),
    /// Ask a running worker what it counts
    Debug(debug::Args),
    /// Watch a running cluster in the terminal
    Top(top::Args),
    /// Check the GPU kernels of a model; needs no GPU
    Kernels(kernels::Args),
    /// Make API keys for callers
    Keys(keys::Args),
    /// Run a router for worker groups that run elsewhere
    Router(Box<router::Args>),
    /// Run the ranks of one worker group on this machine
    Group(Box<group::Args>),
    /// Run one rank of a worker group
    Worker(Box<worker::Args>),
}

impl Command {
    /// Runs the subcommand to its end.
    ///
    /// # Errors
    /// Whatever ended it other than success or an order to stop.
    pub fn run(self, log: &LogFlags) -> anyhow::Result<()> {
        // A command with a configuration starts it by that.
        let _tools = (!self.is_configured())
            .then(|| telemetry::start(&log.telemetry(), &Role::tool(), self.log_level_default()));
        match self {
            Self::Demo(args) => demo::run(&args, log),
            Self::Up(args) => up::run(&args, log),
            Self::Generate(args) => generate::run(&args),
            Self::Chat(args) => chat::run(&args),
            Self::Batch(args) => batch::run(&args),
            Self::Bench(args) => bench::run(&args),
            Self::Config(args) => config::run(&args),
            Self::Plan(args) => plan::run(&args),
            Self::Debug(args) => debug::run(&args),
            Self::Top(args) => top::run(&args),
            Self::Kernels(args) => kernels::run(&args),
            Self::Keys(args) => keys::run(&args),
            Self::Router(args) => router::run(&args, log),
            Self::Group(args) => group::run(&args, log),
            Self::Worker(args) => worker::run(&args, log),
        }
    }

    /// Whether logs and traces are what a configuration says, and not flags alone.
    const fn is_configured(&self) -> bool {
        matches!(self, Self::Up(_) | Self::Router(_) | Self::Group(_) | Self::Worker(_))
    }

    /// Whether a supervisor started this process and reads its reports.
    #[must_use]
    pub fn supervised(&self) -> bool {
        match self {
            Self::Router(args) => args.supervised,
            Self::Group(args) => args.supervised,
            Self::Worker(args) => args.supervised,
            Self::Demo(_)
            | Self::Up(_)
            | Self::Generate(_)
            | Self::Chat(_)
            | Self::Batch(_)
            | Self::Bench(_)
            | Self::Config(_)
            | Self::Debug(_)
            | Self::Top(_)
            | Self::Kernels(_)
            | Self::Keys(_)
            | Self::Plan(_) => false,
        }
    }

    /// What is logged unless the user says otherwise: a service tells its story, a tool only its troubles.
    #[must_use]
    pub fn log_level_default(&self) -> &'static str {
        match self {
            Self::Router(_) | Self::Group(_) | Self::Worker(_) => SERVICE_LEVEL,
            Self::Demo(_)
            | Self::Up(_)
            | Self::Generate(_)
            | Self::Chat(_)
            | Self::Batch(_)
            | Self::Bench(_)
            | Self::Config(_)
            | Self::Debug(_)
            | Self::Top(_)
            | Self::Kernels(_)
            | Self::Keys(_)
            | Self::Plan(_) => TOOL_LEVEL,
        }
    }
}

/// What a service logs unless the user says otherwise.
const SERVICE_LEVEL: &str = "info";
/// What `cohort up` and tools log.
const TOOL_LEVEL: &str = "warn";

/// What children log: what the user asked for, else `level`, so that bars and answers stay readable.
fn quiet(telemetry: &settings::Telemetry, level: &str) -> settings::Telemetry {
    let asked = telemetry.log_level.is_some() || std::env::var_os("RUST_LOG").is_some();
    let log_level = if asked { telemetry.log_level.clone() } else { Some(level.to_owned()) };
    settings::Telemetry { log_level, ..telemetry.clone() }
}

/// Threads for talking and supervising; models compute in threads of their own.
fn runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")
}

/// Threads for serving callers, one for each two cores. What a request does is short, and where several threads serve,
/// each of its steps may wake another one, which costs more than the step. Long texts are tokenized on other threads, and
/// have the other cores.
fn serving_runtime() -> anyhow::Result<Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.div_ceil(2))
        .enable_all()
        .build()
        .context("start the runtime")
}
