//! What a supervised process tells its supervisor: one JSON object a line on stdout.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use types::Bytes;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// The process it is about.
    pub pid: u32,
    /// The rank it is about; none for a router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Rank 0 listens for the other ranks here.
    Rendezvous {
        /// The bound address.
        address: SocketAddr,
    },
    /// A leader listens for routers here.
    Listening {
        /// The bound address.
        address: SocketAddr,
    },
    /// A rank's start-up has come this far.
    Phase {
        /// The phase.
        phase: Phase,
        /// Bytes done.
        done: u64,
        /// Bytes in all; 0 when the phase is not counted in bytes.
        total: u64,
    },
    /// A rank's weights are resident.
    Loaded(Loaded),
    /// A rank takes work.
    Ready {
        /// Since the rank started, in milliseconds.
        elapsed_ms: u64,
    },
    /// A rank that takes work goes on.
    Alive,
    /// A router takes requests.
    Serving(Serving),
    /// An order to go on with another configuration has been carried out, or not.
    Configured {
        /// Why not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The process ends because of this.
    Failed {
        /// Why.
        error: String,
    },
}

/// What a rank loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// Memory the weights take, in bytes.
    pub resident: u64,
    /// Bytes read from the checkpoint.
    pub read: u64,
    /// Tensors read, wholly or in part.
    pub tensors: usize,
    /// Vision tensors that were left alone.
    #[serde(default)]
    pub skipped_tensors: usize,
    /// Their size, in bytes.
    #[serde(default)]
    pub skipped_bytes: u64,
    /// How long it took, in milliseconds.
    pub elapsed_ms: u64,
    /// What runs the model.
    pub device: String,
}

/// Where a router serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// The gRPC API.
    pub grpc: SocketAddr,
    /// HTTP, unless it is off.
    pub http: Option<SocketAddr>,
}

/// Start-up phases, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reading the configuration and meeting the other ranks.
    Starting,
    /// Reading weights.
    Loading,
    /// Producing the warm-up token.
    Warming,
    /// Taking requests.
    Serving,
    /// Finishing open requests.
    Draining,
}

impl Phase {
    /// The phase in one word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Loading => "loading",
            Self::Warming => "warming up",
            Self::Serving => "serving",
            Self::Draining => "draining",
        }
    }
}

impl From<worker::Phase> for Phase {
    fn from(phase: worker::Phase) -> Self {
        match phase {
            worker::Phase::Starting => Self::Starting,
            worker::Phase::Loading => Self::Loading,
            worker::Phase::Warming => Self::Warming,
            worker::Phase::Serving => Self::Serving,
            worker::Phase::Draining => Self::Draining,
        }
    }
}

impl From<worker::Report> for Event {
    fn from(report: worker::Report) -> Self {
        match report {
            worker::Report::Rendezvous(address) => Self::Rendezvous { address },
            worker::Report::Listening(address) => Self::Listening { address },
            worker::Report::Phase { phase, done: Bytes(done), total: Bytes(total) } => {
                Self::Phase { phase: phase.into(), done, total }
            }
            worker::Report::Loaded {
                resident,
                read,
                tensors,
                skipped_tensors,
                skipped_bytes,
                elapsed,
                device,
            } => Self::Loaded(Loaded {
                resident: resident.0,
                read: read.0,
                tensors,
                skipped_tensors,
                skipped_bytes: skipped_bytes.0,
                elapsed_ms: millis(elapsed),
                device,
            }),
            worker::Report::Alive => Self::Alive,
            worker::Report::Ready { elapsed } => Self::Ready { elapsed_ms: millis(elapsed) },
        }
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// Writes a line to stdout. A supervisor that no longer listens is noticed by the lifeline, not here.
pub fn say(line: &Line) {
    let mut text = serde_json::to_vec(line).unwrap_or_default();
    text.push(b'\n');
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(&text).and_then(|()| stdout.flush());
}

/// Tells the supervisor why this process ends.
pub fn say_failed(error: &anyhow::Error) {
    say(&Line { pid: std::process::id(), rank: None, event: Event::Failed { error: chain(error) } });
}

/// An error with its causes in one line; a cause that the line already tells is left out.
#[must_use]
pub fn chain(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |mut line, cause| {
        if line.is_empty() {
            return cause;
        }
        if !line.contains(&cause) {
            line.push_str(": ");
            line.push_str(&cause);
        }
        line
    })
}

/// Lets through what a person can follow: byte counts at most every [`Throttle::EVERY`], everything else always.
#[derive(Debug, Default)]
pub struct Throttle {
    last: Mutex<Option<Instant>>,
}

impl Throttle {
    /// Shortest span between two byte counts.
    pub const EVERY: Duration = Duration::from_millis(50);

    /// Whether this event should be passed on.
    pub fn passes(&self, event: &Event, now: Instant) -> bool {
        let Event::Phase { done, total, .. } = event else { return true };
        if *done == 0 || done >= total {
            return true;
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| now.duration_since(last) < Self::EVERY) {
            return false;
        }
        *last = Some(now);
        true
    }
}
