//! How a step is made.
//!
//! Sequences are ordered by priority and age ([`crate::AGEING_MAX`]). Running ones come first, in that order; each
//! gets at least the one row its next token needs, and the first that still has prompt to compute takes what the
//! others leave. When a block is missing, the last sequence gives up all of its own and will be computed again later.
//! Then waiting requests are admitted in order, as long as their whole prompt fits beside what runs; nobody is
//! preempted to make room for one. So the first sequence always advances, and every sequence becomes the first one
//! day.

use types::{Micros, Position};

use crate::engine::{InFlight, STEPS_IN_FLIGHT_MAX, flight_index};
use crate::kv::{Cursor, Kv};
use crate::plan::SequenceEntry;
use crate::rank::Rank;
use crate::sabotage::Sabotage;
use crate::sequence::{Found, Leaving, Running, Sequence};
use crate::{Effect, Engine, Finish, KvGroup, RowWork, Step};

/// A step while it is being made.
struct Draft<'a> {
    step: &'a mut Step,
    /// Rows left.
    tokens: u32,
    /// Logit rows left.
    logits: u32,
    /// Sequences further on that decode, when the step began: a row and a logit row are kept for each.
    decodes: u32,
}

impl Engine {
    /// Plans the next step into `step`, whose old content is dropped. False, and an empty step, when there is nothing to
    /// run: the engine is idle, or what there is must wait for the answer to a step in flight. What must be passed on
    /// (deadlines that passed, preemptions) is appended to `effects`.
    ///
    /// # Panics
    /// With [`STEPS_IN_FLIGHT_MAX`] steps in flight.
    pub fn plan_into(&mut self, now: Micros, step: &mut Step, effects: &mut Vec<Effect>) -> bool {
        let in_flight = self.in_flight.len();
        assert!(in_flight < STEPS_IN_FLIGHT_MAX, "a step must be answered before the next one is planned");
        self.end_where(effects, |sequence| sequence.is_late(now).then_some(Finish::DeadlineExceeded));
        step.clear();
        if self.is_idle() {
            return false;
        }
        self.running.sort_unstable_by_key(|one| one.sequence.rank);
        let decodes = self.running.iter().filter(|one| one.is_decoding()).count();
        let mut draft = Draft {
            step,
            tokens: self.config.step_tokens_max + u32::from(self.has_bug(Sabotage::ExceedBudget)),
            logits: self.config.logit_rows_max,
            decodes: u32::try_from(decodes).expect("bounded by running_max"),
        };
        self.schedule_running(&mut draft, effects);
        self.admit_waiting(&mut draft, effects);
        if step.plan.sequences.is_empty() {
            assert!(in_flight > 0, "an engine with work always finds a row to run");
            return false;
        }
        self.steps += 1;
        step.plan.step = self.steps;
        step.plan.released.append(&mut self.slots_released);
        self.in_flight.push_back(InFlight { step: self.steps, logit_rows: step.work.len() });
        true
    }

    /// As [`Engine::plan_into`], with new buffers.
    ///
    /// # Panics
    /// As [`Engine::plan_into`].
    pub fn plan(&mut self, now: Micros, effects: &mut Vec<Effect>) -> Option<Step> {
        let mut step = Step::default();
        self.plan_into(now, &mut step, effects).then_some(step)
    }

    /// Gives rows to the running sequences.
    fn schedule_running(&mut self, draft: &mut Draft<'_>, effects: &mut Vec<Effect>) {
        let mut index = 0;
        let early = u32::from(self.has_bug(Sabotage::WindowOffByOne));
        // Preemption shortens the batch from its end, at times up to the sequence at hand.
        while let Some(one) = self.running.get_mut(index) {
            draft.decodes -= u32::from(one.is_decoding());
            let tokens = draft.tokens - draft.decodes;
            let logits = draft.logits - draft.decodes;
            let wanted = one.sequence.longest(one.computed, tokens, logits);
            if wanted > 0 {
                let dropped = self.kv.return_passed(&mut one.tables, one.computed + early);
                one.announced[KvGroup::Sliding.index()] -= dropped;
                while self.room(index) == Some(0) {
                    self.preempt_last(effects);
                }
                if let Some(room) = self.room(index) {
                    self.place(index, wanted.min(room), dropped, draft);
                }
            }
            index += 1;
        }
    }

