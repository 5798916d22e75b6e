//! `cohort router`: the front door for worker groups that run elsewhere.

use std::convert::Infallible;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use router::{Change, Start};
use settings::{HttpListen, Loaded, Settings};
use tokio::sync::{mpsc, oneshot};

use super::{Cli, Command};
use crate::args::{self, ConfigFlags, FileFlag, LogFlags, ModelFlags, RouterFlags, StartedBy, TraceFlags};
use crate::out::write_note;
use crate::reload::{self, Outcome, Watched};
use crate::report::{self, Event, Line, Serving};
use crate::supervisor::cluster::Leader;
use crate::supervisor::signals::Asked;
use crate::supervisor::{Order, lifeline, signals};
use crate::telemetry::{self, Role};
use crate::{embedded, identity};

/// Orders of a supervisor held while one is carried out.
const ORDERS_MAX: usize = 16;

const MORE: &str = "\
Clients speak gRPC and HTTP to a router. It turns text into tokens, picks a group for each request, and streams
the answer back. Of the model's files it needs only the tokenizer and the chat template.
A cluster file that changes is read again, and so it is on SIGHUP: router.workers, router.weights, router.limits,
router.http, router.keys_file and the graces change while requests run; what needs a restart is refused.";

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
    /// Shares of the requests that they get, as ADDRESS=WEIGHT, 0 to 100 each; separate several with commas [default: 1]
    #[arg(long, value_name = "ADDR=N,…", value_delimiter = ',')]
    pub weights: Vec<String>,
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

/// The worker addresses and their weights as a group of flags of their own: only this subcommand takes them.
struct WorkersFlags<'a> {
    workers: &'a [String],
    weights: &'a [String],
}

impl ConfigFlags for WorkersFlags<'_> {
    fn flags(&self) -> Vec<settings::Flag> {
        let lists =
            [("--workers", "router.workers", self.workers), ("--weights", "router.weights", self.weights)];
        let given = lists.into_iter().filter(|(_, _, list)| !list.is_empty());
        given.map(|(flag, key, list)| settings::Flag { flag, key, value: list.join(",") }).collect()
    }
}

impl Args {
    /// The configuration as it is now.
    fn load(&self, log: &LogFlags) -> Result<Loaded, settings::Error> {
        args::load_traced(
            StartedBy::supervised(self.supervised),
            &self.file,
            &[&self.workers_flags(), &self.model, &self.router, &self.trace, log],
        )
    }

