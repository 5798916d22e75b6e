//! Who goes first.

use types::limits::PRIORITY_MAX;
use types::{Micros, Priority, SeqId};

/// Waiting this long is worth one level of priority.
pub const AGEING_PER_LEVEL: Micros = Micros(100_000);
/// A request that has waited this long goes before every request that comes later, whatever its priority: 20 s.
pub const AGEING_MAX: Micros = Micros(2 * PRIORITY_MAX as u64 * AGEING_PER_LEVEL.0);

/// A sequence's place among all others, the least first.
///
/// Every sequence ages at the same rate, so the order of two never changes and needs no clock: it is that of the
/// moment at which each would have come had it had priority 0. An engine that keeps to this order starves nobody,
/// because only what comes within [`AGEING_MAX`] can ever go before a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    due: i128,
    /// Earlier submissions first; also makes ranks unique.
    id: SeqId,
}

impl Rank {
    pub(crate) fn new(id: SeqId, arrival: Micros, priority: Priority) -> Self {
        let ahead = i128::from(priority.level()) * i128::from(AGEING_PER_LEVEL.0);
        Self { due: i128::from(arrival.0) - ahead, id }
    }

    pub(crate) const fn id(self) -> SeqId {
        self.id
    }
}