    /// Tokens that fit behind what the sequence at `index` has computed; `None` when it runs no more.
    fn room(&self, index: usize) -> Option<u32> {
        self.running.get(index).map(|one| self.kv.room(&one.tables, one.computed))
    }

    /// Takes everything from the last running sequence. It keeps its tokens, so it goes on where it was once they have
    /// been computed again. It has not been given rows in this step: the sequence that lacks a block is never after
    /// it. (It does not come back in the same step either: one of its blocks is taken by then.)
    fn preempt_last(&mut self, effects: &mut Vec<Effect>) {
        assert!(self.running.len() > 1, "a sequence that runs alone fits: it was checked when it came");
        let mut one = self.running.pop().expect("there are at least two");
        self.vacate(&mut one);
        match one.flights.into_iter().flatten().next() {
            Some(flight) => self.leaving.push(Leaving { sequence: one.sequence, flight }),
            None => self.send_back(one.sequence, effects),
        }
    }

    /// Sends a preempted sequence to its place in the queue.
    pub(crate) fn send_back(&mut self, mut sequence: Sequence, effects: &mut Vec<Effect>) {
        effects.push(Effect::Preempted { seq: sequence.id });
        if self.has_bug(Sabotage::LoseTokenAtPreemption) {
            sequence.forget_last();
        }
        self.wait(sequence);
    }

    /// Starts waiting sequences while rows, slots and blocks last.
    fn admit_waiting(&mut self, draft: &mut Draft<'_>, effects: &mut Vec<Effect>) {
        let mut promised = None;
        while draft.tokens > 0 && !self.slots_free.is_empty() {
            // Sequences that will find their prompt computed by another one of their request are passed over.
            let head = self.waiting.values().find(|sequence| sequence.held_by.is_none());
            let Some(rank) = head.map(|sequence| sequence.rank) else { return };
            let promised = promised.get_or_insert_with(|| self.promised());
            if self.is_still_blocked(rank, *promised) {
                return;
            }
            let mut found = self.find(rank);
            let head = &self.waiting[&rank];
            let wanted = head.longest(found.start, draft.tokens, draft.logits);
            let held = KvGroup::ALL.map(|group| found.tables[group.index()].len());
            let fits = self.fits(head.len(), held, [0, 0], *promised);
            if wanted == 0 || !fits {
                return self.put_back(rank, found, fits);
            }
            self.blocked = None;
            let mut sequence = self.waiting.remove(&rank).expect("it was just looked at");
            self.waiting_tokens -= u64::from(sequence.len());
            sequence.start(found.start);
            effects.push(Effect::Started { seq: sequence.id, cached_tokens: found.start });
            let slot = self.slots_free.pop().expect("checked above");
            let room = self.kv.room(&found.tables, found.start);
            for group in self.kv.groups() {
                let peak = self.kv.geometry().peak(group, sequence.cached_tokens_max());
                found.tables[group.index()].reserve(peak + 1);
            }
            self.running.push(Running::new(sequence, slot, found));
            let index = self.running.len() - 1;
            self.place(index, wanted.min(room), 0, draft);
            for group in KvGroup::ALL {
                promised[group.index()] += promise(&self.kv, &self.running[index], group);
            }
        }
    }

    /// What is known already of the waiting sequence at `rank`.
    fn find(&mut self, rank: Rank) -> Found {
        let sequence = &self.waiting[&rank];
        let mut found = Found { cursor: sequence.root.map(Cursor::new), ..Found::default() };
        if let Some(cursor) = &mut found.cursor {
            let size = self.config.block_size.tokens();
            // At least one row must be computed, and so must every row whose logits are wanted.
            let row = match self.sabotage {
                Some(Sabotage::ReuseEveryBlock) => sequence.len(),
                _ => sequence.first_logit_row(),
            };
            let limit = row / size;
            let blocks = self.kv.reuse(&mut found.tables, cursor, sequence.all_tokens(), limit);
            found.start = blocks * size;
        }
        found
    }

