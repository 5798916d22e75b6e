//! How much a request matters beside others.

use std::fmt;

use crate::Error;
use crate::limits::PRIORITY_MAX;

/// Higher runs first; between `-PRIORITY_MAX` and `PRIORITY_MAX`, 0 when a request does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Priority(i32);

impl Priority {
    /// The priority of requests that may wait for everything else.
    pub const LOWEST: Self = Self(-PRIORITY_MAX);
    /// The priority of requests that go before everything else.
    pub const HIGHEST: Self = Self(PRIORITY_MAX);

    /// A priority of `level`.
    ///
    /// # Errors
    /// [`Error::Priority`] when it is outside the range.
    pub const fn new(level: i32) -> Result<Self, Error> {
        if level < -PRIORITY_MAX || level > PRIORITY_MAX {
            return Err(Error::Priority { got: level, max: PRIORITY_MAX });
        }
        Ok(Self(level))
    }

    /// The number.
    #[must_use]
    pub const fn level(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
