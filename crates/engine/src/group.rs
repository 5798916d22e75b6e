//! A sub-group of ranks: the sequences that run there, and what they hold.

use types::SlotId;

use crate::kv::{Cursor, Kv};
use crate::rank::Rank;
use crate::sequence::{Found, Running, Sequence};
use crate::{Config, KvGroup};

/// Steps for which a look-up in vain is believed. Meanwhile blocks of the prompt may come and go without being noticed.
const BLOCKED_STEPS_MAX: u64 = 32;
/// What a running sequence weighs against prompt tokens when a place is chosen: it adds a row to every step for as long
/// as it runs, so it takes a prefix of this many tokens for each to send a request to a busier sub-group.
const RUNNING_WEIGHS_TOKENS: u64 = 64;

/// Ranks that hold the same keys and values. A sequence runs on one sub-group as long as it runs.
#[derive(Debug)]
pub(crate) struct SubGroup {
    pub(crate) kv: Kv,
    /// Ordered by rank when a step is planned; what that step starts comes last.
    pub(crate) running: Vec<Running>,
    pub(crate) slots_free: Vec<SlotId>,
    /// What is left for it of the step that is being made.
    pub(crate) budget: Budget,
    blocked: Option<Blocked>,
}

/// What a sub-group may still add to a step.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    /// Rows left.
    pub(crate) tokens: u32,
    /// Logit rows left.
    pub(crate) logits: u32,
    /// Sequences further on that decode, when the step began: a row and a logit row are kept for each.
    pub(crate) decodes: u32,
    /// Once it has been asked for.
    standing: Option<Standing>,
}

/// What the running sequences of a sub-group have before them.
#[derive(Debug, Clone, Copy)]
struct Standing {
    /// Blocks they still need for tokens they already have, by [`KvGroup::index`].
    promised: [u32; 2],
    /// Those tokens.
    tokens: u64,
}

/// What it would be like to run a sequence on a sub-group.
#[derive(Debug)]
pub(crate) struct Offer {
    /// Tokens to compute before it draws one, those of others included, and what others cost it after that.
    pub(crate) cost: u64,
    /// Rows it would get in this step; 0 when it had to wait for the next.
    pub(crate) rows: u32,
    /// What is there already, which it holds.
    pub(crate) found: Found,
}

/// What was found of the first waiting sequence when it did not fit, so that a long prompt is not looked up at every
/// step in which it cannot start.
#[derive(Debug, Clone, Copy)]
struct Blocked {
    rank: Rank,
    step: u64,
    /// Blocks found, by [`KvGroup::index`].
    held: [u32; 2],
    /// Those of them that nobody else uses.
    idle: [u32; 2],
}

impl SubGroup {
    /// Sub-group number `index`, idle.
    pub(crate) fn new(config: &Config, index: u32) -> Self {
        let first = index * config.running_max;
        Self {
            kv: Kv::new(config),
            running: Vec::with_capacity(config.running_max as usize),
            // Reversed, so that the lowest slot is taken first.
            slots_free: (first..first + config.running_max).rev().map(SlotId).collect(),
            budget: Budget::default(),
            blocked: None,
        }
    }

    /// Prepares for the planning of a step.
    pub(crate) fn begin(&mut self, tokens: u32, logits: u32) {
        self.running.sort_unstable_by_key(|one| one.sequence.rank);
        let decodes = self.running.iter().filter(|one| one.is_decoding()).count();
        let decodes = u32::try_from(decodes).expect("bounded by running_max");
        self.budget = Budget { tokens, logits, decodes, standing: None };
    }

    /// Tokens that fit behind what the sequence at `index` has computed; `None` when it runs no more.
    pub(crate) fn room(&self, index: usize) -> Option<u32> {
        self.running.get(index).map(|one| self.kv.room(&one.tables, one.computed))
    }

