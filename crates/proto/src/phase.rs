//! Where a group is in its life.

use std::fmt;

use crate::worker;

/// A group's phase, in the order it passes through them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Reading the configuration and meeting the other ranks.
    Starting,
    /// Reading weights.
    Loading,
    /// Producing the warm-up token.
    Warming,
    /// Taking requests.
    Serving,
    /// Finishing open requests before the end.
    Draining,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 5] = [Self::Starting, Self::Loading, Self::Warming, Self::Serving, Self::Draining];

    /// The name used in statuses, logs and health answers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Loading => "loading",
            Self::Warming => "warming",
            Self::Serving => "serving",
            Self::Draining => "draining",
        }
    }

    /// The phase called `name`, or `None`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.name() == name)
    }

    /// The wire's number, or `None` for one this version does not know.
    #[must_use]
    pub fn from_wire(number: i32) -> Option<Self> {
        match worker::Phase::try_from(number).ok()? {
            worker::Phase::Unspecified => None,
            worker::Phase::Starting => Some(Self::Starting),
            worker::Phase::Loading => Some(Self::Loading),
            worker::Phase::Warming => Some(Self::Warming),
            worker::Phase::Serving => Some(Self::Serving),
            worker::Phase::Draining => Some(Self::Draining),
        }
    }
}

impl From<Phase> for worker::Phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Starting => Self::Starting,
            Phase::Loading => Self::Loading,
            Phase::Warming => Self::Warming,
            Phase::Serving => Self::Serving,
            Phase::Draining => Self::Draining,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
