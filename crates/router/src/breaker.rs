//! Groups that fail request after request are left alone for a while, and a budget keeps retries from becoming the load.
//! Pure: both are told the time or need none.

use std::time::{Duration, Instant};

/// Failures in a row that open a breaker.
const FAILURES_MAX: u32 = 5;
/// How long it stays open at first, doubled each time a trial fails, up to the maximum.
const OPEN_MIN: Duration = Duration::from_secs(1);
const OPEN_MAX: Duration = Duration::from_secs(30);

/// One group's breaker. Open, it keeps requests away; when its time is over, one of them is let through as a trial.
#[derive(Debug, Clone, Copy, Default)]
pub struct Breaker {
    failures: u32,
    open: Option<Open>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    until: Instant,
    span: Duration,
}

impl Breaker {
    /// Whether a request may go there now.
    #[must_use]
    pub fn lets_through(&self, now: Instant) -> bool {
        self.open.is_none_or(|open| now >= open.until)
    }

    /// A request goes there. When it is a trial, others wait for what becomes of it, but no longer than the time that the
    /// breaker was open: a trial may never come to its first token.
    pub fn sent(&mut self, now: Instant) {
        if let Some(open) = &mut self.open {
            open.until = now + open.span;
        }
    }

    /// A request came to its first token there.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// A request broke before its first token. Returns whether that opened the breaker.
    pub fn failed(&mut self, now: Instant) -> bool {
        self.failures = self.failures.saturating_add(1);
        let span = match self.open {
            Some(open) => (open.span * 2).min(OPEN_MAX),
            None if self.failures >= FAILURES_MAX => OPEN_MIN,
            None => return false,
        };
        self.open = Some(Open { until: now + span, span });
        true
    }
}

/// Retries that may be spent from the start on.
const RETRIES_SAVED: u32 = 20;
/// Most that can be saved up.
const RETRIES_SAVED_MAX: u32 = 100;
/// Requests that earn one retry.
const REQUESTS_A_RETRY: u32 = 5;

/// Retries before the first token: a fifth of the requests, and some at once after a quiet time. When every group refuses,
/// the callers' requests are load enough.
#[derive(Debug, Clone, Copy)]
pub struct RetryBudget {
    /// In parts of a retry, [`REQUESTS_A_RETRY`] of which are one.
    saved: u32,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { saved: RETRIES_SAVED * REQUESTS_A_RETRY }
    }
}

impl RetryBudget {
    /// A request was placed for the first time.
    pub fn earn(&mut self) {
        self.saved = (self.saved + 1).min(RETRIES_SAVED_MAX * REQUESTS_A_RETRY);
    }

    /// Takes a retry, if there is one.
    pub fn spend(&mut self) -> bool {
        let left = self.saved.checked_sub(REQUESTS_A_RETRY);
        self.saved = left.unwrap_or(self.saved);
        left.is_some()
    }
}
