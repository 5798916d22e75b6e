//! `cohort worker`: one rank.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, bail};
use settings::RankPlace;
use tokio_util::sync::CancellationToken;
use types::TpRank;
use worker::{Report, Reporter};

use crate::args::{
    self, ComputeFlags, ConfigFlags, FileFlag, GroupFlags, LogFlags, ModelFlags, StartedBy, TraceFlags,
};
use crate::progress::Progress;
use crate::report::{self, Event, Line, Throttle};
use crate::supervisor::{lifeline, signals};
use crate::telemetry::{self, Role};
use crate::{embedded, identity};

/// Any free port of this machine only.
const ANYWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

const MORE: &str = "\
Rank 0 leads: it listens for the other ranks at --rendezvous and for routers at --listen.
The others are started with rank 0's --rendezvous and the same model and group flags.";

/// Flags of `cohort worker`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct Args {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub file: FileFlag,
    /// This rank's number, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub rank: u32,
    /// Where rank 0 listens for the other ranks, and where they find it
    #[arg(long, value_name = "ADDR", default_value_t = ANYWHERE)]
    pub rendezvous: SocketAddr,
    /// Where the other ranks find rank 0 when it is on another host, as host:port; looked up again until it answers
    #[arg(long, value_name = "HOST:PORT")]
    pub leader: Option<String>,
    /// Where rank 0 listens for routers
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
        let mut argv = vec!["worker".to_owned()];
        argv.extend(self.file.config.iter().map(|path| format!("--config={}", path.display())));
        argv.push(format!("--rank={}", self.rank));
        argv.push(format!("--rendezvous={}", self.rendezvous));
        argv.extend(self.leader.iter().map(|leader| format!("--leader={leader}")));
        argv.push(format!("--listen={}", self.listen));
        argv.extend(self.model.to_argv());
        argv.extend(self.compute.to_argv());
        argv.extend(self.group.to_argv());
        argv.extend(self.trace.to_argv());
        argv.extend(self.supervised.then(|| "--supervised".to_owned()));
        argv
    }
}

/// Runs the rank until it is told to stop.
pub(crate) fn run(args: &Args, log: &LogFlags) -> anyhow::Result<()> {
    if args.supervised {
        lifeline::hold(lifeline::obey)?;
    }
    let stop = signals::stop_token(args.supervised)?;
    let settings = args::load(
        StartedBy::supervised(args.supervised),
        &args.file,
        &[&args.model, &args.compute, &args.group, &args.trace, log],
    )?;
    let rank = TpRank::new(args.rank, settings.ranks())?;
    let _telemetry = telemetry::start(&settings.telemetry, &Role::rank(rank), super::SERVICE_LEVEL);
    if !rank.is_leader() && args.rendezvous.port() == 0 && args.leader.is_none() {
        bail!("{rank} needs --rendezvous with the address that rank 0 listens at");
    }
    let (rendezvous, leader) = (args.rendezvous, args.leader.clone());
    let place = RankPlace { rank, rendezvous, leader, listen: args.listen };
    let name = embedded::served_name(&settings);
    let mut config = settings.worker(place, embedded::checkpoint(&settings), name);
    config.access.secret = identity::secret(&settings, StartedBy::supervised(args.supervised))?;
    let booted = Arc::new(AtomicBool::new(false));
    end_while_booting(stop.clone(), Arc::clone(&booted))?;
    Ok(worker::run(&config, &reporter(rank, args.supervised, booted), &stop)?)
}

/// Until the rank is ready nothing is open and nothing is written: an order to stop ends the process, however long
/// reading the weights would have taken.
fn end_while_booting(stop: CancellationToken, booted: Arc<AtomicBool>) -> anyhow::Result<()> {
    let watch = move || {
        futures::executor::block_on(stop.cancelled());
        if !booted.load(Ordering::Acquire) {
            std::process::exit(0);
        }
    };
    std::thread::Builder::new()
        .name("boot-stop".into())
        .spawn(watch)
        .context("watch for an order to stop")?;
    Ok(())
}

fn reporter(rank: TpRank, supervised: bool, booted: Arc<AtomicBool>) -> Arc<dyn Reporter> {
    let throttle = Throttle::default();
    let pid = std::process::id();
    let progress = (!supervised).then(|| Mutex::new(Progress::new(1)));
    Arc::new(move |report: Report| {
        let event = Event::from(report);
        if let Event::Ready { .. } = event {
            booted.store(true, Ordering::Release);
        }
        if !throttle.passes(&event, Instant::now()) {
            return;
        }
        let line = Line { pid, rank: Some(rank.index()), event };
        match &progress {
            None => report::say(&line),
            Some(progress) => {
                let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
                progress.report(0, &line);
                tell(&progress, rank, &line.event);
            }
        }
    })
}

/// What somebody who started the rank by hand needs to start the rest.
fn tell(progress: &Progress, rank: TpRank, event: &Event) {
    match event {
        Event::Rendezvous { address } if rank.size().get() > 1 => {
            progress.print(&format!("{rank} waits for the others: start them with --rendezvous {address}"));
        }
        Event::Listening { address } => {
            progress.print(&format!("listening for routers: cohort router --workers http://{address}"));
        }
        Event::Ready { elapsed_ms } => progress.print(&format!("{rank} ready after {elapsed_ms} ms")),
        Event::Rendezvous { .. }
        | Event::Phase { .. }
        | Event::Loaded(_)
        | Event::Alive
        | Event::Serving(_)
        | Event::Configured { .. }
        | Event::Failed { .. } => {}
    }
}
