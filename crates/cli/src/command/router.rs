//! `cohort router`: the front door for worker groups that run elsewhere.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::bail;
use settings::{HttpListen, Settings};

use crate::args::{self, ConfigFlags, FileFlag, LogFlags, ModelFlags, RouterFlags, StartedBy, TraceFlags};
use crate::out::write_note;
use crate::report::{self, Event, Line, Serving};
use crate::supervisor::{lifeline, signals};
use crate::telemetry::{self, Role};
use crate::{embedded, identity};

const MORE: &str = "\
Clients speak gRPC and HTTP to a router. It turns text into tokens, picks a group for each request, and streams
the answer back. Of the model's files it needs only the tokenizer and the chat template.";

/// Flags of `cohort router`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct Args {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub file: FileFlag,
    /// Leaders of the worker groups, as http://host:port or https://host:port; separate several with commas
    #[arg(long, value_name = "ADDR,…", value_delimiter = ',')]
    pub workers: Vec<String>,
    /// What is served.
    #[command(flatten)]
    pub model: ModelFlags,
    /// Where it is served.
    #[command(flatten)]
    pub router: RouterFlags,
    /// What is traced.
    #[command(flatten)]
    pub trace: TraceFlags,
    /// Started by a supervisor: reports go to stdout as JSON lines, and the end of stdin ends this process
    #[arg(long, hide = true)]
    pub supervised: bool,
}

/// The worker addresses as a group of flags of their own: only this subcommand takes them.
struct WorkersFlag<'a>(&'a [String]);

impl ConfigFlags for WorkersFlag<'_> {
    fn flags(&self) -> Vec<settings::Flag> {
        if self.0.is_empty() {
            return Vec::new();
        }
        vec![settings::Flag { flag: "--workers", key: "router.workers", value: self.0.join(",") }]
    }
}

impl Args {
    /// These arguments as a child's command line, after the program's name.
    #[must_use]
    pub fn to_argv(&self) -> Vec<String> {
        let mut argv = vec!["router".to_owned()];
        argv.extend(self.file.config.iter().map(|path| format!("--config={}", path.display())));
        argv.extend(WorkersFlag(&self.workers).to_argv());
        argv.extend(self.model.to_argv());
        argv.extend(self.router.to_argv());
        argv.extend(self.trace.to_argv());
        argv.extend(self.supervised.then(|| "--supervised".to_owned()));
        argv
    }

    /// What a supervised router of these settings is started with: again at the addresses it `served` at, if it did.
    pub(crate) fn supervised(settings: &Settings, leaders: &[SocketAddr], served: Option<Serving>) -> Self {
        let scheme = if settings.group.tls.certificate.is_some() { "https" } else { "http" };
        let mut router = RouterFlags::from(settings);
        if let Some(served) = served {
            router.grpc_listen = Some(served.grpc);
            router.http_listen = Some(served.http.map_or(HttpListen::Off, HttpListen::At));
        }
        Self {
            file: FileFlag::default(),
            workers: leaders.iter().map(|leader| format!("{scheme}://{leader}")).collect(),
            model: ModelFlags::from(settings),
            router,
            trace: TraceFlags::from(settings),
            supervised: true,
        }
    }
}

/// Longest a router may take to stop.
pub(crate) fn stop_grace(settings: &Settings) -> Duration {
    settings.router.withdraw_grace_s + settings.router.drain_grace_s
}

/// Serves until it is told to stop.
pub(crate) fn run(args: &Args, log: &LogFlags) -> anyhow::Result<()> {
    if args.supervised {
        lifeline::hold()?;
    }
    let stop = signals::stop_token(args.supervised)?;
    let settings = args::load(
        StartedBy::supervised(args.supervised),
        &args.file,
        &[&WorkersFlag(&args.workers), &args.model, &args.router, &args.trace, log],
    )?;
    let _telemetry = telemetry::start(&settings.telemetry, &Role::router(), super::SERVICE_LEVEL);
    if settings.router.workers.is_empty() {
        bail!(
            "a router needs at least one worker group: --workers http://HOST:PORT, or router.workers in the file"
        );
    }
    let files = embedded::text_files(&settings)?;
    let mut config = settings.router();
    config.access.secret = identity::secret(&settings, StartedBy::supervised(args.supervised))?;
    let supervised = args.supervised;
    super::serving_runtime()?.block_on(async {
        Ok(router::serve(config, files, |bound| announce(bound, supervised), stop).await?)
    })
}

/// Says where the router serves.
fn announce(bound: router::Bound, supervised: bool) {
    let serving = Serving { grpc: bound.grpc, http: bound.http };
    match supervised {
        true => report::say(&Line { pid: std::process::id(), rank: None, event: Event::Serving(serving) }),
        false => {
            write_note(format_args!("serving gRPC at {}{}", serving.grpc, http_part(serving)));
        }
    }
}

/// `, HTTP at ADDR`, when HTTP is served.
pub(crate) fn http_part(serving: Serving) -> String {
    serving.http.map(|address| format!(", HTTP at {address}")).unwrap_or_default()
}
