//! How soon it is worth to come back to a router or group that is full: as soon as whoever waits has been let in, at the pace at
//! which places became free lately. Pure: it is told the time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use types::limits::{RETRY_AFTER_MAX, RETRY_AFTER_MIN};

use crate::RETRY_AFTER;

/// Times places became free that are looked back at: enough to even out long and short answers, few enough to notice when
/// they become longer.
const KEPT: usize = 64;
/// What was not full for so long begins anew: what left meanwhile says how many came, not how many can.
pub const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How places become free while all are taken.
#[derive(Debug, Default)]
pub struct Pace {
    /// When the count began, once all were taken.
    since: Option<Instant>,
    /// Since when it is not full any more.
    eased: Option<Instant>,
    /// When places became free, and how many.
    left: VecDeque<(Instant, u32)>,
}

impl Pace {
    /// Somebody finds no place.
    pub fn full(&mut self, now: Instant) {
        let paused = self.eased.take().is_some_and(|eased| now.saturating_duration_since(eased) > PAUSE_MAX);
        if paused || self.since.is_none() {
            self.since = Some(now);
            self.left.clear();
        }
    }

    /// So many places become free.
    pub fn left(&mut self, places: u32, now: Instant) {
        if self.since.is_none() || places == 0 {
            return;
        }
        self.left.push_back((now, places));
        if self.left.len() > KEPT
            && let Some((first, _)) = self.left.pop_front()
        {
            self.since = Some(first);
        }
    }

    /// There are places, and nobody waits for one.
    pub fn eased(&mut self, now: Instant) {
        self.eased.get_or_insert(now);
    }

    /// How long it takes until one is let in who comes behind `ahead` others. While nothing has become free, the longer that
    /// lasts the longer.
    #[must_use]
    pub fn wait(&self, ahead: u32, now: Instant) -> Duration {
        let Some(since) = self.since else { return RETRY_AFTER };
        let elapsed = now.saturating_duration_since(since).as_secs_f64();
        let places: u64 = self.left.iter().map(|(_, places)| u64::from(*places)).sum();
        let for_each = elapsed / places.max(1) as f64;
        let wait = Duration::try_from_secs_f64(for_each * (f64::from(ahead) + 1.0));
        let wait = wait.unwrap_or(RETRY_AFTER_MAX).clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX);
        if places == 0 { wait.max(RETRY_AFTER) } else { wait }
    }
}
