//! The blocks one sequence holds in one group.

use std::collections::VecDeque;

use types::BlockId;

use super::Block;

/// A run of consecutive logical blocks (position / block size) and the physical block of each.
#[derive(Debug, Default)]
pub struct Table {
    first: u32,
    blocks: VecDeque<Block>,
}

impl Table {
    /// Logical index of the first block held; the ones before it were given back.
    #[must_use]
    pub const fn first(&self) -> u32 {
        self.first
    }

    /// Logical index after the last block held.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.first + self.len()
    }

    /// Blocks held.
    #[must_use]
    pub fn len(&self) -> u32 {
        u32::try_from(self.blocks.len()).expect("a table has at most as many blocks as its pool")
    }

    /// Whether no block is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The physical blocks, from [`Table::first`] on.
    pub fn ids(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.blocks.iter().map(Block::id)
    }

    /// Takes `block` as the next logical block.
    pub fn push(&mut self, block: Block) {
        self.blocks.push_back(block);
    }

    /// Parts with the first block, if its logical index is below `needed`.
    pub fn pop_before(&mut self, needed: u32) -> Option<Block> {
        if self.first >= needed {
            return None;
        }
        let block = self.blocks.pop_front()?;
        self.first += 1;
        Some(block)
    }

    /// Parts with every block.
    pub fn into_blocks(self) -> impl Iterator<Item = Block> {
        self.blocks.into_iter()
    }
}