    /// Whether the waiting sequence at `rank` was found not to fit, and cannot fit now either: looking its prompt up
    /// again would be in vain.
    fn is_still_blocked(&self, rank: Rank, promised: [u32; 2]) -> bool {
        let Some(blocked) = self.blocked.as_ref().filter(|blocked| blocked.rank == rank) else {
            return false;
        };
        let tokens = self.waiting[&rank].len();
        self.steps < blocked.step + BLOCKED_STEPS_MAX
            && !self.fits(tokens, blocked.held, blocked.idle, promised)
    }

    /// Gives back what was found of the sequence at `rank`, which does not start; `fits` says whether it would.
    fn put_back(&mut self, rank: Rank, mut found: Found, fits: bool) {
        let held = KvGroup::ALL.map(|group| found.tables[group.index()].len());
        let before = KvGroup::ALL.map(|group| self.kv.available(group));
        self.kv.release(&mut found.tables);
        found.cursor.into_iter().for_each(|cursor| self.kv.close(cursor));
        let idle = KvGroup::ALL.map(|group| self.kv.available(group) - before[group.index()]);
        self.blocked = (!fits).then_some(Blocked { rank, step: self.steps, held, idle });
    }

    /// Blocks running sequences still need for tokens they already have, by [`KvGroup::index`].
    fn promised(&self) -> [u32; 2] {
        KvGroup::ALL.map(|group| self.running.iter().map(|one| promise(&self.kv, one, group)).sum())
    }

    /// Whether a sequence of `tokens`, `held` blocks of which are there, can start without taking blocks that others are
    /// about to need: what they were promised, and one more for each of them and for itself, or it would soon be
    /// preempted. `idle` of the blocks it holds still count as available. Alone it always fits.
    fn fits(&self, tokens: u32, held: [u32; 2], idle: [u32; 2], promised: [u32; 2]) -> bool {
        let running = u32::try_from(self.running.len()).expect("bounded by running_max");
        running == 0
            || self.kv.groups().all(|group| {
                let at = group.index();
                let own = self.kv.geometry().peak(group, tokens).saturating_sub(held[at]);
                own + promised[at] + running + idle[at] < self.kv.available(group)
            })
    }

    /// Adds the next `rows` rows of the sequence at `index` to the step.
    fn place(&mut self, index: usize, rows: u32, dropped: u32, draft: &mut Draft<'_>) {
        let one = &mut self.running[index];
        let step = &mut *draft.step;
        let number = self.steps + 1;
        let range = one.computed..one.computed + rows;
        let logit_rows = one.sequence.logit_rows(&range);
        self.kv.extend(&mut one.tables, range.end);
        let new_blocks = one.announce(&mut step.plan.blocks);
        one.inputs(range.clone(), flight_index(number - 1), &mut step.plan.inputs);
        step.plan.sequences.push(SequenceEntry {
            slot: one.slot,
            start: Position(range.start),
            rows,
            logit_rows,
            dropped,
            new_blocks,
        });
        let first = step.work.len();
        step.work.extend(
            (range.end - logit_rows..range.end).map(|row| RowWork {
                seq: one.sequence.id,
                purpose: one.sequence.purpose(row, &self.unbanned),
            }),
        );
        if let Some(bug) = self.sabotage {
            Self::spoil_rows(bug, step, first, &one.sequence);
        }
        let flight = one.sequence.fly(first..step.work.len(), range.end);
        one.flights[flight_index(number)] = Some(flight);
        one.computed = range.end;
        draft.tokens -= rows;
        draft.logits -= logit_rows;
    }
}

/// Steps for which a look-up in vain is believed. Meanwhile blocks of the prompt may come and go without being noticed.
const BLOCKED_STEPS_MAX: u64 = 32;

/// What was found of the first waiting sequence when it did not fit, so that a long prompt is not looked up at every
/// step in which it cannot start.
#[derive(Debug)]
pub(crate) struct Blocked {
    rank: Rank,
    step: u64,
    /// Blocks found, by [`KvGroup::index`].
    held: [u32; 2],
    /// Those of them that nobody else uses.
    idle: [u32; 2],
}

/// Blocks `one` still needs in `group` for tokens it already has.
fn promise(kv: &Kv, one: &Running, group: KvGroup) -> u32 {
    let known = one.sequence.len();
    if known <= one.computed {
        return 0;
    }
    kv.geometry().peak(group, known).saturating_sub(one.tables[group.index()].len())
}
