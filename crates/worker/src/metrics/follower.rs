//! What a rank that follows counts. What all ranks have done for requests, their leader shows.

use std::time::Instant;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use proto::Phase;
use proto::worker::WorkerState;
use types::Bytes;

use super::boot::Boot;
use super::engine::STEP_SECONDS;
use super::{add, encode, histogram, labels};
use crate::Config;

/// Everything a follower counts.
pub(crate) struct FollowerMetrics {
    registry: Registry,
    boot: Boot,
    clock: StepClock,
}

/// Steps of a follower, and what lies between them.
#[derive(Clone)]
pub(crate) struct StepClock {
    steps: Counter,
    step: Histogram,
    wait: Histogram,
    ended: Option<Instant>,
}

impl FollowerMetrics {
    pub(crate) fn new(config: &Config) -> Self {
        let mut registry = Registry::default();
        let ours = registry.sub_registry_with_labels(labels(config).into_iter());
        let boot = Boot::register(ours, config);
        let clock = StepClock {
            steps: add(ours, "cohort_steps", "Steps run"),
            step: histogram(ours, "cohort_step_seconds", "Time a step ran", &STEP_SECONDS),
            wait: histogram(
                ours,
                "cohort_step_wait_seconds",
                "Time from the end of a step to the start of the next, idle time included",
                &STEP_SECONDS,
            ),
            ended: None,
        };
        Self { registry, boot, clock }
    }

    /// For the thread that runs the steps.
    pub(crate) fn clock(&self) -> StepClock {
        self.clock.clone()
    }

    pub(crate) fn loading(&self, done: Bytes, total: Bytes) {
        self.boot.loading(done, total);
    }

    /// All of it in the OpenMetrics text format.
    pub(crate) fn render(&self, state: &WorkerState) -> String {
        self.boot.phase(Phase::from_wire(state.phase).unwrap_or(Phase::Starting), state.percent);
        encode(&self.registry)
    }
}

impl StepClock {
    /// A step begins.
    pub(crate) fn begin(&mut self) -> Instant {
        let now = Instant::now();
        if let Some(ended) = self.ended.take() {
            self.wait.observe(now.saturating_duration_since(ended).as_secs_f64());
        }
        now
    }

    /// The step that began then has ended.
    pub(crate) fn end(&mut self, begun: Instant) {
        let now = Instant::now();
        self.steps.inc();
        self.step.observe(now.saturating_duration_since(begun).as_secs_f64());
        self.ended = Some(now);
    }
}
