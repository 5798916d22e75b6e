//! Everything that must hold between two calls. Tests call it after every one.

use std::collections::BTreeSet;

use types::{BlockId, SlotId};

use crate::engine::flight_index;
use crate::group::SubGroup;
use crate::kv::Held;
use crate::sequence::{Running, Sequence};
use crate::{Engine, KvGroup, SlotTables};

impl Engine {
    /// Checks every invariant of the engine's state.
    ///
    /// # Panics
    /// When one does not hold, naming it: a bug in this crate.
    pub fn check(&self) {
        self.groups.iter().for_each(Self::check_blocks);
        self.check_slots();
        self.check_sequences();
    }

    /// Checks that a rank's tables, with all plans applied, are the engine's own: those of steps in flight too.
    ///
    /// # Panics
    /// When they are not: a bug in this crate.
    pub fn check_mirror(&self, mirror: &SlotTables) {
        for one in self.running() {
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

    /// Every block is free, or one table's own, or in the prefix tree; there, each of its leases is in a table, and the
    /// blocks without one are those that may be evicted.
    fn check_blocks(sub_group: &SubGroup) {
        let SubGroup { kv, running, .. } = sub_group;
        for group in KvGroup::ALL {
            let (pool, shared) = (kv.pool(group), kv.prefixes().shared(group));
            let mut places = vec![0; pool.total() as usize];
            let mut leases = vec![0; pool.total() as usize];
            pool.free_blocks().for_each(|block| places[block.0 as usize] += 1);
            for held in running.iter().flat_map(|one| one.tables[group.index()].held()) {
                match held {
                    Held::Own(block) => places[block.id().0 as usize] += 1,
                    Held::Shared(lease) => leases[lease.id().0 as usize] += 1,
                }
            }
            let mut idle = 0;
            for (block, leases) in (0..pool.total()).map(BlockId).zip(leases) {
                let counted = shared.leases(block);
                places[block.0 as usize] += u32::from(counted.is_some());
                assert_eq!(places[block.0 as usize], 1, "places of {group} block {block}");
                assert_eq!(counted.unwrap_or(0), leases, "leases of {group} block {block}");
                idle += u32::from(counted == Some(0));
            }
            assert_eq!(shared.idle(), idle, "{group} blocks that can be evicted");
            let mut listed = 0;
            for block in shared.idle_blocks() {
                assert_eq!(shared.leases(block), Some(0), "{group} block {block} can be evicted");
                listed += 1;
            }
            assert_eq!(listed, idle, "{group} blocks in the order of eviction");
        }
        kv.prefixes().check(running.iter().filter_map(|one| one.cursor.as_ref()));
    }

    /// Every slot is free or used by exactly one sequence.
    fn check_slots(&self) {
        for (index, group) in (0..).zip(&self.groups) {
            let slots = group.slots_free.iter().copied().chain(group.running.iter().map(|one| one.slot));
            let own: BTreeSet<SlotId> =
                slots.clone().filter(|&slot| self.config.sub_group(slot) == index).collect();
            assert_eq!(slots.count(), self.config.running_max as usize, "slots of sub-group {index}");
            assert_eq!(
                own.len(),
                self.config.running_max as usize,
                "a slot is in two places, or in a wrong one"
            );
        }
        let mut released = BTreeSet::new();
        for &slot in &self.slots_released {
            assert!(released.insert(slot), "{slot} is released twice");
            assert!(self.running().all(|one| one.slot != slot), "{slot} is released and in use");
        }
    }

    /// Progress and tables of each sequence agree, and the queue's sums are right.
    fn check_sequences(&self) {
        for (group, one) in
            self.groups.iter().flat_map(|group| group.running.iter().map(move |one| (group, one)))
        {
            let (kv, geometry) = (&group.kv, group.kv.geometry());
            let id = one.sequence.id;
            assert!(one.computed > 0, "{id} runs without having had a row");
            assert!(one.computed <= one.sequence.inputs(), "{id} computed more than it has");
            self.check_flights(one);
            assert!(
                one.computed <= one.sequence.cached_tokens_max(),
                "{id} caches more than it was admitted for"
            );
            for group in KvGroup::ALL {
                let table = &one.tables[group.index()];
                if kv.pool(group).total() == 0 {
                    assert!(table.is_empty(), "{id} has blocks of a group without layers");
                    continue;
                }
                assert_eq!(table.end(), geometry.block_size.blocks_for(one.computed), "{id}: end of {group}");
                let needed = geometry.first_needed(group, one.computed);
                assert!(table.first() <= needed, "{id}: {group} lost a block that is still needed");
            }
            if let Some(cursor) = &one.cursor {
                let full = one.answered / geometry.block_size.tokens();
                assert_eq!(cursor.blocks(), full, "{id}: blocks in the prefix tree");
            }
        }
        for sequence in self.waiting.values() {
            let Some(leader) = sequence.held_by else { continue };
            let mut all = self.sequences();
            let leads = all.any(|one| one.id == leader && one.leads && one.held_by.is_none());
            assert!(leads, "{} waits for {leader}, which computes no prompt", sequence.id);
        }
        let first = self.sequences().filter_map(Sequence::deadline).min();
        let known = |first| self.first_deadline.is_some_and(|known| known <= first);
        assert!(first.is_none_or(known), "a deadline would be missed");
        let waiting: u64 = self.waiting.values().map(|sequence| u64::from(sequence.len())).sum();
        assert_eq!(waiting, self.waiting_tokens, "waiting tokens");
        let unique: BTreeSet<_> = self.sequences().map(|one| one.id).collect();
        assert_eq!(unique.len(), self.sequences().count(), "a sequence is in two places");
    }

    /// What a sequence expects of the steps in flight is what they compute.
    fn check_flights(&self, one: &Running) {
        let id = one.sequence.id;
        let mut end = one.answered;
        let mut pending = 0;
        for (at, flight) in one.flights.iter().enumerate() {
            let flown = self.in_flight.iter().any(|step| flight_index(step.step) == at);
            assert!(flown || flight.is_none(), "{id} expects rows of a step that is not in flight");
        }
        for step in &self.in_flight {
            let Some(flight) = &one.flights[flight_index(step.step)] else { continue };
            assert!(flight.end > end, "{id}: step {} adds nothing", step.step);
            assert!(flight.logit_rows().end <= step.logit_rows, "{id}: logit rows of step {}", step.step);
            end = flight.end;
            pending += u32::from(flight.draws);
        }
        assert_eq!(end, one.computed, "{id}: tokens computed by answered steps and those in flight");
        assert_eq!(one.sequence.expected(), one.sequence.len() + pending, "{id}: tokens being drawn");
        assert!(one.remaining() + pending > 0, "{id} waits for a token nobody computes");
    }
}
