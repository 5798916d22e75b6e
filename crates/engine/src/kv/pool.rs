//! The free list of one KV group.

use types::BlockId;

use crate::KvGroup;

/// The right to use one physical block. It cannot be copied and a pool takes it back by value, so it cannot be
/// given back twice or used afterwards:
///
/// ```compile_fail,E0382
/// use engine::{KvGroup, kv::Pool};
/// let mut pool = Pool::new(KvGroup::Full, 1);
/// let block = pool.take().unwrap();
/// pool.give_back(block);
/// pool.give_back(block); // moved
/// ```
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a block that is dropped is lost to its pool"]
pub struct Block {
    id: BlockId,
    group: KvGroup,
}

impl Block {
    /// Which physical block.
    #[must_use]
    pub const fn id(&self) -> BlockId {
        self.id
    }
}

/// The blocks of one group that no sequence holds.
#[derive(Debug)]
pub struct Pool {
    group: KvGroup,
    total: u32,
    free: Vec<Block>,
}

impl Pool {
    /// A pool of `blocks` free blocks.
    #[must_use]
    pub fn new(group: KvGroup, blocks: u32) -> Self {
        // Reversed, so that the lowest block is taken first.
        let free = (0..blocks).rev().map(|id| Block { id: BlockId(id), group }).collect();
        Self { group, total: blocks, free }
    }

    /// Blocks of the pool, free or not.
    #[must_use]
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// Blocks that can be taken.
    #[must_use]
    pub fn free(&self) -> u32 {
        u32::try_from(self.free.len()).expect("a pool has at most u32 blocks")
    }

    /// Takes the block given back last (its memory is the warmest); `None` when all are in use.
    pub fn take(&mut self) -> Option<Block> {
        self.free.pop()
    }

    /// Takes a block back.
    ///
    /// # Panics
    /// When the block is another group's.
    pub fn give_back(&mut self, block: Block) {
        assert_eq!(block.group, self.group, "block {} went to the wrong pool", block.id);
        self.free.push(block);
    }

    /// The free blocks, in no particular order.
    pub fn free_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.free.iter().map(Block::id)
    }
}