    fn workers_flags(&self) -> WorkersFlags<'_> {
        WorkersFlags { workers: &self.workers, weights: &self.weights }
    }

    /// These arguments as a child's command line, after the program's name.
    #[must_use]
    pub fn to_argv(&self) -> Vec<String> {
        let mut argv = vec!["router".to_owned()];
        argv.extend(self.file.config.iter().map(|path| format!("--config={}", path.display())));
        argv.extend(self.workers_flags().to_argv());
        argv.extend(self.model.to_argv());
        argv.extend(self.router.to_argv());
        argv.extend(self.trace.to_argv());
        argv.extend(self.supervised.then(|| "--supervised".to_owned()));
        argv
    }

    /// What a supervised router of these settings is started with: again at the addresses it `served` at, if it did.
    pub(crate) fn supervised(settings: &Settings, leaders: &[Leader], served: Option<Serving>) -> Self {
        let scheme = if settings.group.tls.certificate.is_some() { "https" } else { "http" };
        let mut router = RouterFlags::from(settings);
        if let Some(served) = served {
            router.grpc_listen = Some(served.grpc);
            router.http_listen = Some(served.http.map_or(HttpListen::Off, HttpListen::At));
        }
        let url = |leader: &Leader| format!("{scheme}://{}", leader.address);
        let weight = |leader: &Leader| settings.cluster.weights.get(leader.group as usize);
        let weighed =
            leaders.iter().filter_map(|leader| Some(format!("{}={}", url(leader), weight(leader)?)));
        Self {
            file: FileFlag::default(),
            workers: leaders.iter().map(url).collect(),
            weights: weighed.collect(),
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
    let (orders, given) = mpsc::channel(ORDERS_MAX);
    if args.supervised {
        lifeline::hold(move |order| {
            if orders.try_send(order).is_err() {
                tracing::warn!("an order was lost: others wait to be carried out");
            }
        })?;
    }
    let Asked { stop, reload } = signals::stop_and_reload(args.supervised)?;
    // Before it is read: what changes in between is then seen as a change.
    let watched = Watched::new(&args.file.config, reload);
    let loaded = args.load(log)?;
    let settings = &loaded.settings;
    let _telemetry = telemetry::start(&settings.telemetry, &Role::router(), super::SERVICE_LEVEL);
    if settings.router.workers.is_empty() && !settings.router.registration {
        bail!(
            "a router needs at least one worker group: --workers http://HOST:PORT, or router.workers or \
             router.registration in the file"
        );
    }
    let files = {
        let settings = settings.clone();
        move || embedded::text_files(&settings)
    };
    let mut config = settings.router();
    config.access.secret = identity::secret(settings, StartedBy::supervised(args.supervised))?;
    let supervised = args.supervised;
    super::serving_runtime()?.block_on(async {
        let (changes, changed) = mpsc::channel(1);
        let serving =
            router::serve_changing(config, files, |start| announce(start, supervised), stop, changed);
        let changing = async {
            match supervised {
                true => obey(given, &changes).await,
                false => keep_reloading((args, log), watched, loaded, &changes).await,
            }
        };
        tokio::select! {
            served = serving => Ok(served?),
            never = changing => match never {},
        }
    })
}

/// Goes on as the supervisor says.
async fn obey(mut orders: mpsc::Receiver<Order>, changes: &mpsc::Sender<Change>) -> Infallible {
    while let Some(order) = orders.recv().await {
        let Order::Configure { argv } = order else { continue };
        let outcome = match settings_of(&argv) {
            Ok(settings) => change(&settings, changes).await,
            Err(error) => Err(error),
        };
        let error = outcome.err().map(|error| report::chain(&error));
        report::say(&Line { pid: std::process::id(), rank: None, event: Event::Configured { error } });
    }
    std::future::pending().await
}

/// The configuration that a router started with these arguments would have.
fn settings_of(argv: &[String]) -> anyhow::Result<Settings> {
    let program = std::iter::once("cohort").chain(argv.iter().map(String::as_str));
    let cli = Cli::try_parse_from(program)?;
    match cli.command {
        Command::Router(args) => Ok(args.load(&cli.log)?.settings),
        _ => bail!("these are no arguments of a router: {argv:?}"),
    }
}

async fn change(settings: &Settings, changes: &mpsc::Sender<Change>) -> anyhow::Result<()> {
    let (answer, answered) = oneshot::channel();
    changes
        .send(Change { config: settings.router(), answer })
        .await
        .context("the router takes no orders any more")?;
    answered.await.context("the router has ended")??;
    telemetry::set_level(&settings.telemetry);
    Ok(())
}

/// Goes on with the configuration as it changes. What is not used is logged, and all stays as it was.
async fn keep_reloading(
    (args, log): (&Args, &LogFlags),
    mut watched: Watched,
    mut running: Loaded,
    changes: &mpsc::Sender<Change>,
) -> Infallible {
    loop {
        watched.changed().await;
        match reload::judge(&running, args.load(log), settings::Role::Router) {
            Outcome::Same => {
                tracing::info!("the configuration was read again: no key of a router has changed")
            }
            Outcome::Refused(why) => tracing::error!("{}", reload::refusal(&why)),
            Outcome::Applied(changed, new) => match change(&new.settings, changes).await {
                Ok(()) => {
                    tracing::info!("the configuration has changed: {}", reload::listed(&changed));
                    running = *new;
                }
                Err(error) => tracing::error!("{}", reload::refusal(&report::chain(&error))),
            },
        }
    }
}

/// Says where the router serves, once it does.
fn announce(start: Start, supervised: bool) {
    let Start::Serving(bound) = start else { return };
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
