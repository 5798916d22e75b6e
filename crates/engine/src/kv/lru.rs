//! Blocks of one group that may be shared, counted, and the order in which unused ones are evicted.

use types::BlockId;

use super::Block;
use super::prefix::NodeId;

/// One use of a shared block: it may be read, never written, and it must be given back. Like [`Block`], it cannot be
/// copied.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a lease that is dropped keeps its block for ever"]
pub struct Lease(BlockId);

impl Lease {
    /// Which physical block.
    #[must_use]
    pub const fn id(&self) -> BlockId {
        self.0
    }
}

#[derive(Debug)]
struct Entry {
    block: Block,
    node: NodeId,
    leases: u32,
    /// Neighbours among the blocks nobody uses.
    older: Option<BlockId>,
    newer: Option<BlockId>,
}

/// The shared blocks of one group.
#[derive(Debug)]
pub struct Shared {
    /// By block id; `None` for a block that is free or one sequence's own.
    entries: Vec<Option<Entry>>,
    len: usize,
    idle: u32,
    oldest: Option<BlockId>,
    newest: Option<BlockId>,
}

impl Shared {
    pub(super) fn new(blocks: u32) -> Self {
        let entries = (0..blocks).map(|_| None).collect();
        Self { entries, len: 0, idle: 0, oldest: None, newest: None }
    }

    /// Blocks that are shared or could be.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Blocks nobody uses now: they keep their content until the space is needed.
    #[must_use]
    pub const fn idle(&self) -> u32 {
        self.idle
    }

    /// How many leases there are of `block`; `None` when it is not shared.
    #[must_use]
    pub fn leases(&self, block: BlockId) -> Option<u32> {
        self.entries[block.0 as usize].as_ref().map(|entry| entry.leases)
    }

    pub(super) fn owner(&self, block: BlockId) -> Option<NodeId> {
        self.entries[block.0 as usize].as_ref().map(|entry| entry.node)
    }

    pub(super) fn insert(&mut self, block: Block, node: NodeId) -> Lease {
        let id = block.id();
        let entry = Entry { block, node, leases: 1, older: None, newer: None };
        let before = self.entries[id.0 as usize].replace(entry);
        assert!(before.is_none(), "block {id} was not exclusive");
        self.len += 1;
        Lease(id)
    }

    pub(super) fn lease(&mut self, id: BlockId) -> Lease {
        let entry = self.entry(id);
        entry.leases += 1;
        if entry.leases == 1 {
            self.unlink(id);
        }
        Lease(id)
    }

    pub(super) fn give_back(&mut self, Lease(id): Lease) {
        let entry = self.entry(id);
        entry.leases -= 1;
        if entry.leases > 0 {
            return;
        }
        let older = self.newest.replace(id);
        self.entry(id).older = older;
        match older {
            Some(older) => self.entry(older).newer = Some(id),
            None => self.oldest = Some(id),
        }
        self.idle += 1;
    }

    /// Takes out the block that has been idle for the longest time.
    pub(super) fn evict(&mut self) -> Option<(Block, NodeId)> {
        let id = self.oldest?;
        self.unlink(id);
        let entry = self.entries[id.0 as usize].take().expect("a block in the list has an entry");
        self.len -= 1;
        Some((entry.block, entry.node))
    }

    fn unlink(&mut self, id: BlockId) {
        let entry = self.entry(id);
        let (older, newer) = (entry.older.take(), entry.newer.take());
        match older {
            Some(older) => self.entry(older).newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => self.entry(newer).older = older,
            None => self.newest = older,
        }
        self.idle -= 1;
    }

    fn entry(&mut self, id: BlockId) -> &mut Entry {
        self.entries[id.0 as usize].as_mut().expect("whoever names a shared block keeps it")
    }

    /// The idle blocks, the next to be evicted first.
    pub fn idle_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        std::iter::successors(self.oldest, |id| self.entries[id.0 as usize].as_ref()?.newer)
    }
}
