//! The prefix tree against a model of it without hashes, nodes or links: whatever is computed, shared and given back, both
//! find the same prefixes in the same blocks, and evict in the same order.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

use std::collections::BTreeMap;

use engine::kv::{Cursor, Held, Kv, Root, Tables};
use engine::{Config, KvGroup};
use proptest::prelude::*;
use types::{BlockId, BlockSize, TokenId};

const SIZE: usize = 2;
const SEATS: usize = 4;

#[derive(Debug, Clone)]
enum Op {
    /// A sequence starts on a free seat, with a prompt of one of a few kinds.
    Start { seat: usize, root: usize, kind: u32, len: usize, differs: usize },
    /// It computes some tokens, and publishes the blocks that became full.
    Compute { seat: usize, tokens: u32 },
    /// It gives everything back.
    Leave { seat: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let seat = 0..SEATS;
    prop_oneof![
        3 => (seat.clone(), 0..2_usize, 0..2_u32, 2..16_usize, 0..24_usize)
            .prop_map(|(seat, root, kind, len, differs)| Op::Start { seat, root, kind, len, differs }),
        5 => (seat.clone(), 1..6_u32).prop_map(|(seat, tokens)| Op::Compute { seat, tokens }),
        2 => seat.prop_map(|seat| Op::Leave { seat }),
    ]
}

fn root(index: usize) -> Root {
    Root::Shared([None, Some(7)][index])
}

/// A prefix below a root.
type Key = (usize, Vec<TokenId>);

/// What the tree means: which block holds the last block of tokens of a prefix, in each group.
struct Model {
    config: Config,
    blocks: BTreeMap<Key, [Option<BlockId>; 2]>,
    leases: [BTreeMap<BlockId, u32>; 2],
    idle: [Vec<BlockId>; 2],
    free: [u32; 2],
}

impl Model {
    fn groups(&self) -> impl Iterator<Item = KvGroup> + use<> {
        let has = KvGroup::ALL.map(|group| self.config.has(group));
        KvGroup::ALL.into_iter().filter(move |group| has[group.index()])
    }

    /// Blocks of `tokens` that can be taken over. A prefix is known while it, or anything behind it, has a block or a
    /// sequence standing there.
    fn find(&self, root: usize, tokens: &[TokenId], standing: &[Key]) -> usize {
        let mut found = 0;
        for end in 1..=tokens.len() / SIZE {
            let prefix = &tokens[..end * SIZE];
            let behind = |(at, path): &Key| *at == root && path.starts_with(prefix);
            let held = self.blocks.iter().any(|(key, blocks)| behind(key) && *blocks != [None; 2]);
            if !held && !standing.iter().any(behind) {
                break;
            }
            let block = |group: KvGroup, at: usize| {
                self.blocks
                    .get(&(root, tokens[..at * SIZE].to_vec()))
                    .and_then(|blocks| blocks[group.index()])
            };
            if self.config.has(KvGroup::Full) && block(KvGroup::Full, end).is_none() {
                break;
            }
            let first = self.first_needed(end);
            if !self.config.has(KvGroup::Sliding)
                || (first + 1..=end).all(|at| block(KvGroup::Sliding, at).is_some())
            {
                found = end;
            }
        }
        found
    }

    /// The first block the row behind `blocks` blocks sees in the sliding group.
    fn first_needed(&self, blocks: usize) -> usize {
        (blocks * SIZE).saturating_sub(self.config.window_keys as usize - 1) / SIZE
    }

    fn take_free_or_evict(&mut self, group: KvGroup) {
        let at = group.index();
        if self.free[at] > 0 {
            self.free[at] -= 1;
            return;
        }
        let evicted = self.idle[at].remove(0);
        self.leases[at].remove(&evicted);
        self.blocks.values_mut().filter(|b| b[at] == Some(evicted)).for_each(|b| b[at] = None);
    }

