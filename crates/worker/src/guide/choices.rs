//! What an executor asks before it draws: the guides themselves at the leader, the leader's masks elsewhere.

use engine::{Allowed, Masks, RowPurpose, RowWork, Step};
use types::{TokenId, TokenMask};

use super::{Choice, Guides};

/// The tokens a row may draw, beside the request's own rules.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Limit {
    /// Any.
    None,
    /// These.
    To(TokenMask),
    /// None: its grammar could not be followed.
    Nothing,
}

/// Says what rows may draw; `at` is a row's index among the logit rows of its step.
pub(crate) trait Choices {
    /// Whether there may be a limit to what the row draws.
    fn limits(&self, at: usize, work: &RowWork) -> bool;

    /// What the row may draw.
    fn limit(&mut self, at: usize, work: &RowWork) -> Limit;

    /// Takes note of what a row drew.
    fn drew(&mut self, work: &RowWork, token: TokenId);
}

impl Choices for &Guides {
    fn limits(&self, _at: usize, work: &RowWork) -> bool {
        self.guide(work.seq)
    }

    fn limit(&mut self, _at: usize, work: &RowWork) -> Limit {
        let RowPurpose::Sample { position, .. } = work.purpose else { return Limit::None };
        match self.choice(work.seq, position) {
            Ok(Choice::Any) => Limit::None,
            Ok(Choice::Of(mask)) => Limit::To(mask),
            Err(error) => {
                let request = self.request(work.seq);
                tracing::warn!(request = request.as_deref(), %error, "a sequence is ended");
                Limit::Nothing
            }
        }
    }

    fn drew(&mut self, work: &RowWork, token: TokenId) {
        if let RowPurpose::Sample { position, .. } = work.purpose {
            Guides::drew(self, work.seq, position, token);
        }
    }
}

impl Guides {
    /// What the guided ones among `rows` of a step may draw, for the ranks that sample them.
    pub(crate) fn masks(&self, step: &Step, rows: impl Iterator<Item = usize>) -> Masks {
        let mut choices = self;
        let limit = |row: usize| {
            let work = &step.work[row];
            let allowed = match choices.limit(row, work) {
                Limit::None => return None,
                Limit::To(mask) => Allowed::Of(mask),
                Limit::Nothing => Allowed::Nothing,
            };
            Some((u32::try_from(row).unwrap_or(u32::MAX), allowed))
        };
        Masks { step: step.plan.step(), rows: rows.filter_map(limit).collect() }
    }
}

impl From<&Allowed> for Limit {
    fn from(allowed: &Allowed) -> Self {
        match allowed {
            Allowed::Any => Self::None,
            Allowed::Of(mask) => Self::To(mask.clone()),
            Allowed::Nothing => Self::Nothing,
        }
    }
}
