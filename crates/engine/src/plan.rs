//! A step: what every rank executes ([`StepPlan`]) and what only the leader needs ([`RowWork`]).

use std::ops::Range;
use std::sync::Arc;

use types::{BlockId, Logprobs, Position, SamplingParams, SeqId, SharedHistory, SlotId, TokenId, TokenRules};

use crate::KvGroup;

/// One step as the leader sees it. The buffers are reused: hand the same value to every call of
/// [`crate::Engine::plan_into`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Step {
    /// What every rank executes; only this is sent.
    pub plan: StepPlan,
    /// What the leader does with each logit row, in row order.
    pub work: Vec<RowWork>,
}

impl Step {
    /// Forgets everything but the memory.
    pub(crate) fn clear(&mut self) {
        let StepPlan { step, released, sequences, inputs, blocks } = &mut self.plan;
        *step = 0;
        released.clear();
        sequences.clear();
        inputs.clear();
        blocks.clear();
        self.work.clear();
    }
}

/// What one logit row is for.
#[derive(Debug, Clone, PartialEq)]
pub struct RowWork {
    /// Whose row.
    pub seq: SeqId,
    /// What to do with its logits.
    pub purpose: RowPurpose,
}

/// What to do with the logits of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum RowPurpose {
    /// Draw the sequence's next token.
    Sample {
        /// How.
        params: SamplingParams,
        /// Which tokens the request wants more, less, or not at all.
        rules: Arc<TokenRules>,
        /// The tokens so far, when the request has penalties or bad words.
        history: Option<SharedHistory>,
        /// The generator stream: which of the request's sequences this is. With seed and position it keys the generator.
        stream: u32,
        /// Tokens generated so far.
        position: u32,
        /// Tokens that must not be drawn (it is too early to stop); empty when none.
        banned: Arc<[TokenId]>,
        /// Whether to report the drawn token's log-probability, and how many alternatives.
        logprobs: Option<Logprobs>,
    },
    /// Report how likely a known prompt token was.
    PromptLogprob {
        /// Position of that token: the one after the row.
        position: Position,
        /// The token.
        target: TokenId,
        /// How many alternatives to report.
        top: Logprobs,
    },
}

/// The input of one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// A token that was known when the step was planned.
    Known(TokenId),
    /// The token that the step before draws from this logit row of its own; it had not run when this one was planned.
    Drawn {
        /// Index among the logit rows of the step before.
        row: u32,
    },
}

/// One step as every rank executes it: what changed since the last one. [`crate::SlotTables`] keeps the rest.
///
/// Slots in [`StepPlan::released`] are emptied first, and may be used again by the same plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    pub(crate) step: u64,
    pub(crate) released: Vec<SlotId>,
    pub(crate) sequences: Vec<SequenceEntry>,
    /// Inputs of all sequences, in order.
    pub(crate) inputs: Vec<Input>,
    /// Newly assigned blocks of all sequences, in order; of each, the full group's first.
    pub(crate) blocks: Vec<BlockId>,
}

/// The fixed part of a [`PlannedSequence`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SequenceEntry {
    pub(crate) slot: SlotId,
    pub(crate) start: Position,
    pub(crate) rows: u32,
    pub(crate) logit_rows: u32,
    pub(crate) dropped: u32,
    pub(crate) new_blocks: [u32; 2],
}

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedSequence<'a> {
    /// The slot that holds its tables.
    pub slot: SlotId,
    /// Position of its first row.
    pub start: Position,
    /// Its rows among all rows of the step.
    pub rows: Range<usize>,
    /// Input of each row; at least one. Only the last one may be [`Input::Drawn`].
    pub inputs: &'a [Input],
    /// How many of its rows want logits: the last ones.
    pub logit_rows: u32,
    /// Leading sliding blocks that left the window and were given back, before the new ones are added.
    pub dropped: u32,
    /// Blocks to add at the end of its tables, by [`KvGroup::index`].
    pub new_blocks: [&'a [BlockId]; 2],
}

impl StepPlan {
    /// The number of the step; the first one is 1.
    #[must_use]
    pub const fn step(&self) -> u64 {
        self.step
    }

    /// Slots whose sequence has left.
    #[must_use]
    pub fn released(&self) -> &[SlotId] {
        &self.released
    }

    /// Input of every row, in order.
    #[must_use]
    pub fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    /// How many sequences take part.
    #[must_use]
    pub fn sequence_count(&self) -> usize {
        self.sequences.len()
    }

    /// The sequences, in row order.
    pub fn sequences(&self) -> impl Iterator<Item = PlannedSequence<'_>> {
        let (mut row, mut block) = (0, 0);
        self.sequences.iter().map(move |entry| {
            let rows = row..row + entry.rows as usize;
            row = rows.end;
            let new_blocks = KvGroup::ALL.map(|group| {
                let blocks = block..block + entry.new_blocks[group.index()] as usize;
                block = blocks.end;
                &self.blocks[blocks]
            });
            PlannedSequence {
                slot: entry.slot,
                start: entry.start,
                inputs: &self.inputs[rows.clone()],
                rows,
                logit_rows: entry.logit_rows,
                dropped: entry.dropped,
                new_blocks,
            }
        })
    }

    /// How many rows want logits.
    #[must_use]
    pub fn logit_row_count(&self) -> u32 {
        self.sequences.iter().map(|entry| entry.logit_rows).sum()
    }

    /// Whether an input is a token that the step before draws.
    #[must_use]
    pub fn follows_on(&self) -> bool {
        self.inputs.iter().any(|input| matches!(input, Input::Drawn { .. }))
    }

    /// Rows whose logits are wanted, ascending.
    pub fn logit_rows(&self) -> impl Iterator<Item = u32> + '_ {
        let mut end = 0;
        self.sequences.iter().flat_map(move |entry| {
            end += entry.rows;
            end - entry.logit_rows..end
        })
    }
}
