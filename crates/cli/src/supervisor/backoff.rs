//! How long to wait before a restart.

use std::time::Duration;

/// Waits that double while a process keeps dying, and start over once it has lived well.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backoff {
    deaths: u32,
}

impl Backoff {
    /// Wait after the first death.
    pub const FIRST: Duration = Duration::from_millis(100);
    /// Longest wait.
    pub const LONGEST: Duration = Duration::from_secs(10);
    /// A process that was healthy this long is forgiven its earlier deaths.
    pub const FORGIVEN_AFTER: Duration = Duration::from_secs(60);

    /// The wait after a death that followed `healthy` of health.
    pub fn after(&mut self, healthy: Duration) -> Duration {
        if healthy >= Self::FORGIVEN_AFTER {
            self.deaths = 0;
        }
        let doubled = Self::FIRST.saturating_mul(1 << self.deaths.min(10));
        self.deaths = self.deaths.saturating_add(1);
        doubled.min(Self::LONGEST)
    }
}
