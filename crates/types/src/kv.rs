//! The two lives of KV blocks.

use std::fmt;

use crate::BlockId;

/// Layers whose KV blocks live and die together. Full-attention layers keep every block of a sequence; sliding
/// layers give back blocks that fell out of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvGroup {
    /// Layers that attend to the whole sequence.
    Full,
    /// Layers that attend to a window.
    Sliding,
}

impl KvGroup {
    /// Both groups, in index order.
    pub const ALL: [Self; 2] = [Self::Full, Self::Sliding];

    /// Place in per-group arrays.
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Full => 0,
            Self::Sliding => 1,
        }
    }
}

impl fmt::Display for KvGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "full",
            Self::Sliding => "sliding",
        })
    }
}

/// The physical blocks of one sequence in one group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockTable {
    /// Logical index (position / block size) of the first entry; blocks before it were given back.
    pub first: u32,
    /// Physical blocks from logical block `first` on.
    pub blocks: Vec<BlockId>,
}
