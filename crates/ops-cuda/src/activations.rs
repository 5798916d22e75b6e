//! How much memory a step's activations take.

use types::Bytes;

use crate::graph::{RECORDED_ROWS_MAX, form_rows};
use crate::sampling;

/// Widths that decide how much memory a step's activations take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activations {
    /// Rows of a step at most.
    pub rows: usize,
    /// Rows whose logits are made at once.
    pub logit_rows: usize,
    /// H
    pub hidden: usize,
    /// (Q + 2K)·D
    pub qkv: usize,
    /// I of the widest dense or shared MLP.
    pub intermediate: usize,
    /// E of the model, 0 without experts.
    pub experts: usize,
    /// Experts of a row.
    pub top_k: usize,
    /// I of one expert.
    pub expert_intermediate: usize,
    /// V of this rank.
    pub vocab: usize,
    /// Ranks whose logits are gathered here.
    pub ranks: usize,
    /// Rows that may come from all ranks for the experts of this one; 0 without an all-to-all.
    pub exchanged_rows: usize,
    /// Words of block tables in a step at most, both groups.
    pub table_words: usize,
}

impl Activations {
    /// Bytes that every step within these sizes finds: what is alive at once, as fp32, and a quarter more because
    /// pieces of other sizes leave gaps.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        const WORD: usize = 4;
        const SPLIT_WORDS: usize = 6 << 20;
        // Products whose K is shared: tiles of 128 × 128, two to a multiprocessor, in each of two branches.
        const SHARED_WORDS: usize = 2 * 2 * 192 * 128 * 128;
        // A recorded step is padded, and its two branches keep what they had until both are done.
        let recorded = form_rows(self.rows).unwrap_or(RECORDED_ROWS_MAX);
        let rows = self.rows.max(recorded);
        // The residual stream, the norm, two partial sums and one more beside them.
        let stream = 5 * self.hidden;
        // Split attention: only so many ranges that the card's multiprocessors have a few blocks each.
        let split = rows * 2 * self.qkv + SPLIT_WORDS;
        let attention = rows * 3 * self.qkv + split;
        let dense = rows * 3 * self.intermediate;
        let pair = 3 * self.expert_intermediate + self.hidden + 4;
        let tiles = 129 * self.experts.min(rows * self.top_k);
        let expert_row = self.experts + self.top_k * (pair + 3);
        let experts = rows.max(self.exchanged_rows) * expert_row + tiles + self.exchange();
        let branches =
            attention.min(recorded * 3 * self.qkv + split) + recorded * (expert_row + 3 * self.intermediate);
        // Gathered, and once more in whole rows.
        let gathered = if self.ranks > 1 { 2 * self.ranks * self.vocab } else { 0 };
        let drawing = sampling::bytes(self.logit_rows, self.ranks * self.vocab) / WORD;
        let logits = self.logit_rows * (2 * self.hidden + self.vocab + gathered) + drawing;
        let widest = attention.max(dense).max(experts).max(logits).max(branches);
        let words = rows * stream + widest + SHARED_WORDS + self.table_words;
        Bytes((words * WORD + words * WORD / 4 + (1 << 20)) as u64)
    }

    /// Words of the rows under way: laid out to send, as they come in, without the room that stayed empty, their values,
    /// the experts' results, and those that come back.
    const fn exchange(&self) -> usize {
        if self.exchanged_rows == 0 {
            return 0;
        }
        let row = self.hidden + 2 * self.top_k;
        let copies = if self.ranks < self.top_k { self.ranks } else { self.top_k };
        self.rows * copies * (row + self.hidden) + self.exchanged_rows * (2 * row + 2 * self.hidden)
    }
}
