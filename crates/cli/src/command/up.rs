//! `cohort up`: a whole cluster on this machine.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::bail;
use security::{KeyFile, Secret, SharedSecret};
use settings::{Complaint, Loaded, Settings};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{demo, group, router};
use crate::args::{
    self, ComputeFlags, ConfigFlags, FileFlag, GroupFlags, LogFlags, ModelFlags, RouterFlags, StartedBy,
    TraceFlags,
};
use crate::progress::Progress;
use crate::reload::{self, Outcome, Watched};
use crate::report::{Event, Serving};
use crate::run_dir::RunDir;
use crate::style::Paint;
use crate::supervisor::cluster::{self, Cluster, Happening, Leader, Member, Size};
use crate::supervisor::signals::Asked;
use crate::supervisor::{Spec, signals};
use crate::telemetry::{self, Role};
use crate::{client, embedded, identity};

/// What a member may need beyond its own graces to end.
const SUPERVISOR_SLACK: Duration = Duration::from_secs(1);

const MORE: &str = "\
Without --model the embedded demo model is served. Groups and routers that die are restarted.
Ctrl-C stops everything once open requests are finished; a second Ctrl-C ends at once.
A cluster file that changes is read again, and so it is on SIGHUP: cluster.groups, cluster.weights, router.limits,
router.http, router.keys_file, telemetry.log_level and the router's graces change while requests run; what needs a
restart is refused.

Examples:
  cohort up --tensor-parallel 2
  cohort up --config cluster.toml --grpc-listen 0.0.0.0:50051";

/// Flags of `cohort up`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct Args {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub file: FileFlag,
    /// Worker groups: replicas of the model [default: 1]
    #[arg(long, value_name = "N")]
    pub groups: Option<u32>,
    /// Shares of the requests that they get, in order, 0 to 100 each; separate several with commas [default: 1]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub group_weights: Vec<u32>,
    /// What is served.
    #[command(flatten)]
    pub model: ModelFlags,
    /// How it is computed.
    #[command(flatten)]
    pub compute: ComputeFlags,
    /// Bounds of each group.
    #[command(flatten)]
    pub group: GroupFlags,
    /// Where it is served.
    #[command(flatten)]
    pub router: RouterFlags,
    /// What is traced.
    #[command(flatten)]
    pub trace: TraceFlags,
}

/// The number of groups and their weights as a group of flags of their own: only this subcommand takes them.
struct GroupsFlags<'a> {
    groups: Option<u32>,
    weights: &'a [u32],
}

impl ConfigFlags for GroupsFlags<'_> {
    fn flags(&self) -> Vec<settings::Flag> {
        let weights: Vec<String> = self.weights.iter().map(u32::to_string).collect();
        let given = [
            ("--groups", "cluster.groups", self.groups.map(|groups| groups.to_string())),
            ("--group-weights", "cluster.weights", (!weights.is_empty()).then(|| weights.join(","))),
        ];
        let flag =
            |(flag, key, value): (_, _, Option<String>)| Some(settings::Flag { flag, key, value: value? });
        given.into_iter().filter_map(flag).collect()
    }
}

impl Args {
    /// The configuration as it is now.
    fn load(&self, log: &LogFlags) -> Result<Loaded, settings::Error> {
        args::load_traced(
            StartedBy::User,
            &self.file,
            &[
                &GroupsFlags { groups: self.groups, weights: &self.group_weights },
                &self.model,
                &self.compute,
                &self.group,
                &self.router,
                &self.trace,
                log,
            ],
        )
    }
}

