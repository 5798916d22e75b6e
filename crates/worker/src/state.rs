//! The group's state as routers see it.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use engine::Load;
use proto::Phase;
use proto::worker::{self, ModelFacts, WorkerState};
use tokio::sync::watch;

use crate::GapSummary;

/// Load changes with every step; routers hear of it this often at most.
const LOAD_INTERVAL: Duration = Duration::from_millis(100);

/// Where the group is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Not ready yet.
    Booting {
        /// Before [`Phase::Serving`].
        phase: Phase,
        /// Of the phase's work.
        percent: u32,
    },
    /// Taking requests.
    Serving,
    /// Finishing what is open.
    Draining,
}

impl State {
    pub(crate) const fn phase(self) -> Phase {
        match self {
            Self::Booting { phase, .. } => phase,
            Self::Serving => Phase::Serving,
            Self::Draining => Phase::Draining,
        }
    }

    pub(crate) const fn percent(self) -> u32 {
        match self {
            Self::Booting { percent, .. } => percent,
            Self::Serving | Self::Draining => 100,
        }
    }
}

/// What routers have made of this group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// None has said anything.
    Unknown,
    /// One sends requests; the word of one that comes after it takes nothing back.
    Acknowledged,
    /// None does, for this reason.
    Refused(String),
}

impl Standing {
    /// In a few words, for whoever probes.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Unknown => "no router has come yet".to_owned(),
            Self::Acknowledged => "acknowledged".to_owned(),
            Self::Refused(why) => format!("refused: {why}"),
        }
    }
}

/// Publishes the state to every router that watches.
pub(crate) struct StatePublisher {
    sender: watch::Sender<WorkerState>,
    standing: watch::Sender<Standing>,
    last_load: Mutex<Option<Instant>>,
}

impl StatePublisher {
    pub(crate) fn new() -> Self {
        let phase = worker::Phase::Starting.into();
        let sender = watch::Sender::new(WorkerState { phase, ..WorkerState::default() });
        Self { sender, standing: watch::Sender::new(Standing::Unknown), last_load: Mutex::new(None) }
    }

    /// A router has said what it makes of this group.
    pub(crate) fn acknowledged(&self, router: &str, refusal: &str) {
        let new = match refusal {
            "" => Standing::Acknowledged,
            why => Standing::Refused(why.to_owned()),
        };
        self.standing.send_if_modified(|standing| {
            let changed = *standing != new && *standing != Standing::Acknowledged;
            if changed {
                match &new {
                    Standing::Refused(why) => {
                        tracing::error!(%router, %why, "a router does not use this group")
                    }
                    Standing::Acknowledged | Standing::Unknown => {
                        tracing::info!(%router, "a router uses this group")
                    }
                }
                *standing = new;
            }
            changed
        });
    }

    pub(crate) fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<WorkerState> {
        self.sender.subscribe()
    }

    pub(crate) fn set(&self, state: State) {
        self.sender.send_modify(|wire| {
            wire.phase = worker::Phase::from(state.phase()).into();
            wire.percent = state.percent();
        });
    }

    /// Where metrics are served.
    pub(crate) fn metrics_port(&self, port: u16) {
        self.sender.send_modify(|wire| wire.metrics_port = port.into());
    }

    pub(crate) fn model(&self, facts: ModelFacts) {
        self.sender.send_modify(|wire| wire.model = Some(facts));
    }

    pub(crate) fn load(&self, (load, gaps, idle): (Load, GapSummary, GapSummary)) {
        let sum = |counts: [u32; 2]| counts[0].saturating_add(counts[1]);
        let load = worker::Load {
            running: load.running,
            waiting: load.waiting,
            kv_blocks_used: sum(load.blocks_used),
            kv_blocks: sum(load.blocks),
            host_gap_p50_us: gaps.p50_us,
            host_gap_p99_us: gaps.p99_us,
            card_idle_p50_us: (idle.steps > 0).then_some(idle.p50_us),
            card_idle_p99_us: (idle.steps > 0).then_some(idle.p99_us),
        };
        self.sender.send_if_modified(|wire| {
            let changed = wire.load != Some(load);
            wire.load = Some(load);
            changed
        });
    }

    /// Publishes the load unless that was done a moment ago.
    pub(crate) fn load_now_and_then(&self, load: impl FnOnce() -> (Load, GapSummary, GapSummary)) {
        let now = Instant::now();
        {
            let Ok(mut last) = self.last_load.lock() else { return };
            if last.is_some_and(|last| now.duration_since(last) < LOAD_INTERVAL) {
                return;
            }
            *last = Some(now);
        }
        self.load(load());
    }
}
