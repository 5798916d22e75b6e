//! A bound on what is spent in a minute. Pure: it is told the time.

use std::time::{Duration, Instant};

const MINUTE_S: f64 = 60.0;

/// Fills evenly to a minute's worth; spending may leave it in debt, which has to be worked off first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(per_minute: u64, now: Instant) -> Self {
        Self { left: per_minute as f64, at: now }
    }

    fn fill(&mut self, per_minute: u64, now: Instant) {
        let rate = per_minute as f64 / MINUTE_S;
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * rate;
        self.left = (self.left + gained).min(per_minute as f64);
        self.at = self.at.max(now);
    }

    /// How long until `count` may be spent; `None` for now.
    pub(crate) fn wait(&mut self, count: f64, per_minute: u64, now: Instant) -> Option<Duration> {
        self.fill(per_minute, now);
        let missing = count - self.left;
        if missing <= 0.0 {
            return None;
        }
        let seconds = missing / (per_minute.max(1) as f64 / MINUTE_S);
        Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }

    /// Takes `count`, however much is left.
    pub(crate) fn spend(&mut self, count: f64, per_minute: u64, now: Instant) {
        self.fill(per_minute, now);
        self.left -= count;
    }
}
