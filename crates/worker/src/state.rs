//! The group's state as routers see it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use engine::Load;
use proto::Phase;
use proto::worker::{self, ModelFacts, WorkerState};
use tokio::sync::watch;

use crate::GapSummary;
use crate::standing::{Routers, Standing};

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

/// Publishes the state to every router that watches.
pub(crate) struct StatePublisher {
    sender: watch::Sender<WorkerState>,
    routers: Mutex<Routers>,
    standing: watch::Sender<Standing>,
    last_load: Mutex<Option<Instant>>,
}

impl StatePublisher {
    pub(crate) fn new() -> Self {
        let phase = worker::Phase::Starting.into();
        let sender = watch::Sender::new(WorkerState { phase, ..WorkerState::default() });
        let (routers, standing) = (Mutex::default(), watch::Sender::new(Standing::Unknown));
        Self { sender, routers, standing, last_load: Mutex::new(None) }
    }

    /// A router watches this group from now on, until what this returns is dropped.
    pub(crate) fn watched_by(self: &Arc<Self>, router: &str) -> Watching {
        self.routers(router, |routers| routers.comes(router));
        Watching { state: Arc::clone(self), router: router.to_owned() }
    }

    /// A router has said what it makes of this group: why it does not use it, or nothing when it does.
    pub(crate) fn acknowledged(&self, router: &str, refusal: &str) {
        self.routers(router, |routers| routers.says(router, refusal));
    }

    /// A router at which this group registers has answered: why not, or nothing when it is taken.
    pub(crate) fn registered(&self, router: &str, refusal: &str) {
        self.routers(router, |routers| routers.answers(router, refusal));
    }

    fn routers(&self, router: &str, change: impl FnOnce(&mut Routers)) {
        let mut routers = self.routers.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut routers);
        let new = routers.standing();
        // Under the lock, so that what is told last is what is so.
        self.standing.send_if_modified(|standing| {
            let changed = *standing != new;
            if changed {
                match &new {
                    Standing::Refused(why) => {
                        tracing::error!(%router, %why, "a router does not use this group")
                    }
                    Standing::Acknowledged => tracing::info!(%router, "a router uses this group"),
                    Standing::Left => tracing::info!(%router, "no router uses this group any more"),
                    Standing::Unknown => {}
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

/// A router that watches, for as long as this is held.
pub(crate) struct Watching {
    state: Arc<StatePublisher>,
    router: String,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.state.routers(&self.router, |routers| routers.goes(&self.router));
    }
}
