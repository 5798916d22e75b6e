//! Paged KV bookkeeping: which physical block holds which positions of which sequence.
//!
//! Layers fall into two groups whose blocks live and die together. Full-attention layers need every block of a
//! sequence; sliding layers give back blocks that fell out of the window, which is what makes long contexts cheap.
//!
//! A block that is full goes into the prefix tree ([`Prefixes`]), where every sequence that begins alike finds it. When
//! nobody uses it any more it keeps its content until the space is needed, the longest unused first.

mod lru;
mod pool;
mod prefix;
mod table;

use types::{BlockSize, KvGroup, TokenId};

use crate::Config;

pub use lru::{Lease, Shared};
pub use pool::{Block, Pool};
pub use prefix::{Cursor, Prefixes, Root};
pub use table::{Held, Table};

/// How positions map to blocks, the same for every sequence and on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Tokens per block.
    pub block_size: BlockSize,
    /// Keys a row of a sliding layer sees, its own included.
    pub window_keys: u32,
}

impl Geometry {
    /// First logical block that rows from position `start` on may still read.
    #[must_use]
    pub const fn first_needed(self, group: KvGroup, start: u32) -> u32 {
        match group {
            KvGroup::Full => 0,
            KvGroup::Sliding => {
                start.saturating_sub(self.window_keys.saturating_sub(1)) / self.block_size.tokens()
            }
        }
    }

    /// Most blocks a sequence of `tokens` cached tokens must hold at once, when its rows are computed in chunks as
    /// small as need be.
    #[must_use]
    pub fn peak(self, group: KvGroup, tokens: u32) -> u32 {
        let all = self.block_size.blocks_for(tokens);
        match group {
            KvGroup::Full => all,
            KvGroup::Sliding if self.window_keys >= tokens => all,
            // A window that starts at the last token of a block touches the most blocks.
            KvGroup::Sliding => all.min((self.window_keys - 1).div_ceil(self.block_size.tokens()) + 1),
        }
    }
}

/// One sequence's blocks, by [`KvGroup::index`].
pub type Tables = [Table; 2];

/// Both pools and the prefix tree. A block is free, one table's own, or in the tree; it moves only between these.
#[derive(Debug)]
pub struct Kv {
    geometry: Geometry,
    pools: [Pool; 2],
    prefixes: Prefixes,
}

impl Kv {
    /// Full pools as `config` says.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let geometry = Geometry { block_size: config.block_size, window_keys: config.window_keys };
        Self {
            geometry,
            pools: KvGroup::ALL.map(|group| Pool::new(group, config.blocks[group.index()])),
            prefixes: Prefixes::new(config, geometry),
        }
    }

    /// How positions map to blocks.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The pool of `group`.
    #[must_use]
    pub const fn pool(&self, group: KvGroup) -> &Pool {
        &self.pools[group.index()]
    }

    /// The prefix tree.
    #[must_use]
    pub const fn prefixes(&self) -> &Prefixes {
        &self.prefixes
    }

    /// Blocks of `group` a sequence could have: the free ones, and those of the prefix tree nobody uses.
    #[must_use]
    pub fn available(&self, group: KvGroup) -> u32 {
        self.pool(group).free() + self.prefixes.shared(group).idle()
    }

    /// Groups the model has layers of.
    pub fn groups(&self) -> impl Iterator<Item = KvGroup> + use<> {
        let totals = [self.pools[0].total(), self.pools[1].total()];
        KvGroup::ALL.into_iter().filter(move |group| totals[group.index()] > 0)
    }

    /// Tokens that can be cached after the first `computed` ones with the blocks that can be had now.
    #[must_use]
    pub fn room(&self, tables: &Tables, computed: u32) -> u32 {
        let block_tokens = u64::from(self.geometry.block_size.tokens());
        let room = self.groups().map(|group| {
            let blocks = u64::from(tables[group.index()].end()) + u64::from(self.available(group));
            blocks * block_tokens - u64::from(computed)
        });
        u32::try_from(room.min().unwrap_or(0)).unwrap_or(u32::MAX)
    }

    /// Fills empty `tables` with the longest known prefix of `tokens` below the root of `cursor`, of at most `limit`
    /// blocks, and moves the cursor to its end; returns how many blocks of tokens it covers.
    pub fn reuse(&mut self, tables: &mut Tables, cursor: &mut Cursor, tokens: &[TokenId], limit: u32) -> u32 {
        let blocks = self.prefixes.find(cursor.root(), tokens, limit);
        let start = blocks * self.geometry.block_size.tokens();
        for group in self.groups() {
            let first = self.geometry.first_needed(group, start);
            let table = &mut tables[group.index()];
            table.start_at(first);
            self.prefixes.lease(group, first, |lease| table.push_shared(lease));
        }
        self.prefixes.advance_to_found(cursor);
        blocks
    }

    /// Puts the next full block of a sequence, whose tokens are `block`, into the prefix tree; false when it cannot
    /// be there. A block that is known already stays the sequence's own.
    pub fn publish(&mut self, tables: &mut Tables, cursor: &mut Cursor, block: &[TokenId]) -> bool {
        let at = cursor.blocks();
        if !self.prefixes.advance(cursor, block) {
            return false;
        }
        for group in self.groups() {
            if self.prefixes.lacks(cursor, group) {
                let prefixes = &mut self.prefixes;
                tables[group.index()].share(at, |block| prefixes.insert(cursor, group, block));
            }
        }
        true
    }

    /// Switches a bug on or off, see [`crate::Sabotage`].
    pub(crate) fn skip_window_check(&mut self, skip: bool) {
        self.prefixes.skip_window_check = skip;
    }

    /// Gives back the sliding blocks no row from position `start` on can see; returns how many.
    pub fn return_passed(&mut self, tables: &mut Tables, start: u32) -> u32 {
        let group = KvGroup::Sliding;
        let needed = self.geometry.first_needed(group, start);
        let mut returned = 0;
        while let Some(held) = tables[group.index()].pop_before(needed) {
            self.give_back(group, held);
            returned += 1;
        }
        returned
    }

    /// Extends `tables` until they hold the first `end` tokens.
    ///
    /// # Panics
    /// When the blocks are not there: the caller asks [`Kv::room`] first.
    pub fn extend(&mut self, tables: &mut Tables, end: u32) {
        let blocks = self.geometry.block_size.blocks_for(end);
        for group in self.groups() {
            let table = &mut tables[group.index()];
            while table.end() < blocks {
                let block = self.pools[group.index()].take().or_else(|| self.prefixes.evict(group));
                table.push(block.expect("extend follows room, so a block can be had"));
            }
        }
    }

    /// Gives back every block of a sequence, the last one first, so that the end of a prefix is evicted before its
    /// beginning; its tables are empty and start at position 0 again.
    pub fn release(&mut self, tables: &mut Tables) {
        for (group, table) in KvGroup::ALL.into_iter().zip(tables) {
            std::mem::take(table).into_blocks().rev().for_each(|held| self.give_back(group, held));
        }
    }

    /// Ends the use of `cursor`.
    pub fn close(&mut self, cursor: Cursor) {
        self.prefixes.close(cursor);
    }

    fn give_back(&mut self, group: KvGroup, held: Held) {
        match held {
            Held::Own(block) => self.pools[group.index()].give_back(block),
            Held::Shared(lease) => self.prefixes.give_back(group, lease),
        }
    }
}
