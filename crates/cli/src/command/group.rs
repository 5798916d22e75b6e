//! `cohort group`: the ranks of one worker group on this machine.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use settings::{Loaded, Settings};
use tokio::sync::mpsc;

use super::worker;
use crate::args::{
    self, ComputeFlags, ConfigFlags, FileFlag, GroupFlags, LogFlags, ModelFlags, StartedBy, TraceFlags,
};
use crate::hosts::Host;
use crate::identity;
use crate::progress::Progress;
use crate::reload::{self, Outcome, Watched};
use crate::report::{self, Event, Line};
use crate::supervisor::group::{self, Group};
use crate::supervisor::signals::Asked;
use crate::supervisor::{Order, Spec, lifeline, signals};
use crate::telemetry::{self, Role};

/// Any free port of this machine only.
const ANYWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Orders held while one is passed on.
const ORDERS_MAX: usize = 16;
/// What the leader may need beyond its own grace to close its streams and end.
const LEADER_SLACK: Duration = Duration::from_secs(2);

const MORE: &str = "\
One process is started for each rank. When one dies, all end, and the error names it.

A group may span hosts: start it on each with the same --hosts and flags, and its own --host-index.
  cohort group --hosts 10.0.0.1:7070,10.0.0.2 --host-index 0 --tensor-parallel 4 --listen 0.0.0.0:7000
  cohort group --hosts 10.0.0.1:7070,10.0.0.2 --host-index 1 --tensor-parallel 4
In a Kubernetes LeaderWorkerSet nothing of this is needed: its variables say it, with port 7070.";

/// The hosts, as a key of the configuration.
struct HostsFlag<'a>(&'a [String]);

impl ConfigFlags for HostsFlag<'_> {
    fn flags(&self) -> Vec<settings::Flag> {
        if self.0.is_empty() {
            return Vec::new();
        }
        vec![settings::Flag { flag: "--hosts", key: "group.hosts", value: self.0.join(",") }]
    }
}

/// Flags of `cohort group`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct Args {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub file: FileFlag,
    /// Where rank 0 listens for the other ranks; port 0 takes any free one
    #[arg(long, value_name = "ADDR", default_value_t = ANYWHERE)]
    pub rendezvous: SocketAddr,
    /// Hosts of the group in order, as host or host:port with rank 0's port on the first; each runs equally many ranks
    /// [default: this one, or those of a LeaderWorkerSet]
    #[arg(long, value_name = "HOSTS", value_delimiter = ',')]
    pub hosts: Vec<String>,
    /// Which of the hosts this is, from 0 [default: LWS_WORKER_INDEX]
    #[arg(long, value_name = "N")]
    pub host_index: Option<u32>,
    /// Where rank 0 listens for routers; port 0 takes any free one
    #[arg(long, value_name = "ADDR", default_value_t = ANYWHERE)]
    pub listen: SocketAddr,
    /// What is served.
    #[command(flatten)]
    pub model: ModelFlags,
    /// How it is computed.
    #[command(flatten)]
    pub compute: ComputeFlags,
    /// Bounds of the group.
    #[command(flatten)]
    pub group: GroupFlags,
    /// What is traced.
    #[command(flatten)]
    pub trace: TraceFlags,
    /// Started by a supervisor: reports go to stdout as JSON lines, and the end of stdin ends this process
    #[arg(long, hide = true)]
    pub supervised: bool,
}

impl Args {
    /// These arguments as a child's command line, after the program's name.
    #[must_use]
    pub fn to_argv(&self) -> Vec<String> {
        let mut argv = vec!["group".to_owned()];
        argv.extend(self.file.config.iter().map(|path| format!("--config={}", path.display())));
        argv.push(format!("--rendezvous={}", self.rendezvous));
        argv.extend(HostsFlag(&self.hosts).to_argv());
        argv.extend(self.host_index.map(|index| format!("--host-index={index}")));
        argv.push(format!("--listen={}", self.listen));
        argv.extend(self.model.to_argv());
        argv.extend(self.compute.to_argv());
        argv.extend(self.group.to_argv());
        argv.extend(self.trace.to_argv());
        argv.extend(self.supervised.then(|| "--supervised".to_owned()));
        argv
    }

    /// The configuration as it is now.
    fn load(&self, log: &LogFlags) -> Result<Loaded, settings::Error> {
        args::load_traced(
            StartedBy::supervised(self.supervised),
            &self.file,
            &[&HostsFlag(&self.hosts), &self.model, &self.compute, &self.group, &self.trace, log],
        )
    }

    /// What the `index`th supervised group of these settings is started with.
    pub(crate) fn supervised(settings: &Settings, index: u32, listen: Option<SocketAddr>) -> Self {
        let metrics_listen = Some(settings.group.metrics_listen.nth(index));
        let followers = settings.ranks().get() - 1;
        let rank_metrics_listen = Some(settings.group.rank_metrics_listen.nth(index * followers));
        Self {
            file: FileFlag::default(),
            rendezvous: ANYWHERE,
            hosts: Vec::new(),
            host_index: None,
            listen: listen.unwrap_or(ANYWHERE),
            model: ModelFlags::from(settings),
            compute: ComputeFlags::from(settings),
            group: GroupFlags { metrics_listen, rank_metrics_listen, ..GroupFlags::from(settings) },
            trace: TraceFlags::from(settings),
            supervised: true,
        }
    }