    fn give_back(&mut self, group: KvGroup, held: &Held) {
        let at = group.index();
        match held {
            Held::Own(_) => self.free[at] += 1,
            Held::Shared(lease) => {
                let leases = self.leases[at].get_mut(&lease.id()).unwrap();
                *leases -= 1;
                if *leases == 0 {
                    self.idle[at].push(lease.id());
                }
            }
        }
    }

    fn lease(&mut self, group: KvGroup, block: BlockId) {
        *self.leases[group.index()].entry(block).or_default() += 1;
        self.idle[group.index()].retain(|idle| *idle != block);
    }
}

/// A sequence.
struct Seated {
    root: usize,
    tokens: Vec<TokenId>,
    computed: u32,
    tables: Tables,
    cursor: Option<Cursor>,
}

struct Both {
    kv: Kv,
    model: Model,
    seats: [Option<Seated>; SEATS],
}

impl Both {
    fn new(blocks: [u32; 2], window_keys: u32) -> Self {
        let config = Config {
            block_size: BlockSize::new(SIZE as u32).unwrap(),
            blocks,
            window_keys,
            context_tokens_max: 64,
            vocab_size: 100,
            eos_token_ids: Vec::new(),
            step_tokens_max: 64,
            logit_rows_max: 64,
            running_max: SEATS as u32,
            data_parallel: 1,
            waiting_requests_max: 8,
            waiting_tokens_max: 64,
        };
        let model = Model {
            blocks: BTreeMap::new(),
            leases: Default::default(),
            idle: Default::default(),
            free: blocks,
            config: config.clone(),
        };
        Self { kv: Kv::new(&config), model, seats: Default::default() }
    }

    fn standing(&self) -> Vec<Key> {
        let seated = self.seats.iter().flatten();
        let key = |one: &Seated| {
            let blocks = one.cursor.as_ref()?.blocks() as usize;
            Some((one.root, one.tokens[..blocks * SIZE].to_vec()))
        };
        seated.filter_map(key).collect()
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Start { seat, root, kind, len, differs } => {
                self.start(seat, (root, prompt(kind, len, differs)))
            }
            Op::Compute { seat, tokens } => self.compute(seat, tokens),
            Op::Leave { seat } => self.leave(seat),
        }
        self.compare();
    }

    fn start(&mut self, seat: usize, (at, tokens): Key) {
        if self.seats[seat].is_some() {
            return;
        }
        let expected = self.model.find(at, &tokens, &self.standing());
        let (mut tables, mut cursor) = (Tables::default(), Cursor::new(root(at)));
        let limit = u32::try_from(tokens.len() / SIZE).unwrap();
        let found = self.kv.reuse(&mut tables, &mut cursor, &tokens, limit) as usize;
        assert_eq!(found, expected, "blocks found of {tokens:?}");
        for group in self.model.groups() {
            let first = if group == KvGroup::Full { 0 } else { self.model.first_needed(found) };
            let known = |end: usize| self.model.blocks[&(at, tokens[..end * SIZE].to_vec())][group.index()];
            let expected: Vec<BlockId> = (first + 1..=found).map(|end| known(end).unwrap()).collect();
            assert!(tables[group.index()].ids().eq(expected.iter().copied()), "{group} blocks found");
            expected.into_iter().for_each(|block| self.model.lease(group, block));
        }
        let computed = u32::try_from(found * SIZE).unwrap();
        self.seats[seat] = Some(Seated { root: at, tokens, computed, tables, cursor: Some(cursor) });
    }

