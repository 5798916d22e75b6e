//! What the subjects of tokens have used.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{Limits, Meter};

/// Subjects that are remembered; a provider may have more, but not all of them call within minutes.
const SUBJECTS_MAX: usize = 1 << 16;
/// What a subject has used matters for a minute; one that stays away longer may be forgotten.
const AWAY: Duration = Duration::from_secs(120);

/// A meter for each subject that called lately.
#[derive(Default)]
pub(super) struct Subjects(Mutex<HashMap<String, Known>>);

struct Known {
    meter: Meter,
    seen: Instant,
}

impl fmt::Debug for Subjects {
    /// Who called is nobody's business.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subjects").finish_non_exhaustive()
    }
}

impl Subjects {
    /// The meter of a subject, with the limits its token has now.
    pub(super) fn meter(&self, name: &str, limits: Limits, now: Instant) -> Meter {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Known { meter, seen }) = known.get_mut(name) {
            *seen = now;
            if *meter.limits() != limits {
                *meter = meter.renewed(name, limits);
            }
            return meter.clone();
        }
        if known.len() >= SUBJECTS_MAX {
            known.retain(|_, one| one.meter.is_open() || now.saturating_duration_since(one.seen) < AWAY);
        }
        if known.len() >= SUBJECTS_MAX {
            known.retain(|_, one| one.meter.is_open());
        }
        let meter = Meter::new(name, limits);
        known.insert(name.to_owned(), Known { meter: meter.clone(), seen: now });
        meter
    }
}
