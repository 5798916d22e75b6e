//! What this crate refuses: budgets that cannot work, and step plans that cannot be read or do not fit.

use types::{BlockId, SeqId, SlotId, TokenId};

use crate::KvGroup;

/// Errors of the engine crate. A refused request is not one of them: see [`crate::Refusal`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A model without a KV cache cannot be scheduled.
    #[error("both KV pools have 0 blocks; the group the model has layers of needs at least 1")]
    NoBlocks,
    /// A budget below what any request needs.
    #[error("{field} is {got}, and must be at least {min}: {reason}")]
    BudgetTooSmall {
        /// The configuration field.
        field: &'static str,
        /// Its value.
        got: u32,
        /// The smallest value that works.
        min: u32,
        /// Why.
        reason: &'static str,
    },
    /// A budget above what is supported.
    #[error("{field} is {got}, and must be at most {max}: {reason}")]
    BudgetTooLarge {
        /// The configuration field.
        field: &'static str,
        /// Its value.
        got: u32,
        /// The largest value that works.
        max: u32,
        /// Why.
        reason: &'static str,
    },
    /// An end-of-sequence token the model cannot draw.
    #[error("eos_token_ids has token {token}, which is not below the vocabulary size {vocab_size}")]
    EosToken {
        /// The token.
        token: TokenId,
        /// The vocabulary size.
        vocab_size: u32,
    },
    /// A step plan whose bytes end too early.
    #[error("step plan ends at byte {len} while reading {field}")]
    PlanTruncated {
        /// What was being read.
        field: &'static str,
        /// Bytes there are.
        len: usize,
    },
    /// A step plan with bytes after its end.
    #[error("step plan has {extra} bytes after its end")]
    PlanTrailing {
        /// How many.
        extra: usize,
    },
    /// A step plan of another version of this program.
    #[error("step plan has version {got}; this rank speaks version {expected}")]
    PlanVersion {
        /// The version found.
        got: u8,
        /// The version of this build.
        expected: u8,
    },
    /// A step plan that was damaged on its way.
    #[error("step plan has checksum {computed:#010x}, and says it should be {stated:#010x}")]
    PlanChecksum {
        /// The checksum of the bytes.
        computed: u32,
        /// The checksum they came with.
        stated: u32,
    },
    /// A number in a step plan outside what it may be.
    #[error("step plan has {field} = {got}, and must have {min} to {max}")]
    PlanField {
        /// What was read.
        field: &'static str,
        /// Its value.
        got: u64,
        /// The smallest value allowed.
        min: u64,
        /// The largest value allowed.
        max: u64,
    },
    /// A step plan that is not the next one: a plan was lost or came twice.
    #[error("step plan is for step {got}; the next step here is {expected}")]
    PlanOrder {
        /// The step of the plan.
        got: u64,
        /// The step this rank is at.
        expected: u64,
    },
    /// Drawn tokens that are not those the plan's inputs refer to.
    #[error("step plan refers to tokens of step {expected}; those known here are of step {got}")]
    DrawnStep {
        /// The step whose tokens are known.
        got: u64,
        /// The step whose tokens are wanted.
        expected: u64,
    },
    /// Ways to sample that are not those of the plan they came with.
    #[error(
        "step {step}: {rows} logit rows are told how to sample, and the plan of step {plan} has {expected}"
    )]
    BriefingRows {
        /// The step they are of.
        step: u64,
        /// Its logit rows.
        rows: usize,
        /// The step of the plan.
        plan: u64,
        /// Its logit rows.
        expected: u32,
    },
    /// A sequence that must be sampled here in a way nobody told.
    #[error("step {step}, {slot}: {seq} is to be sampled, and this rank was not told how")]
    BriefingMissing {
        /// The step.
        step: u64,
        /// The slot.
        slot: SlotId,
        /// The sequence.
        seq: SeqId,
    },
    /// A way to sample that no request can ask for.
    #[error("step {step}, {slot}: {source}")]
    BriefingInvalid {
        /// The step.
        step: u64,
        /// The slot.
        slot: SlotId,
        /// What is wrong with it.
        source: types::Error,
    },
    /// A step plan that disagrees with the state of a slot here.
    #[error("step {step}, {slot}: {what} is {got} in the plan and {expected} on this rank")]
    PlanSlot {
        /// The step of the plan.
        step: u64,
        /// The slot.
        slot: SlotId,
        /// What disagrees.
        what: &'static str,
        /// The plan's value.
        got: u64,
        /// The value that follows from this rank's state.
        expected: u64,
    },
    /// A step plan that names a block outside its pool.
    #[error("step {step}, {slot}: {group} block {block} is not below the pool size {blocks}")]
    PlanBlock {
        /// The step of the plan.
        step: u64,
        /// The slot it was meant for.
        slot: SlotId,
        /// The group.
        group: KvGroup,
        /// The block.
        block: BlockId,
        /// Blocks in the pool.
        blocks: u32,
    },
}
