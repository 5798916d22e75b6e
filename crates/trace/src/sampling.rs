//! Which requests are traced.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::Parent;

/// How it is decided where requests come in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Share of the requests, 0 to 1.
    pub ratio: f64,
    /// Whether a caller that has decided already decides here too.
    pub follow_callers: bool,
}

impl Sampling {
    /// Nothing is traced.
    pub const OFF: Self = Self { ratio: 0.0, follow_callers: false };

    /// Whether a request is traced that comes from `caller`.
    #[must_use]
    pub fn takes(&self, caller: Option<&Parent>) -> bool {
        match caller {
            Some(caller) if self.follow_callers => caller.is_sampled(),
            _ if self.ratio <= 0.0 => false,
            // std's hasher keys come from the system's generator and differ at every call.
            _ => (RandomState::new().build_hasher().finish() as f64) < self.ratio * 2_f64.powi(64),
        }
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self::OFF
    }
}
