//! What a rank has done so far: operations and payload bytes of each kind.

use std::fmt;

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
    /// Payload bytes given to other ranks; framing not counted.
    pub bytes_sent: u64,
    /// Payload bytes taken from other ranks; framing not counted.
    pub bytes_received: u64,
}

/// What each kind of operation has cost one rank since the group was formed. Failed operations are not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    by_op: [Traffic; Op::ALL.len()],
}

impl Counters {
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

    /// Notes one completed operation; sizes in bytes.
    pub(crate) fn note(&mut self, op: Op, sent: usize, received: usize) {
        let traffic = &mut self.by_op[op as usize];
        traffic.ops += 1;
        traffic.bytes_sent += sent as u64;
        traffic.bytes_received += received as u64;
    }
}
