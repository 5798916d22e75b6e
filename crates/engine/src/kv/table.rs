//! The blocks one sequence holds in one group.

use std::collections::VecDeque;

use types::BlockId;

use super::{Block, Lease};

/// A block in a table.
#[derive(Debug, PartialEq, Eq)]
pub enum Held {
    /// The sequence's own, which it may write.
    Own(Block),
    /// Full, in the prefix tree, read by any number of sequences.
    Shared(Lease),
}

impl Held {
    /// Which physical block.
    #[must_use]
    pub const fn id(&self) -> BlockId {
        match self {
            Self::Own(block) => block.id(),
            Self::Shared(lease) => lease.id(),
        }
    }
}

/// A run of consecutive logical blocks (position / block size) and the physical block of each.
#[derive(Debug, Default)]
pub struct Table {
    first: u32,
    blocks: VecDeque<Held>,
}

impl Table {
    /// Logical index of the first block held; the ones before it were given back, or are not needed.
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

    /// What is held, from [`Table::first`] on.
    pub fn held(&self) -> impl Iterator<Item = &Held> + '_ {
        self.blocks.iter()
    }

    /// The physical blocks, from [`Table::first`] on.
    pub fn ids(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.blocks.iter().map(Held::id)
    }

    /// The physical blocks from the `skip`th one held on.
    pub fn ids_after(&self, skip: u32) -> impl ExactSizeIterator<Item = BlockId> + '_ {
        self.blocks.range(skip as usize..).map(Held::id)
    }

    /// Makes `first` the logical index of the block that comes next.
    ///
    /// # Panics
    /// When the table holds a block.
    pub(super) fn start_at(&mut self, first: u32) {
        assert!(self.is_empty(), "only an empty table can begin elsewhere");
        self.first = first;
    }

    /// Makes room for `blocks` in all, so that no later one allocates.
    pub fn reserve(&mut self, blocks: u32) {
        self.blocks.reserve((blocks - blocks.min(self.len())) as usize);
    }

    /// Takes `block` as the next logical block, to be written.
    pub fn push(&mut self, block: Block) {
        self.blocks.push_back(Held::Own(block));
    }

    /// Takes a block that is known already as the next logical block.
    pub(super) fn push_shared(&mut self, lease: Lease) {
        self.blocks.push_back(Held::Shared(lease));
    }

    /// Exchanges the sequence's own block at logical index `at`, if there is one, for a lease of it.
    pub(super) fn share(&mut self, at: u32, share: impl FnOnce(Block) -> Lease) {
        let Some(index) = at.checked_sub(self.first).map(|index| index as usize) else { return };
        match self.blocks.swap_remove_back(index) {
            None => return,
            Some(Held::Own(block)) => self.blocks.push_back(Held::Shared(share(block))),
            Some(shared) => self.blocks.push_back(shared),
        }
        let last = self.blocks.len() - 1;
        self.blocks.swap(index, last);
    }

    /// Parts with the first block, if its logical index is below `needed`.
    pub fn pop_before(&mut self, needed: u32) -> Option<Held> {
        if self.first >= needed {
            return None;
        }
        let block = self.blocks.pop_front()?;
        self.first += 1;
        Some(block)
    }

    /// Parts with every block, the first one first.
    pub fn into_blocks(self) -> impl DoubleEndedIterator<Item = Held> {
        self.blocks.into_iter()
    }
}
