//! One step as a backend sees it: rows of tokens, and where each sequence's keys and values live.

use std::ops::Range;

use types::{BlockId, Position, TokenId};

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

/// The physical blocks of one sequence in one group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockTable {
    /// Logical index (position / block size) of the first entry; blocks before it were given back.
    pub first: u32,
    /// Physical blocks from logical block `first` on.
    pub blocks: Vec<BlockId>,
}

/// One sequence's part of a step: a run of consecutive rows at consecutive positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSequence {
    /// Rows of this step that belong to the sequence.
    pub rows: Range<usize>,
    /// Position of the first of these rows.
    pub start: Position,
    /// Block tables by [`KvGroup::index`]; they cover every position attended to and written in this step.
    pub tables: [BlockTable; 2],
}

/// One step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// [rows] input tokens, sequence by sequence.
    pub tokens: Vec<TokenId>,
    /// The sequences; their row ranges partition `0..tokens.len()` in order.
    pub sequences: Vec<BatchSequence>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
}

impl Batch {
    /// Position of every row: [rows].
    pub fn positions(&self) -> impl Iterator<Item = u32> + '_ {
        self.sequences.iter().flat_map(|s| {
            let start = s.start.0;
            (0..s.rows.len()).map(move |i| start + u32::try_from(i).unwrap_or(u32::MAX))
        })
    }
}
