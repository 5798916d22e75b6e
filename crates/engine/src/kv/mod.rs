//! Paged KV bookkeeping: which physical block holds which positions of which sequence.
//!
//! Layers fall into two groups whose blocks live and die together. Full-attention layers need every block of a
//! sequence; sliding layers give back blocks that fell out of the window, which is what makes long contexts cheap.

mod pool;
mod table;

use types::{BlockId, BlockSize, KvGroup};

use crate::Config;

pub use pool::{Block, Pool};
pub use table::Table;

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

/// Both pools. Blocks leave it only into a [`Table`] and come back only from one.
#[derive(Debug)]
pub struct Kv {
    geometry: Geometry,
    pools: [Pool; 2],
}

impl Kv {
    /// Full pools as `config` says.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let geometry = Geometry { block_size: config.block_size, window_keys: config.window_keys };
        Self { geometry, pools: KvGroup::ALL.map(|group| Pool::new(group, config.blocks[group.index()])) }
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

    /// Groups the model has layers of.
    pub fn groups(&self) -> impl Iterator<Item = KvGroup> + use<> {
        let totals = [self.pools[0].total(), self.pools[1].total()];
        KvGroup::ALL.into_iter().filter(move |group| totals[group.index()] > 0)
    }

    /// Tokens that can be cached after the first `computed` ones with the blocks that are free now.
    #[must_use]
    pub fn room(&self, tables: &Tables, computed: u32) -> u32 {
        let block_tokens = u64::from(self.geometry.block_size.tokens());
        let room = self.groups().map(|group| {
            let blocks = u64::from(tables[group.index()].end()) + u64::from(self.pool(group).free());
            blocks * block_tokens - u64::from(computed)
        });
        u32::try_from(room.min().unwrap_or(0)).unwrap_or(u32::MAX)
    }

    /// Gives back the sliding blocks no row from position `start` on can see; returns how many.
    pub fn return_passed(&mut self, tables: &mut Tables, start: u32) -> u32 {
        let group = KvGroup::Sliding;
        let needed = self.geometry.first_needed(group, start);
        let mut returned = 0;
        while let Some(block) = tables[group.index()].pop_before(needed) {
            self.pools[group.index()].give_back(block);
            returned += 1;
        }
        returned
    }

    /// Extends `tables` until they hold the first `end` tokens; the new blocks are appended to `assigned`, group by
    /// group, and their numbers returned.
    ///
    /// # Panics
    /// When the blocks are not there: the caller asks [`Kv::room`] first.
    pub fn extend(&mut self, tables: &mut Tables, end: u32, assigned: &mut Vec<BlockId>) -> [u32; 2] {
        let blocks = self.geometry.block_size.blocks_for(end);
        let mut added = [0; 2];
        for group in self.groups() {
            let table = &mut tables[group.index()];
            while table.end() < blocks {
                let block =
                    self.pools[group.index()].take().expect("extend follows room, so a block is free");
                assigned.push(block.id());
                table.push(block);
                added[group.index()] += 1;
            }
        }
        added
    }

    /// Gives back every block of a sequence; its tables are empty and start at position 0 again.
    pub fn release(&mut self, tables: &mut Tables) {
        for (table, pool) in tables.iter_mut().zip(&mut self.pools) {
            std::mem::take(table).into_blocks().for_each(|block| pool.give_back(block));
        }
    }
}
