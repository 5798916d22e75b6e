//! What one API key may use, and what it has used.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::bucket::Bucket;

/// How long a caller above its number of requests at once is asked to wait: nobody knows when one of them ends.
const CONCURRENCY_RETRY: Duration = Duration::from_secs(1);

/// Bounds of one key; what is `None` is not bounded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Calls in a minute.
    pub requests_per_minute: Option<u64>,
    /// Prompt and generated tokens in a minute.
    pub tokens_per_minute: Option<u64>,
    /// Calls at once.
    pub concurrency: Option<u32>,
    /// The most urgent priority it may ask for; lower numbers are served first.
    pub priority_min: Option<i32>,
}

impl Limits {
    /// Whether every bound is one that somebody can keep.
    ///
    /// # Errors
    /// Which is not, and what would be right.
    pub fn check(&self) -> Result<(), String> {
        let Self { requests_per_minute, tokens_per_minute, concurrency, priority_min } = *self;
        let counts = [
            ("requests_per_minute", requests_per_minute),
            ("tokens_per_minute", tokens_per_minute),
            ("concurrency", concurrency.map(u64::from)),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == Some(0)) {
            return Err(format!("{name} must be at least 1"));
        }
        let bound = types::limits::PRIORITY_MAX;
        if let Some(priority) = priority_min.filter(|priority| !(-bound..=bound).contains(priority)) {
            return Err(format!("priority_min must be between -{bound} and {bound}, not {priority}"));
        }
        Ok(())
    }
}

/// A bound that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limited {
    /// What is bounded: `requests a minute`, `tokens a minute`, `requests at once`.
    pub what: &'static str,
    /// The bound.
    pub max: u64,
    /// How long to wait before the next try.
    pub retry_after: Duration,
}

/// One key: its name, its bounds, and what it has used, which outlives a change of the bounds.
#[derive(Debug, Clone)]
pub struct Meter {
    name: Arc<str>,
    limits: Limits,
    used: Arc<Mutex<Used>>,
}

#[derive(Debug, Default)]
struct Used {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    open: u32,
}

impl Meter {
    /// A key that has used nothing.
    #[must_use]
    pub fn new(name: &str, limits: Limits) -> Self {
        Self { name: name.into(), limits, used: Arc::default() }
    }

    /// The same use under another name and bounds.
    #[must_use]
    pub(crate) fn renewed(&self, name: &str, limits: Limits) -> Self {
        Self { name: name.into(), limits, used: Arc::clone(&self.used) }
    }

    /// The key's name, which is no secret.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As [`Meter::name`], to be kept.
    #[must_use]
    pub fn shared_name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    /// Its bounds.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Begins a call.
    ///
    /// # Errors
    /// The bound that was reached: calls at once, calls in a minute, or tokens in a minute when more have been used than
    /// the minute had.
    pub fn enter(&self, now: Instant) -> Result<Visit, Limited> {
        let limits = &self.limits;
        let mut used = self.used();
        if let Some(max) = limits.concurrency.filter(|&max| used.open >= max) {
            let retry_after = CONCURRENCY_RETRY;
            return Err(Limited { what: "requests at once", max: max.into(), retry_after });
        }
        if let Some(max) = limits.tokens_per_minute {
            // Only what is used tells what a call costs, so it must not begin in debt, and may end in it.
            let bucket = used.tokens.get_or_insert_with(|| Bucket::new(max, now));
            if let Some(retry_after) = bucket.wait(1.0, max, now) {
                return Err(Limited { what: "tokens a minute", max, retry_after });
            }
        }
        if let Some(max) = limits.requests_per_minute {
            let bucket = used.requests.get_or_insert_with(|| Bucket::new(max, now));
            if let Some(retry_after) = bucket.wait(1.0, max, now) {
                return Err(Limited { what: "requests a minute", max, retry_after });
            }
            bucket.spend(1.0, max, now);
        }
        used.open += 1;
        drop(used);
        Ok(Visit { meter: self.clone() })
    }

    /// Whether a call of its is open.
    pub(crate) fn is_open(&self) -> bool {
        self.used().open > 0
    }

    fn used(&self) -> std::sync::MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One call of a key, open until this is dropped.
#[derive(Debug)]
pub struct Visit {
    meter: Meter,
}

impl Visit {
    /// Whose call it is.
    #[must_use]
    pub const fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Counts tokens of the prompt or of the answer.
    pub fn spend_tokens(&self, count: usize, now: Instant) {
        if let Some(max) = self.meter.limits.tokens_per_minute {
            let mut used = self.meter.used();
            used.tokens.get_or_insert_with(|| Bucket::new(max, now)).spend(count as f64, max, now);
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut used = self.meter.used();
        used.open = used.open.saturating_sub(1);
    }
}