/// Runs the cluster until it is told to stop.
pub(crate) fn run(args: &Args, log: &LogFlags) -> anyhow::Result<()> {
    let Asked { stop, reload } = signals::stop_and_reload(false)?;
    // Before it is read: what changes in between is then seen as a change.
    let watched = Watched::new(&args.file.config, reload);
    let loaded = args.load(log)?;
    let mut settings = loaded.settings.clone();
    let _telemetry = telemetry::start(&settings.telemetry, &Role::tool(), super::TOOL_LEVEL);
    if !settings.group.hosts.is_empty() {
        let hosts = settings.group.hosts.len();
        bail!(
            "group.hosts has {hosts} hosts, and cohort up starts groups on this one; run cohort group on each of them"
        );
    }
    let encrypted = settings.router.tls.certificate.is_some();
    settings.telemetry = super::quiet(&settings.telemetry, super::TOOL_LEVEL);
    super::runtime()?.block_on(async {
        let display = Arc::new(Display::new(&settings));
        tokio::spawn(say_stopping(stop.clone(), Arc::clone(&display)));
        let current = Mutex::new(settings);
        let (sizes, resized) = mpsc::channel(1);
        let supervised = supervise(&current, &stop, resized, |happening| match happening {
            Happening::Up(serving) => {
                _ = tokio::spawn(tell_when_serving(serving, encrypted, Arc::clone(&display)))
            }
            other => display.show(other),
        });
        tokio::select! {
            ended = supervised => ended,
            never = keep_reloading((args, log), watched, (loaded, &current), &sizes, &display) => match never {},
        }
    })
}

/// Goes on with the configuration as it changes. What is not used is said, and all stays as it was.
async fn keep_reloading(
    (args, log): (&Args, &LogFlags),
    mut watched: Watched,
    (mut running, current): (Loaded, &Mutex<Settings>),
    sizes: &mpsc::Sender<Size>,
    display: &Display,
) -> Infallible {
    loop {
        watched.changed().await;
        match reload::judge(&running, args.load(log).and_then(usable), settings::Role::Up) {
            Outcome::Same => {
                display.print(&display.paint.dim("the configuration was read again: no key has changed"))
            }
            Outcome::Refused(why) => display.print(&display.paint.bad(reload::refusal(&why))),
            Outcome::Applied(changed, new) => {
                telemetry::set_level(&new.settings.telemetry);
                let mut settings = new.settings.clone();
                settings.telemetry = super::quiet(&settings.telemetry, super::TOOL_LEVEL);
                let size = size(&settings);
                *current.lock().unwrap_or_else(PoisonError::into_inner) = settings;
                // The other end lives as long as this function.
                let _ = sizes.send(size).await;
                let text = format!("the configuration has changed: {}", reload::listed(&changed));
                display.print(&display.paint.good(text));
                running = *new;
            }
        }
    }
}

/// Looks at what a router would read, before it is asked to go on with it.
fn usable(loaded: Loaded) -> Result<Loaded, settings::Error> {
    match loaded.settings.router.keys_file.as_deref().map(KeyFile::open) {
        None | Some(Ok(_)) => Ok(loaded),
        Some(Err(error)) => {
            let key = "router.keys_file";
            let (origin, reason) = (loaded.origin(key), error.to_string());
            Err(settings::Error::Invalid(vec![Complaint { origin, key: key.to_owned(), reason }]))
        }
    }
}

/// How large a cluster of these settings is.
fn size(settings: &Settings) -> Size {
    let grace = group::stop_grace(settings).max(router::stop_grace(settings)) + SUPERVISOR_SLACK;
    Size { groups: settings.cluster.groups, grace, log_level: settings.telemetry.log_level.clone() }
}

/// Runs a cluster of the `current` settings until `stop`, and goes on with changed ones after each of `sizes`; `on` hears
/// what happens.
pub(crate) async fn supervise(
    current: &Mutex<Settings>,
    stop: &CancellationToken,
    sizes: mpsc::Receiver<Size>,
    on: impl FnMut(Happening),
) -> anyhow::Result<()> {
    let mut on = on;
    let settings = || current.lock().unwrap_or_else(PoisonError::into_inner).clone();
    // Whoever else runs on this machine reaches its ports too.
    let secret = match identity::secret(&settings(), StartedBy::User)? {
        Some(secret) => (secret, None),
        // Nobody else is told this one.
        None => (SharedSecret::from(Secret::random()?), run_dir()),
    };
    let (secret, mut run_dir) = secret;
    // Members that are started again get it as it is then.
    secret.watch();
    let own = |mut argv: Vec<String>| {
        argv.extend(LogFlags::from(&settings().telemetry).to_argv());
        Spec::own(argv, Some(secret.clone()))
    };
    let cluster = Cluster {
        size: size(&settings()),
        group: |index, listen: Option<SocketAddr>| {
            own(group::Args::supervised(&settings(), index, listen).to_argv())
        },
        router: |leaders: &[Leader], served: Option<Serving>| {
            own(router::Args::supervised(&settings(), leaders, served).to_argv())
        },
    };
    let left = secret.clone();
    cluster::run(&cluster, stop, sizes, move |happening| {
        if let (Some(directory), Happening::Said { member: Member::Group(_), line }) = (&mut run_dir, &happening)
            && let Event::Listening { address } = line.event
            && let Err(error) = directory.note(address, &left.now())
        {
            tracing::warn!(%error, directory = %directory.path().display(), "cohort debug will need the secret");
        }
        on(happening);
    })
    .await
}

