//! What a process tells of itself: logs on stderr, because stdout belongs to answers and reports, and the spans of traced
//! requests, which go to a collector.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use security::{ClientTls, Dialer};
use settings::{LogFormat, Telemetry};
use tonic::transport::Endpoint;
use trace::{Connect, Export, Exporter};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{FilterExt, FilterFn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};
use types::TpRank;

use crate::style;

/// Longest wait for a connection to an encrypted collector.
const COLLECTOR_CONNECT_MAX: Duration = Duration::from_secs(2);

/// What this process is called in traces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    service: &'static str,
    facts: Vec<(&'static str, String)>,
    /// Whether it works for requests, and so has something to trace.
    serves: bool,
}

impl Role {
    /// A command that ends by itself, or a supervisor.
    #[must_use]
    pub const fn tool() -> Self {
        Self { service: "cohort", facts: Vec::new(), serves: false }
    }

    /// A router.
    #[must_use]
    pub const fn router() -> Self {
        Self { service: "cohort-router", facts: Vec::new(), serves: true }
    }

    /// A rank of a group.
    #[must_use]
    pub fn rank(rank: TpRank) -> Self {
        let service = if rank.is_leader() { "cohort-leader" } else { "cohort-follower" };
        let facts =
            vec![("cohort.rank", rank.index().to_string()), ("cohort.ranks", rank.size().to_string())];
        Self { service, facts, serves: true }
    }
}

/// Keep it until the process ends: dropped, it sends the last spans.
#[derive(Debug)]
#[must_use = "the last spans are sent when it is dropped"]
pub struct Running {
    _exporter: Option<Exporter>,
}

/// Starts logs and traces as `telemetry` says: what is logged is its level, else `RUST_LOG`, else `default`. What cannot be
/// used of it is reported and left out.
pub fn start(telemetry: &Telemetry, role: &Role, default: &str) -> Running {
    let (filter, unread) = filter(telemetry, default);
    let (filter, handle) = reload::Layer::new(filter);
    let _ = LEVEL.set(Level { handle, default: default.to_owned() });
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(style::colours(std::io::stderr().is_terminal()))
        // A stderr that is closed, or a full disk behind it, must not end the process that wants to complain of it.
        .log_internal_errors(false);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match telemetry.log_format {
        LogFormat::Human => lines.with_target(true).boxed(),
        LogFormat::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
        }
    };
    let events = FilterFn::new(|metadata| !trace::is_span(metadata)).with_max_level_hint(LevelFilter::TRACE);
    let lines = lines.with_filter(filter.and(events));
    let endpoint = telemetry.otlp_endpoint.as_ref().filter(|_| role.serves);
    let exporting = endpoint.map(|endpoint| {
        let export = Export { endpoint: endpoint.clone(), service: role.service, facts: role.facts.clone() };
        let connect = telemetry.otlp_ca.as_deref().map(|ca| encrypted(endpoint, ca)).transpose()?;
        Ok::<_, anyhow::Error>(trace::start(&export, connect)?)
    });
    let (layer, exporter, broken) = match exporting {
        None => (None, None, None),
        Some(Ok((layer, exporter))) => (Some(layer), Some(exporter), None),
        Some(Err(error)) => (None, None, Some(error)),
    };
    tracing_subscriber::registry().with(lines).with(layer).init();
    if let Some(unread) = unread {
        tracing::warn!("{unread}; logging at `{default}`");
    }
    if let Some(error) = broken {
        tracing::warn!("{error:#}; nothing is traced");
    }
    Running { _exporter: exporter }
}

/// How to reach a collector whose certificate is signed by an authority of the file `ca`.
fn encrypted(endpoint: &str, ca: &Path) -> anyhow::Result<Connect> {
    let dialer = Dialer::new(&ClientTls { ca: ca.to_owned(), identity: None }, &[b"h2"])?;
    let endpoint = Endpoint::from_shared(endpoint.to_owned())?.connect_timeout(COLLECTOR_CONNECT_MAX);
    Ok(Box::new(move || {
        dialer.watch();
        dialer.channel(&endpoint)
    }))
}

/// What is logged, for whoever changes it.
struct Level {
    handle: Handle<EnvFilter, Registry>,
    default: String,
}

static LEVEL: OnceLock<Level> = OnceLock::new();

/// From now on the lines that `telemetry` says are logged.
pub fn set_level(telemetry: &Telemetry) {
    let Some(Level { handle, default }) = LEVEL.get() else { return };
    let (filter, unread) = filter(telemetry, default);
    if let Some(unread) = unread {
        return tracing::error!("{unread}; what is logged stays as it was");
    }
    if let Err(error) = handle.reload(filter) {
        tracing::error!(%error, "what is logged cannot be changed any more");
    }
}

fn filter(telemetry: &Telemetry, default: &str) -> (EnvFilter, Option<String>) {
    let from_env = || std::env::var(EnvFilter::DEFAULT_ENV).ok().filter(|text| !text.is_empty());
    let Some(asked) = telemetry.log_level.clone().or_else(from_env) else {
        return (EnvFilter::new(default), None);
    };
    match EnvFilter::try_new(&asked) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(default), Some(format!("log filter `{asked}`: {error}"))),
    }
}
