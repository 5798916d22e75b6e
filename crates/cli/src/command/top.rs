//! `cohort top`: the cluster at a glance, from its metrics pages.

mod scrape;
mod screen;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::bail;
use settings::{Settings, Tls};
use tokio::runtime::Runtime;

use self::scrape::Scraper;
use crate::args::{self, FileFlag, StartedBy};
use crate::client::{self, TlsFlags};
use crate::out::say;
use crate::supervisor::signals;
use crate::top::{Cluster, Sample};

const MORE: &str = "\
Without flags it looks where the cluster file, or its defaults, say that the router serves HTTP. Routers tell where
their groups serve metrics (--metrics-listen, group.metrics_listen).

Examples:
  cohort top
  cohort top --config cluster.toml --interval 5
  cohort top --router http://10.0.0.1:8080 --group http://10.0.0.2:9100
  cohort top --router https://router.example:8080 --ca ca.crt
  cohort top --once --json";

/// Flags of `cohort top`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct Args {
    /// Where the cluster is described.
    #[command(flatten)]
    pub file: FileFlag,
    /// HTTP address of a router, as http://host:port or https://host:port; separate several with commas [default: router.http_listen]
    #[arg(long, value_name = "URL,…", value_delimiter = ',')]
    pub router: Vec<String>,
    /// Metrics address of a group, as http://host:port or https://host:port; separate several with commas [default: those that routers tell]
    #[arg(long, value_name = "URL,…", value_delimiter = ',')]
    pub group: Vec<String>,
    /// Between two looks, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub interval: f64,
    /// Print what two looks say, and stop; with --interval 0 one look, and no rates
    #[arg(long)]
    pub once: bool,
    /// Print one JSON object for each look instead of a screen
    #[arg(long)]
    pub json: bool,
    /// How encrypted pages are read.
    #[command(flatten)]
    pub tls: TlsFlags,
}

/// Looks until it is told to stop.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let interval = interval(args)?;
    let stop = signals::stop_token(false)?;
    let (routers, groups) = places(args)?;
    let scraper = Scraper::new(routers, groups, &args.tls)?;
    let runtime = super::runtime()?;
    if !args.once && !args.json {
        return screen::run(&runtime, scraper, interval, &stop);
    }
    let mut looks = Looks { runtime: &runtime, scraper, before: None };
    if args.once {
        looks.look();
        if !interval.is_zero() {
            std::thread::sleep(interval);
        }
        let cluster = if interval.is_zero() { looks.last() } else { looks.look() };
        return print(&cluster, args.json);
    }
    while !stop.is_cancelled() {
        print(&looks.look(), true)?;
        let _ = runtime.block_on(tokio::time::timeout(interval, stop.cancelled()));
    }
    Ok(())
}

fn interval(args: &Args) -> anyhow::Result<Duration> {
    let least = if args.once { 0.0 } else { INTERVAL_MIN_S };
    if !(least..=INTERVAL_MAX_S).contains(&args.interval) {
        bail!("--interval must be between {least} and {INTERVAL_MAX_S} seconds, not {}", args.interval);
    }
    Ok(Duration::from_secs_f64(args.interval))
}

/// A shorter look would mostly see itself, in seconds.
const INTERVAL_MIN_S: f64 = 0.1;
/// An hour, in seconds.
const INTERVAL_MAX_S: f64 = 3600.0;

/// Where routers and groups are: what the flags say, else the configuration.
fn places(args: &Args) -> anyhow::Result<(BTreeSet<String>, BTreeSet<String>)> {
    let given = |all: &[String]| all.iter().map(|address| address.trim_end_matches('/').to_owned()).collect();
    if !args.router.is_empty() || !args.group.is_empty() {
        return Ok((given(&args.router), given(&args.group)));
    }
    let settings: Settings = args::load(StartedBy::User, &args.file, &[])?;
    let Some(router) = settings.router.http_listen.address() else {
        bail!("router.http_listen is off; name a group's metrics address with --group");
    };
    let url = |tls: &Tls, address| {
        let scheme = if tls.certificate.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", client::reachable(address))
    };
    let mut groups = BTreeSet::new();
    if let Some(first) = settings.group.metrics_listen.address().filter(|address| address.port() != 0) {
        let nth = |index| settings.group.metrics_listen.nth(index).address().unwrap_or(first);
        groups.extend((0..settings.cluster.groups).map(|index| url(&settings.group.tls, nth(index))));
    }
    Ok(([url(&settings.router.tls, router)].into(), groups))
}

/// One look after the other.
struct Looks<'a> {
    runtime: &'a Runtime,
    scraper: Scraper,
    before: Option<Sample>,
}

impl Looks<'_> {
    /// Looks, and says what has happened since the last time.
    fn look(&mut self) -> Cluster {
        let now = self.runtime.block_on(self.scraper.scrape());
        let cluster = Cluster::between(self.before.as_ref(), &now);
        self.before = Some(now);
        cluster
    }

    /// What the last look says by itself.
    fn last(&self) -> Cluster {
        self.before.as_ref().map(|now| Cluster::between(None, now)).unwrap_or_default()
    }
}

fn print(cluster: &Cluster, json: bool) -> anyhow::Result<()> {
    if json {
        say!("{}", serde_json::to_string(cluster)?);
    } else {
        for line in screen::lines(cluster) {
            say!("{line}");
        }
    }
    Ok(())
}