/// Where the secret is left for `cohort debug`.
fn run_dir() -> Option<RunDir> {
    RunDir::open()
        .inspect_err(|error| tracing::warn!(%error, "cohort debug will not find the cluster's secret"))
        .ok()
}

async fn say_stopping(stop: CancellationToken, display: Arc<Display>) {
    stop.cancelled().await;
    display.print(&display.paint.dim("stopping; open requests finish first, Ctrl-C again ends at once"));
}

/// Says so once the router answers that it serves; behind TLS it is believed, since only its callers have what it takes to
/// ask.
async fn tell_when_serving(serving: Serving, encrypted: bool, display: Arc<Display>) {
    if encrypted {
        return display.progress().announce(&display.banner(serving));
    }
    let address = client::reachable(serving.grpc).to_string();
    let served = async { client::wait_until_serving(client::channel(&address).await?).await };
    match served.await {
        Ok(()) => display.progress().announce(&display.banner(serving)),
        Err(error) => tracing::warn!("router at {address}: {error:#}"),
    }
}

/// What the person at the terminal sees.
struct Display {
    started: Instant,
    paint: Paint,
    progress: Mutex<Progress>,
    model: String,
    size: String,
}

impl Display {
    fn new(settings: &Settings) -> Self {
        let (groups, ranks) = (settings.cluster.groups, settings.ranks());
        Self {
            started: Instant::now(),
            paint: Paint::stderr(),
            progress: Mutex::new(Progress::new(groups)),
            model: embedded::served_name(settings),
            size: format!("{groups} group(s) of {ranks} rank(s)"),
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn print(&self, text: &str) {
        self.progress().print(text);
    }

    fn show(&self, happening: Happening) {
        match happening {
            Happening::Said { member: Member::Group(index), line } => self.progress().report(index, &line),
            Happening::Restarting { member, after, why } => {
                if let Member::Group(index) = member {
                    self.progress().forget(index);
                }
                let text = format!("{member} {why}; starting it again in {} ms", after.as_millis());
                self.print(&self.paint.bad(text));
            }
            Happening::Left(index) => {
                self.progress().forget(index);
                self.print(&self.paint.dim(format!("group {index} has left")));
            }
            Happening::Said { member: Member::Router, .. } | Happening::Started { .. } | Happening::Up(_) => {
            }
        }
    }

    /// Where the cluster serves, and a first command to try.
    fn banner(&self, serving: Serving) -> String {
        let paint = Paint::stdout();
        let server = match format!("http://{}", client::reachable(serving.grpc)) {
            default if default == client::SERVER_DEFAULT => String::new(),
            other => format!(" --server {other}"),
        };
        let ready = format!(
            "{} {}: gRPC at {}{}  {}",
            paint.good("ready"),
            paint.bold(&self.model),
            serving.grpc,
            router::http_part(serving),
            paint.dim(format!("{} after {:.2} s", self.size, self.started.elapsed().as_secs_f64())),
        );
        // Backquotes would need quoting that differs between shells.
        let question = demo::QUESTION.replace('`', "");
        format!("{ready}\n  {}", paint.accent(format!("cohort generate{server} --chat \"{question}\"")))
    }
}