    /// What this sub-group offers to `head`, the first that waits, in the step that is made after `steps` others; `None` when
    /// it has no slot or too few blocks. What it has of the rows before `row` need not be computed.
    pub(crate) fn offer(&mut self, head: &Sequence, row: u32, steps: u64) -> Option<Offer> {
        if self.slots_free.is_empty() || self.is_still_blocked(head, steps) {
            return None;
        }
        let found = self.find(head, row);
        let held = KvGroup::ALL.map(|group| found.tables[group.index()].len());
        if !self.fits(head.len(), held, [0, 0]) {
            let idle = self.put_back(found);
            self.blocked = Some(Blocked { rank: head.rank, step: steps, held, idle });
            return None;
        }
        let running = u64::try_from(self.running.len()).expect("bounded by running_max");
        let prompts = u64::from(head.len() - found.start) + self.standing().tokens;
        let rows = head.longest(found.start, self.budget.tokens, self.budget.logits);
        Some(Offer { cost: prompts + RUNNING_WEIGHS_TOKENS * running, rows, found })
    }

    /// What is known already of `sequence`, of its rows before `row`.
    fn find(&mut self, sequence: &Sequence, row: u32) -> Found {
        let mut found = Found { cursor: sequence.root.map(Cursor::new), ..Found::default() };
        if let Some(cursor) = &mut found.cursor {
            let size = self.kv.geometry().block_size.tokens();
            let blocks = self.kv.reuse(&mut found.tables, cursor, sequence.all_tokens(), row / size);
            found.start = blocks * size;
        }
        found
    }

    /// Gives back what was found; how much of it is used by nobody then, by [`KvGroup::index`].
    pub(crate) fn put_back(&mut self, mut found: Found) -> [u32; 2] {
        let before = KvGroup::ALL.map(|group| self.kv.available(group));
        self.kv.release(&mut found.tables);
        found.cursor.into_iter().for_each(|cursor| self.kv.close(cursor));
        KvGroup::ALL.map(|group| self.kv.available(group) - before[group.index()])
    }

    /// Takes in a sequence that starts in `slot`.
    pub(crate) fn start(&mut self, sequence: Sequence, slot: SlotId, mut found: Found) {
        for group in self.kv.groups() {
            let peak = self.kv.geometry().peak(group, sequence.cached_tokens_max());
            found.tables[group.index()].reserve(peak + 1);
        }
        self.blocked = None;
        self.running.push(Running::new(sequence, slot, found));
    }

    /// Adds what the sequence at `index`, which has got its first rows, still has before it.
    pub(crate) fn stand(&mut self, index: usize) {
        let mut standing = self.standing();
        standing.add(&self.kv, &self.running[index]);
        self.budget.standing = Some(standing);
    }

    fn standing(&mut self) -> Standing {
        let Self { kv, running, budget, .. } = self;
        *budget.standing.get_or_insert_with(|| {
            let mut standing = Standing { promised: [0; 2], tokens: 0 };
            running.iter().for_each(|one| standing.add(kv, one));
            standing
        })
    }

    /// Whether the waiting sequence `head` was found not to fit, and cannot fit now either: looking its prompt up again
    /// would be in vain.
    fn is_still_blocked(&mut self, head: &Sequence, steps: u64) -> bool {
        let Some(Blocked { rank, step, held, idle }) = self.blocked else { return false };
        rank == head.rank && steps < step + BLOCKED_STEPS_MAX && !self.fits(head.len(), held, idle)
    }

    /// Whether a sequence of `tokens`, `held` blocks of which are there, can start without taking blocks that others are
    /// about to need: what they were promised, and one more for each of them and for itself, or it would soon be
    /// preempted. `idle` of the blocks it holds still count as available. Alone it always fits.
    fn fits(&mut self, tokens: u32, held: [u32; 2], idle: [u32; 2]) -> bool {
        let promised = self.standing().promised;
        let running = u32::try_from(self.running.len()).expect("bounded by running_max");
        running == 0
            || self.kv.groups().all(|group| {
                let at = group.index();
                let own = self.kv.geometry().peak(group, tokens).saturating_sub(held[at]);
                own + promised[at] + running + idle[at] < self.kv.available(group)
            })
    }
}

impl Standing {
    fn add(&mut self, kv: &Kv, one: &Running) {
        let known = one.sequence.len();
        if known <= one.computed {
            return;
        }
        self.tokens += u64::from(known - one.computed);
        for group in KvGroup::ALL {
            let held = one.tables[group.index()].len();
            self.promised[group.index()] += kv.geometry().peak(group, known).saturating_sub(held);
        }
    }
}