    /// What one of its ranks is started with.
    fn rank(&self, settings: &Settings, rank: u32, rendezvous: Option<SocketAddr>) -> worker::Args {
        worker::Args {
            file: FileFlag::default(),
            rank,
            rendezvous: rendezvous.unwrap_or(self.rendezvous),
            leader: None,
            listen: self.listen,
            model: ModelFlags::from(settings),
            compute: ComputeFlags::from(settings),
            group: GroupFlags::from(settings),
            trace: TraceFlags::from(settings),
            supervised: true,
        }
    }
}

/// Longest a whole group may take to stop.
pub(crate) fn stop_grace(settings: &Settings) -> Duration {
    settings.group.drain_grace_s + LEADER_SLACK + group::FOLLOWER_GRACE
}

/// Runs the group until it is told to stop or a rank ends.
pub(crate) fn run(args: &Args, log: &LogFlags) -> anyhow::Result<()> {
    let (orders, given) = mpsc::channel(ORDERS_MAX);
    if args.supervised {
        let orders = orders.clone();
        lifeline::hold(move |order| {
            lifeline::obey(order.clone());
            if orders.try_send(order).is_err() {
                tracing::warn!("an order was lost: others wait to be passed on");
            }
        })?;
    }
    let Asked { stop, reload } = signals::stop_and_reload(args.supervised)?;
    // Before it is read: what changes in between is then seen as a change.
    let watched = Watched::new(&args.file.config, reload);
    let loaded = args.load(log)?;
    let settings = &loaded.settings;
    let _telemetry = telemetry::start(&settings.telemetry, &Role::tool(), super::SERVICE_LEVEL);
    let secret = identity::secret(settings, StartedBy::supervised(args.supervised))?;
    let log_flags = LogFlags::from(&settings.telemetry).to_argv();
    let host = Host::find(&settings.group.hosts, args.host_index, |name| std::env::var(name).ok())?;
    let size = settings.ranks();
    let ranks = host.as_ref().map_or(Ok(0..size.get()), |host| host.ranks(size))?;
    let group = Group {
        size,
        ranks: ranks.clone(),
        leader_grace: settings.group.drain_grace_s + LEADER_SLACK,
        silence_max: settings.group.step_timeout_s.max(group::SILENCE_MIN),
        spec: |rank, rendezvous| {
            let mut rank = args.rank(settings, rank, rendezvous);
            if let Some(host) = &host {
                spread(&mut rank, host, ranks.len())?;
            }
            let mut argv = rank.to_argv();
            argv.extend_from_slice(&log_flags);
            Spec::own(argv, secret.clone())
        },
    };
    super::runtime()?.block_on(async {
        if args.supervised {
            return group::run(&group, &stop, given, |line| report::say(&line)).await;
        }
        let mut progress = Progress::new(1);
        let running = group::run(&group, &stop, given, |line| {
            progress.report(0, &line);
            tell(&progress, &line);
        });
        tokio::select! {
            ended = running => ended,
            never = keep_reloading((args, log), watched, &loaded, &orders) => match never {},
        }
    })
}

/// Logs what the configuration says as it changes; all else of a group needs a restart, which is said.
async fn keep_reloading(
    (args, log): (&Args, &LogFlags),
    mut watched: Watched,
    loaded: &Loaded,
    orders: &mpsc::Sender<Order>,
) -> Infallible {
    let mut running = loaded.clone();
    loop {
        watched.changed().await;
        match reload::judge(&running, args.load(log), settings::Role::Group) {
            Outcome::Same => {
                tracing::info!("the configuration was read again: no key of a group has changed")
            }
            Outcome::Refused(why) => tracing::error!("{}", reload::refusal(&why)),
            Outcome::Applied(changed, new) => {
                let order = Order::Log { level: new.settings.telemetry.log_level.clone() };
                lifeline::obey(order.clone());
                // The other end lives as long as this function.
                let _ = orders.send(order).await;
                tracing::info!("the configuration has changed: {}", reload::listed(&changed));
                running = *new;
            }
        }
    }
}

/// Makes a rank one of a group that spans hosts, with `here` ranks on this one.
fn spread(rank: &mut worker::Args, host: &Host, here: usize) -> anyhow::Result<()> {
    match rank.rank {
        0 => rank.rendezvous = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), host.port()?),
        // By the address the other hosts use too: it is the one this rank then tells them.
        _ => rank.leader = Some(host.leader.clone()),
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    rank.group.threads.get_or_insert((cores / here).max(1));
    Ok(())
}

/// What somebody who started the group by hand wants to know.
fn tell(progress: &Progress, line: &Line) {
    match &line.event {
        Event::Listening { address } => {
            progress.print(&format!("listening for routers: cohort router --workers http://{address}"));
        }
        Event::Ready { elapsed_ms } if line.rank == Some(0) => {
            progress.print(&format!("group ready after {elapsed_ms} ms"));
        }
        Event::Rendezvous { .. }
        | Event::Phase { .. }
        | Event::Loaded(_)
        | Event::Alive
        | Event::Ready { .. }
        | Event::Serving(_)
        | Event::Configured { .. }
        | Event::Failed { .. } => {}
    }
}