    fn compute(&mut self, seat: usize, tokens: u32) {
        let Some(mut one) = self.seats[seat].take() else { return };
        for held in one.tables[1].held().take(self.passed(&one)) {
            self.model.give_back(KvGroup::Sliding, held);
        }
        self.kv.return_passed(&mut one.tables, one.computed);
        let left = u32::try_from(one.tokens.len()).unwrap() - one.computed;
        let rows = tokens.min(left).min(self.kv.room(&one.tables, one.computed));
        let before = KvGroup::ALL.map(|group| one.tables[group.index()].end());
        one.computed += rows;
        self.kv.extend(&mut one.tables, one.computed);
        for group in self.model.groups() {
            let taken = one.tables[group.index()].end() - before[group.index()];
            (0..taken).for_each(|_| self.model.take_free_or_evict(group));
        }
        self.publish(&mut one);
        self.seats[seat] = Some(one);
    }

    /// Sliding blocks of `one` that no later row sees.
    fn passed(&self, one: &Seated) -> usize {
        if !self.model.config.has(KvGroup::Sliding) {
            return 0;
        }
        let needed = one.computed.saturating_sub(self.model.config.window_keys - 1) / SIZE as u32;
        (needed.saturating_sub(one.tables[1].first()).min(one.tables[1].len())) as usize
    }

    fn publish(&mut self, one: &mut Seated) {
        let Some(mut cursor) = one.cursor.take() else { return };
        while (cursor.blocks() as usize + 1) * SIZE <= one.computed as usize {
            let at = cursor.blocks() as usize;
            let prefix = one.tokens[..(at + 1) * SIZE].to_vec();
            if !self.kv.publish(&mut one.tables, &mut cursor, &one.tokens[at * SIZE..(at + 1) * SIZE]) {
                return self.kv.close(cursor);
            }
            let entry = self.model.blocks.entry((one.root, prefix)).or_default();
            for group in KvGroup::ALL.into_iter().filter(|&group| self.model.config.has(group)) {
                let table = &one.tables[group.index()];
                let index = at.checked_sub(table.first() as usize);
                let held = index.and_then(|index| table.held().nth(index));
                if let (None, Some(held)) = (entry[group.index()], held) {
                    entry[group.index()] = Some(held.id());
                    self.model.leases[group.index()].insert(held.id(), 1);
                }
            }
        }
        one.cursor = Some(cursor);
    }

    fn leave(&mut self, seat: usize) {
        let Some(mut one) = self.seats[seat].take() else { return };
        for group in KvGroup::ALL {
            let held: Vec<&Held> = one.tables[group.index()].held().collect();
            held.into_iter().rev().for_each(|held| self.model.give_back(group, held));
        }
        self.kv.release(&mut one.tables);
        one.cursor.into_iter().for_each(|cursor| self.kv.close(cursor));
    }

    fn compare(&self) {
        let cursors = self.seats.iter().flatten().filter_map(|one| one.cursor.as_ref());
        self.kv.prefixes().check(cursors);
        for group in KvGroup::ALL {
            let (shared, at) = (self.kv.prefixes().shared(group), group.index());
            assert!(
                shared.idle_blocks().eq(self.model.idle[at].iter().copied()),
                "{group}: order of eviction"
            );
            assert_eq!(self.kv.pool(group).free(), self.model.free[at], "{group}: free blocks");
            for block in (0..self.kv.pool(group).total()).map(BlockId) {
                let leases = self.model.leases[at].get(&block).copied();
                assert_eq!(shared.leases(block), leases, "{group}: leases of block {block}");
            }
        }
    }
}

/// A prompt that is alike others of its kind up to position `differs`.
fn prompt(kind: u32, len: usize, differs: usize) -> Vec<TokenId> {
    let token = |at: usize| if at < differs { 1 + kind } else { 50 + differs as u32 };
    (0..len).map(|at| TokenId(token(at))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn the_tree_means_what_the_model_says(
        ops in prop::collection::vec(op(), 1..80),
        full in 0..16_u32,
        sliding in 0..16_u32,
        window_keys in 1..8_u32,
    ) {
        prop_assume!(full > 0 || sliding > 0);
        let mut both = Both::new([full, sliding], window_keys);
        ops.iter().for_each(|op| both.run(op));
        (0..SEATS).for_each(|seat| both.run(&Op::Leave { seat }));
    }
}
