//! One step as a backend sees it: rows of tokens, and where each sequence's keys and values live.

use std::ops::Range;

use types::{BlockTable, Position, TokenId};

/// One sequence's part of a step: a run of consecutive rows at consecutive positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSequence {
    /// Rows of this step that belong to the sequence.
    pub rows: Range<usize>,
    /// Position of the first of these rows.
    pub start: Position,
    /// Block tables by [`types::KvGroup::index`]; they cover every position attended to and written in this step.
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
    /// Rows whose token the device knows and the host need not: what [`Batch::tokens`] says of them means nothing.
    pub fed: Vec<Fed>,
}

/// A row whose token is the one that was drawn for a logit row of the step before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fed {
    /// The row of this step.
    pub row: u32,
    /// Index among the logit rows of the step before, of which a token was drawn ([`crate::Backend::draw`]) or fed
    /// ([`crate::Backend::feed`]).
    pub from: u32,
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
