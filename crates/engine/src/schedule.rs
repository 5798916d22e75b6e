//! How a step is made.
//!
//! Sequences are ordered by priority and age ([`crate::AGEING_MAX`]). Running ones come first, in that order; each
//! gets at least the one row its next token needs, and the first that still has prompt to compute takes what the
//! others leave. When a block is missing, the last sequence gives up all of its own and will be computed again later.
//! Then waiting requests are admitted in order, as long as their whole prompt fits beside what runs; nobody is
//! preempted to make room for one. So the first sequence always advances, and every sequence becomes the first one
//! day.
//!
//! With several sub-groups all of this holds for each by itself, its budgets and blocks being its own; only the queue is
//! one. Its first sequence goes where it costs least ([`crate::group::SubGroup::offer`]): tokens that are not known there, those
//! that sub-group has yet to compute, and its running sequences.

use types::{Micros, Position};

use crate::engine::{InFlight, STEPS_IN_FLIGHT_MAX, flight_index};
use crate::group::Offer;
use crate::plan::SequenceEntry;
use crate::rank::Rank;
use crate::sabotage::Sabotage;
use crate::sequence::{Leaving, Sequence};
use crate::{Effect, Engine, Finish, KvGroup, RowWork, Step};

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
        self.end_late(now, effects);
        step.clear();
        if self.is_idle() {
            return false;
        }
        let tokens = self.config.step_tokens_max + u32::from(self.has_bug(Sabotage::ExceedBudget));
        for at in 0..self.groups.len() {
            self.groups[at].begin(tokens, self.config.logit_rows_max);
            self.schedule_running(at, step, effects);
        }
        self.admit_waiting(step, effects);
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

    /// Ends what has a deadline that has passed.
    fn end_late(&mut self, now: Micros, effects: &mut Vec<Effect>) {
        let passed = self.first_deadline.is_some_and(|first| first <= now);
        if passed && !self.has_bug(Sabotage::ForgetDeadline) {
            self.end_where(effects, |sequence| sequence.is_late(now).then_some(Finish::DeadlineExceeded));
            self.first_deadline = self.sequences().filter_map(Sequence::deadline).min();
        }
    }

    /// Gives rows to the running sequences of sub-group `at`.
    fn schedule_running(&mut self, at: usize, step: &mut Step, effects: &mut Vec<Effect>) {
        let mut index = 0;
        let early = u32::from(self.has_bug(Sabotage::WindowOffByOne));
        // Preemption shortens the batch from its end, at times up to the sequence at hand.
        while let Some(one) = self.groups[at].running.get(index) {
            let decodes = u32::from(one.is_decoding());
            let group = &mut self.groups[at];
            let (one, budget) = (&mut group.running[index], &mut group.budget);
            budget.decodes -= decodes;
            let (tokens, logits) = (budget.tokens - budget.decodes, budget.logits - budget.decodes);
            let wanted = one.sequence.longest(one.computed, tokens, logits);
            if wanted > 0 {
                let dropped = group.kv.return_passed(&mut one.tables, one.computed + early);
                one.announced[KvGroup::Sliding.index()] -= dropped;
                let mut room = group.room(index);
                while room == Some(0) {
                    self.preempt_last(at, effects);
                    room = self.groups[at].room(index);
                }
                if let Some(room) = room {
                    self.place((at, index), wanted.min(room), dropped, step);
                }
            }
            index += 1;
        }
    }

    /// Takes everything from the last running sequence of sub-group `at`. It keeps its tokens, so it goes on where it was
    /// once they have been computed again. It has not been given rows in this step: the sequence that lacks a block is
    /// never after it. (It does not come back here in the same step either: one of its blocks is taken by then.)
    fn preempt_last(&mut self, at: usize, effects: &mut Vec<Effect>) {
        let running = &mut self.groups[at].running;
        assert!(running.len() > 1, "a sequence that runs alone fits: it was checked when it came");
        let mut one = running.pop().expect("there are at least two");
        self.vacate(at, &mut one);
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
    fn admit_waiting(&mut self, step: &mut Step, effects: &mut Vec<Effect>) {
        // Sequences that will find their prompt computed by another one of their request are passed over.
        while let Some(rank) = self.waiting.values().find(|one| one.held_by.is_none()).map(|head| head.rank) {
            let Some((at, Offer { rows, found, .. })) = self.choose(rank) else { return };
            let mut sequence = self.waiting.remove(&rank).expect("it was just looked at");
            self.waiting_tokens -= u64::from(sequence.len());
            sequence.start(found.start);
            let group = &mut self.groups[at];
            let room = group.kv.room(&found.tables, found.start);
            let slot = group.slots_free.pop().expect("a sub-group without one makes no offer");
            effects.push(Effect::Started { seq: sequence.id, cached_tokens: found.start, slot });
            group.start(sequence, slot, found);
            let index = group.running.len() - 1;
            self.place((at, index), rows.min(room), 0, step);
            self.groups[at].stand(index);
        }
    }

    /// The sub-group where the waiting sequence at `rank` costs least, and what it offers; `None` when the sequence can
    /// start nowhere, or had better wait for the next step: one sub-group knows much of its prompt and has no row left.
    fn choose(&mut self, rank: Rank) -> Option<(usize, Offer)> {
        if self.groups.iter().all(|group| group.budget.tokens == 0) {
            return None;
        }
        let head = &self.waiting[&rank];
        // At least one row must be computed, and so must every row whose logits are wanted.
        let row = match self.sabotage {
            Some(Sabotage::ReuseEveryBlock) => head.len(),
            _ => head.first_logit_row(),
        };
        let mut best: Option<(usize, Offer)> = None;
        for at in 0..self.groups.len() {
            let Some(offer) = self.groups[at].offer(head, row, self.steps) else { continue };
            if best.as_ref().is_some_and(|(_, best)| best.cost <= offer.cost) {
                self.groups[at].put_back(offer.found);
            } else if let Some((worse, offer)) = best.replace((at, offer)) {
                self.groups[worse].put_back(offer.found);
            }
        }
        let (at, offer) = best?;
        if offer.rows == 0 {
            self.groups[at].put_back(offer.found);
            return None;
        }
        Some((at, offer))
    }

    /// Adds the next `rows` rows of a sequence, given by its sub-group and its index there, to the step.
    fn place(&mut self, (at, index): (usize, usize), rows: u32, dropped: u32, step: &mut Step) {
        let group = &mut self.groups[at];
        let one = &mut group.running[index];
        let number = self.steps + 1;
        let range = one.computed..one.computed + rows;
        let logit_rows = one.sequence.logit_rows(&range);
        group.kv.extend(&mut one.tables, range.end);
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
            (range.end - logit_rows..range.end)
                .map(|row| RowWork { seq: one.sequence.id, purpose: one.sequence.purpose(row, &self.free) }),
        );
        if let Some(bug) = self.sabotage {
            Self::spoil_rows(bug, step, first, &one.sequence);
        }
        let flight = one.sequence.fly(first..step.work.len(), range.end);
        one.flights[flight_index(number)] = Some(flight);
        one.computed = range.end;
        group.budget.tokens -= rows;
        group.budget.logits -= logit_rows;
    }
}
