//! How long an executor waits for its next step.

use std::time::Duration;

/// Steps whose gaps are kept.
const GAPS_KEPT: usize = 1024;

/// The time between the end of a step and the start of the next, when there was work: of the last thousand steps.
#[derive(Debug)]
pub struct Gaps {
    /// Microseconds; the oldest is overwritten first.
    recent: Vec<u32>,
    next: usize,
    steps: u64,
}

/// A summary of [`Gaps`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GapSummary {
    /// Steps since the start that followed another without a rest.
    pub steps: u64,
    /// Half of the gaps are shorter, in µs.
    pub p50_us: u32,
    /// One in a hundred is longer, in µs.
    pub p99_us: u32,
}

impl Default for Gaps {
    fn default() -> Self {
        Self { recent: Vec::with_capacity(GAPS_KEPT), next: 0, steps: 0 }
    }
}

impl Gaps {
    /// Adds one.
    pub fn record(&mut self, gap: Duration) {
        let micros = u32::try_from(gap.as_micros()).unwrap_or(u32::MAX);
        match self.recent.get_mut(self.next) {
            Some(oldest) => *oldest = micros,
            None => self.recent.push(micros),
        }
        self.next = (self.next + 1) % GAPS_KEPT;
        self.steps += 1;
    }

    /// What the kept ones come to; zeros when there are none.
    #[must_use]
    pub fn summary(&self) -> GapSummary {
        let mut sorted = self.recent.clone();
        sorted.sort_unstable();
        let at = |percent: usize| sorted.get(sorted.len() * percent / 100).copied().unwrap_or(0);
        GapSummary { steps: self.steps, p50_us: at(50), p99_us: at(99) }
    }
}
