//! What an engine is built with, and the budgets that cannot work.

use types::limits::{CONTEXT_TOKENS_MAX, RANKS_MAX};
use types::{BlockSize, SlotId, TokenId};

use crate::{Error, KvGroup};

/// Sequences that may run at once in any configuration: slot ids and per-slot state are allocated at start.
pub const RUNNING_CEILING: u32 = 1 << 16;
/// Rows one step may have in any configuration: activations for them are allocated at start.
pub const STEP_TOKENS_CEILING: u32 = 1 << 20;
/// Blocks one pool may have in any configuration: the free list is allocated at start (8 bytes each, 1 GiB).
pub const BLOCKS_CEILING: u32 = 1 << 27;

/// Everything the engine needs to know about the model and its budgets. Equal on every rank of a group. Budgets of steps,
/// blocks and running sequences are those of one sub-group: each has its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Tokens per KV block, in both groups.
    pub block_size: BlockSize,
    /// Blocks in each pool by [`KvGroup::index`]; 0 when the model has no layer of that group.
    pub blocks: [u32; 2],
    /// Keys a row of a sliding layer sees, its own included.
    pub window_keys: u32,
    /// Most tokens of prompt and output together.
    pub context_tokens_max: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Tokens that end a sequence unless the request ignores them.
    pub eos_token_ids: Vec<TokenId>,
    /// Most rows in one step.
    pub step_tokens_max: u32,
    /// Most rows of one step whose logits are wanted; a logit row costs vocabulary-wide memory.
    pub logit_rows_max: u32,
    /// Most sequences that run at once; also the number of slots.
    pub running_max: u32,
    /// Sub-groups of ranks, each with keys, values and sequences of its own (data-parallel attention); 1 when all ranks
    /// hold a part of every sequence's.
    pub data_parallel: u32,
    /// Most requests that wait; a request beyond it is refused.
    pub waiting_requests_max: u32,
    /// Most prompt tokens that wait; a request beyond it is refused.
    pub waiting_tokens_max: u32,
}

impl Config {
    /// Refuses budgets with which some request could never run, or no request at all.
    ///
    /// # Errors
    /// The first budget that cannot work, with its value and the nearest one that would.
    pub fn check(&self) -> Result<(), Error> {
        let [full, sliding] = self.blocks;
        if full == 0 && sliding == 0 {
            return Err(Error::NoBlocks);
        }
        let running = self.running_max;
        at_most("blocks (full)", full, BLOCKS_CEILING, "the largest pool supported")?;
        at_most("blocks (sliding)", sliding, BLOCKS_CEILING, "the largest pool supported")?;
        if sliding > 0 {
            at_least("window_keys", self.window_keys, 1, "a row sees at least its own key")?;
        }
        at_least("context_tokens_max", self.context_tokens_max, 2, "one prompt token and one generated")?;
        at_most("context_tokens_max", self.context_tokens_max, CONTEXT_TOKENS_MAX, "the longest supported")?;
        at_least("vocab_size", self.vocab_size, 1, "there must be a token")?;
        if let Some(&token) = self.eos_token_ids.iter().find(|token| token.0 >= self.vocab_size) {
            return Err(Error::EosToken { token, vocab_size: self.vocab_size });
        }
        at_least("running_max", running, 1, "one sequence must be able to run")?;
        at_most("running_max", running, RUNNING_CEILING, "the most supported")?;
        at_least("data_parallel", self.data_parallel, 1, "the ranks are at least one sub-group")?;
        at_most("data_parallel", self.data_parallel, RANKS_MAX, "as many as there can be ranks")?;
        at_least("step_tokens_max", self.step_tokens_max, running, "each of running_max needs a row a step")?;
        at_most("step_tokens_max", self.step_tokens_max, STEP_TOKENS_CEILING, "the most supported")?;
        at_least("logit_rows_max", self.logit_rows_max, running, "each of running_max needs a row a step")?;
        at_least(
            "waiting_requests_max",
            self.waiting_requests_max,
            1,
            "every request waits for its first step",
        )?;
        let context = self.context_tokens_max;
        at_least("waiting_tokens_max", self.waiting_tokens_max, context, "a prompt may fill the context")
    }

    /// Slots of all sub-groups.
    #[must_use]
    pub const fn slots(&self) -> u32 {
        self.running_max * self.data_parallel
    }

    /// The sub-group that `slot` belongs to, counted from 0.
    #[must_use]
    pub const fn sub_group(&self, slot: SlotId) -> u32 {
        slot.0 / self.running_max
    }

    /// Whether the model has layers of `group`.
    #[must_use]
    pub const fn has(&self, group: KvGroup) -> bool {
        self.blocks[group.index()] > 0
    }
}

fn at_least(field: &'static str, got: u32, min: u32, reason: &'static str) -> Result<(), Error> {
    if got < min { Err(Error::BudgetTooSmall { field, got, min, reason }) } else { Ok(()) }
}

fn at_most(field: &'static str, got: u32, max: u32, reason: &'static str) -> Result<(), Error> {
    if got > max { Err(Error::BudgetTooLarge { field, got, max, reason }) } else { Ok(()) }
}
