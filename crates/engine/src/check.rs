//! Everything that must hold between two calls. Tests call it after every one; the leader when it is idle.

use std::collections::BTreeSet;

use types::SlotId;

use crate::{Engine, KvGroup, SlotTables};

impl Engine {
    /// Checks every invariant of the engine's state.
    ///
    /// # Panics
    /// When one does not hold, naming it: a bug in this crate.
    pub fn check(&self) {
        self.check_blocks();
        self.check_slots();
        self.check_sequences();
    }

    /// Checks that a rank's tables, with all plans applied, are the engine's own.
    ///
    /// # Panics
    /// When they are not: a bug in this crate.
    pub fn check_mirror(&self, mirror: &SlotTables) {
        for one in &self.running {
            for (own, copy) in one.tables.iter().zip(mirror.tables(one.slot)) {
                assert_eq!(own.first(), copy.first, "{}: first block of {}", one.sequence.id, one.slot);
                assert!(
                    own.ids().eq(copy.blocks.iter().copied()),
                    "{}: blocks of {}",
                    one.sequence.id,
                    one.slot
                );
            }
        }
    }

    /// Every block is free or in exactly one table.
    fn check_blocks(&self) {
        for group in KvGroup::ALL {
            let pool = self.kv.pool(group);
            let mut seen = vec![false; pool.total() as usize];
            let held = self.running.iter().flat_map(|one| one.tables[group.index()].ids());
            for block in pool.free_blocks().chain(held) {
                let seen = &mut seen[block.0 as usize];
                assert!(!*seen, "{group} block {block} is in two places");
                *seen = true;
            }
            let lost = seen.iter().position(|&seen| !seen);
            assert_eq!(lost, None, "this {group} block is neither free nor in a table");
        }
    }

    /// Every slot is free or used by exactly one sequence.
    fn check_slots(&self) {
        let used = self.running.iter().map(|one| one.slot);
        let slots: BTreeSet<SlotId> = self.slots_free.iter().copied().chain(used.clone()).collect();
        assert_eq!(self.slots_free.len() + self.running.len(), self.config.running_max as usize, "slots");
        assert_eq!(slots.len(), self.config.running_max as usize, "a slot is in two places");
        let mut released = BTreeSet::new();
        for &slot in &self.slots_released {
            assert!(released.insert(slot), "{slot} is released twice");
            assert!(used.clone().all(|used| used != slot), "{slot} is released and in use");
        }
    }

    /// Progress and tables of each sequence agree, and the queue's sums are right.
    fn check_sequences(&self) {
        let geometry = self.kv.geometry();
        for one in &self.running {
            let id = one.sequence.id;
            assert!(one.computed > 0, "{id} runs without having had a row");
            assert!(one.computed <= one.sequence.len(), "{id} computed more than it has");
            assert!(
                one.remaining() > 0 || self.in_flight.is_some(),
                "{id} waits for a token nobody computes"
            );
            assert!(
                one.computed <= one.sequence.cached_tokens_max(),
                "{id} caches more than it was admitted for"
            );
            for group in KvGroup::ALL {
                let table = &one.tables[group.index()];
                if self.kv.pool(group).total() == 0 {
                    assert!(table.is_empty(), "{id} has blocks of a group without layers");
                    continue;
                }
                assert_eq!(table.end(), geometry.block_size.blocks_for(one.computed), "{id}: end of {group}");
                let needed = geometry.first_needed(group, one.computed);
                assert!(table.first() <= needed, "{id}: {group} lost a block that is still needed");
            }
            if self.in_flight.is_none() {
                assert!(one.logit_rows.is_empty(), "{id} expects rows of a step that does not run");
            }
        }
        let waiting: u64 = self.waiting.values().map(|sequence| u64::from(sequence.len())).sum();
        assert_eq!(waiting, self.waiting_tokens, "waiting tokens");
        let ids = self.waiting.values().map(|s| s.id).chain(self.running.iter().map(|one| one.sequence.id));
        let unique: BTreeSet<_> = ids.collect();
        assert_eq!(unique.len(), self.waiting.len() + self.running.len(), "a sequence is in two places");
    }
}
