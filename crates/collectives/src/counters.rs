//! What a rank has done so far: operations and payload bytes of each kind.

use std::fmt;
use std::time::Duration;

/// The kinds of collective operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// [`Collective::all_reduce_sum`](crate::Collective::all_reduce_sum).
    AllReduce,
    /// [`Collective::reduce_scatter_sum`](crate::Collective::reduce_scatter_sum).
    ReduceScatter,
    /// [`Collective::all_gather`](crate::Collective::all_gather).
    AllGather,
    /// [`Collective::all_to_all_v`](crate::Collective::all_to_all_v).
    AllToAll,
    /// [`Collective::broadcast`](crate::Collective::broadcast).
    Broadcast,
    /// [`Collective::barrier`](crate::Collective::barrier).
    Barrier,
}

impl Op {
    /// Every kind, in the order of their numbers on the wire.
    pub const ALL: [Self; 6] = [
        Self::AllReduce,
        Self::ReduceScatter,
        Self::AllGather,
        Self::AllToAll,
        Self::Broadcast,
        Self::Barrier,
    ];

    /// The name errors and metrics use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce_sum",
            Self::ReduceScatter => "reduce_scatter_sum",
            Self::AllGather => "all_gather",
            Self::AllToAll => "all_to_all_v",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        }
    }

    /// The kind's number on the wire: its place in [`Op::ALL`].
    pub(crate) const fn code(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What one kind of operation has cost one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Operations completed.
    pub ops: u64,
    /// Messages given to other ranks, empty ones included.
    pub messages_sent: u64,
    /// Payload bytes given to other ranks; framing not counted.
    pub bytes_sent: u64,
    /// Payload bytes taken from other ranks; framing not counted.
    pub bytes_received: u64,
}

/// What each kind of operation has cost one rank since the group was formed. Failed operations are not counted.
///
/// Two are equal when the same was moved: how long it took differs from run to run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    by_op: [Traffic; Op::ALL.len()],
    took: [Duration; Op::ALL.len()],
}

impl PartialEq for Counters {
    fn eq(&self, other: &Self) -> bool {
        self.by_op == other.by_op
    }
}

impl Eq for Counters {}

impl Counters {
    /// The costs of each kind, in the order of [`Op::ALL`].
    #[must_use]
    pub const fn new(by_op: [Traffic; Op::ALL.len()]) -> Self {
        Self { by_op, took: [Duration::ZERO; Op::ALL.len()] }
    }

    /// The same, with how long each kind took.
    #[must_use]
    pub const fn taking(self, took: [Duration; Op::ALL.len()]) -> Self {
        Self { took, ..self }
    }

    /// How long the operations of kind `op` took this rank's thread, waiting for others included. Zero where operations are
    /// queued on a device.
    #[must_use]
    pub const fn time(&self, op: Op) -> Duration {
        self.took[op as usize]
    }

    /// The cost of the operations of kind `op`.
    #[must_use]
    pub const fn of(&self, op: Op) -> Traffic {
        self.by_op[op as usize]
    }

    /// Operations of all kinds.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.by_op.iter().map(|traffic| traffic.ops).sum()
    }

    /// Messages of all kinds given to other ranks.
    #[must_use]
    pub fn messages_sent(&self) -> u64 {
        self.by_op.iter().map(|traffic| traffic.messages_sent).sum()
    }

    /// Payload bytes of all kinds given to other ranks.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        self.by_op.iter().map(|traffic| traffic.bytes_sent).sum()
    }

    /// What was done since `earlier`, an earlier state of the same counters.
    #[must_use]
    pub fn since(mut self, earlier: &Self) -> Self {
        for (now, then) in self.by_op.iter_mut().zip(&earlier.by_op) {
            now.ops -= then.ops;
            now.messages_sent -= then.messages_sent;
            now.bytes_sent -= then.bytes_sent;
            now.bytes_received -= then.bytes_received;
        }
        for (now, then) in self.took.iter_mut().zip(&earlier.took) {
            *now = now.saturating_sub(*then);
        }
        self
    }

    /// Both together: of a rank that speaks in two groups.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        for (sum, more) in self.by_op.iter_mut().zip(&other.by_op) {
            sum.ops += more.ops;
            sum.messages_sent += more.messages_sent;
            sum.bytes_sent += more.bytes_sent;
            sum.bytes_received += more.bytes_received;
        }
        for (sum, more) in self.took.iter_mut().zip(&other.took) {
            *sum = sum.saturating_add(*more);
        }
        self
    }

    /// Notes one completed operation of `messages` messages.
    pub(crate) fn note(&mut self, op: Op, messages: u64, moved: Moved, took: Duration) {
        self.took[op as usize] += took;
        let traffic = &mut self.by_op[op as usize];
        traffic.ops += 1;
        traffic.messages_sent += messages;
        traffic.bytes_sent += (moved.sent * size_of::<f32>()) as u64;
        traffic.bytes_received += (moved.received * size_of::<f32>()) as u64;
    }
}

/// Elements that one operation moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) sent: usize,
    pub(crate) received: usize,
}
