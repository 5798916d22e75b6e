//! The prefix tree: blocks whose content is known, to be shared by sequences that begin alike.
//!
//! A node is one full block of tokens behind the node of the tokens before it, so a path from a root spells a prefix.
//! It names a physical block in each group that still has one. Nodes are found by a chained 64-bit hash, and then the
//! parent and the tokens are compared: two prefixes with the same hash cost a miss, never a wrong hit.

use std::collections::HashMap;

use types::{BlockId, SeqId, TokenId};

use super::lru::{Lease, Shared};
use super::{Block, Geometry};
use crate::{Config, KvGroup};

/// Who may share: only paths below the same root are ever compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// Every request with this salt, or with none.
    Shared(Option<u128>),
    /// The sequences of one request, named by its first.
    Private(SeqId),
}

impl Root {
    /// Where the chain of hashes begins.
    fn hash(self) -> u64 {
        match self {
            Self::Shared(None) => fold(0, 0),
            Self::Shared(Some(salt)) => fold(fold(1, salt as u64), (salt >> 64) as u64),
            Self::Private(seq) => fold(2, seq.0),
        }
    }
}

/// Index of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeId(u32);

/// What a node hangs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parent {
    Root(Root),
    Node(NodeId),
}

#[derive(Debug)]
struct Node {
    parent: Parent,
    hash: u64,
    children: u32,
    /// Cursors that stand here.
    pins: u32,
    blocks: [Option<BlockId>; 2],
}

/// How far a sequence's own blocks are in the tree. It keeps its node alive, so it must be given back to
/// [`Prefixes::close`].
#[derive(Debug)]
#[must_use = "a cursor that is dropped keeps its node for ever"]
pub struct Cursor {
    root: Root,
    node: Option<NodeId>,
    blocks: u32,
}

impl Cursor {
    /// A cursor before the first block below `root`.
    pub const fn new(root: Root) -> Self {
        Self { root, node: None, blocks: 0 }
    }

    /// Leading blocks that are in the tree.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        self.blocks
    }

    /// The root it is below.
    #[must_use]
    pub const fn root(&self) -> Root {
        self.root
    }

    fn parent(&self) -> Parent {
        self.node.map_or(Parent::Root(self.root), Parent::Node)
    }
}

/// The tree and the blocks in it.
#[derive(Debug)]
pub struct Prefixes {
    geometry: Geometry,
    has: [bool; 2],
    nodes: Vec<Option<Node>>,
    /// Tokens of node `i` at `i * block size`.
    tokens: Vec<TokenId>,
    free: Vec<NodeId>,
    index: HashMap<u64, NodeId>,
    shared: [Shared; 2],
    /// The nodes of the last path that was looked up.
    path: Vec<NodeId>,
    look_ups: u64,
    /// A bug a test has switched on.
    pub(super) skip_window_check: bool,
}

impl Prefixes {
    /// An empty tree with room for every block there is.
    pub(super) fn new(config: &Config, geometry: Geometry) -> Self {
        let [full, sliding] = config.blocks;
        let room = full as usize + sliding as usize;
        Self {
            geometry,
            has: KvGroup::ALL.map(|group| config.has(group)),
            nodes: Vec::with_capacity(room),
            tokens: Vec::with_capacity(room * config.block_size.tokens() as usize),
            free: Vec::with_capacity(room),
            index: HashMap::with_capacity(room),
            shared: KvGroup::ALL.map(|group| Shared::new(config.blocks[group.index()])),
            path: Vec::new(),
            look_ups: 0,
            skip_window_check: false,
        }
    }

    /// The blocks of `group` that are in the tree.
    #[must_use]
    pub const fn shared(&self, group: KvGroup) -> &Shared {
        &self.shared[group.index()]
    }

    /// Prompts looked up so far.
    #[must_use]
    pub const fn look_ups(&self) -> u64 {
        self.look_ups
    }

    /// How many leading blocks of `tokens`, at most `limit`, are there below `root`: all of them in the full group,
    /// and in the sliding group those that the next row sees.
    pub fn find(&mut self, root: Root, tokens: &[TokenId], limit: u32) -> u32 {
        let size = self.geometry.block_size.tokens();
        self.look_ups += 1;
        self.path.clear();
        let (mut parent, mut hash) = (Parent::Root(root), root.hash());
        // Where the unbroken run of sliding blocks begins.
        let (mut run, mut found) = (0, 0);
        for (block, end) in tokens.chunks_exact(size as usize).zip(1..=limit) {
            hash = chain(hash, block);
            let Some(id) = self.child(parent, hash, block) else { break };
            let [full, sliding] = self.node(id).blocks;
            if self.has[KvGroup::Full.index()] && full.is_none() {
                break;
            }
            if sliding.is_none() {
                run = end;
            }
            self.path.push(id);
            if self.skip_window_check
                || !self.has[KvGroup::Sliding.index()]
                || run <= self.geometry.first_needed(KvGroup::Sliding, end * size)
            {
                found = end;
            }
            parent = Parent::Node(id);
        }
        self.path.truncate(found as usize);
        found
    }

    /// Leases the blocks of `group` from logical block `first` on of the path that [`Prefixes::find`] found last.
    pub(super) fn lease(&mut self, group: KvGroup, first: u32, mut to: impl FnMut(Lease)) {
        for &id in &self.path[first as usize..] {
            let node = self.nodes[id.0 as usize].as_ref().expect("it was just found");
            let block = node.blocks[group.index()].expect("find says it is there");
            to(self.shared[group.index()].lease(block));
        }
    }

    /// Moves `cursor` to the end of the path that [`Prefixes::find`] found last.
    pub(super) fn advance_to_found(&mut self, cursor: &mut Cursor) {
        let end = self.path.last().copied();
        cursor.blocks = u32::try_from(self.path.len()).expect("limited when it was found");
        self.step_to(cursor, end);
    }

    /// Moves `cursor` over one more block of tokens, which gets a node if it has none; false, and nothing done, when
    /// it cannot have one: there is no room, or another prefix has the same hash.
    pub(super) fn advance(&mut self, cursor: &mut Cursor, block: &[TokenId]) -> bool {
        let parent = cursor.parent();
        let before = match parent {
            Parent::Root(root) => root.hash(),
            Parent::Node(id) => self.node(id).hash,
        };
        let hash = chain(before, block);
        let node = match self.child(parent, hash, block) {
            Some(id) => id,
            None if self.index.contains_key(&hash) => return false,
            None => match self.add(parent, hash, block) {
                Some(id) => id,
                None => return false,
            },
        };
        cursor.blocks += 1;
        self.step_to(cursor, Some(node));
        true
    }

    /// Whether the node under `cursor` lacks a block of `group`.
    pub(super) fn lacks(&self, cursor: &Cursor, group: KvGroup) -> bool {
        cursor.node.is_some_and(|id| self.node(id).blocks[group.index()].is_none())
    }

    /// Puts `block` of `group`, whose content is that of the node under `cursor`, into the tree.
    pub(super) fn insert(&mut self, cursor: &Cursor, group: KvGroup, block: Block) -> Lease {
        let id = cursor.node.expect("the caller advanced the cursor");
        let node = self.nodes[id.0 as usize].as_mut().expect("a cursor keeps its node");
        let before = node.blocks[group.index()].replace(block.id());
        assert_eq!(before, None, "the caller asked whether a block is lacking");
        self.shared[group.index()].insert(block, id)
    }

    /// Takes back one use of a block.
    pub(super) fn give_back(&mut self, group: KvGroup, lease: Lease) {
        self.shared[group.index()].give_back(lease);
    }

    /// Takes the block of `group` that nobody has used for the longest time out of the tree.
    pub(super) fn evict(&mut self, group: KvGroup) -> Option<Block> {
        let (block, id) = self.shared[group.index()].evict()?;
        let node = self.nodes[id.0 as usize].as_mut().expect("a block in the tree has a node");
        node.blocks[group.index()] = None;
        self.prune(id);
        Some(block)
    }

    /// Ends the use of `cursor`.
    pub fn close(&mut self, mut cursor: Cursor) {
        self.step_to(&mut cursor, None);
    }

    fn step_to(&mut self, cursor: &mut Cursor, node: Option<NodeId>) {
        if let Some(id) = node {
            self.node_mut(id).pins += 1;
        }
        if let Some(id) = std::mem::replace(&mut cursor.node, node) {
            self.node_mut(id).pins -= 1;
            self.prune(id);
        }
    }

    fn child(&self, parent: Parent, hash: u64, block: &[TokenId]) -> Option<NodeId> {
        let id = *self.index.get(&hash)?;
        let at = id.0 as usize * block.len();
        (self.node(id).parent == parent && self.tokens[at..at + block.len()] == *block).then_some(id)
    }

    fn add(&mut self, parent: Parent, hash: u64, block: &[TokenId]) -> Option<NodeId> {
        let node = Node { parent, hash, children: 0, pins: 0, blocks: [None; 2] };
        let id = if let Some(id) = self.free.pop() {
            let at = id.0 as usize * block.len();
            self.tokens[at..at + block.len()].copy_from_slice(block);
            self.nodes[id.0 as usize] = Some(node);
            id
        } else if self.nodes.len() < self.nodes.capacity() {
            let id = NodeId(u32::try_from(self.nodes.len()).expect("as many as there are blocks"));
            self.tokens.extend_from_slice(block);
            self.nodes.push(Some(node));
            id
        } else {
            return None;
        };
        if let Parent::Node(parent) = parent {
            self.node_mut(parent).children += 1;
        }
        self.index.insert(hash, id);
        Some(id)
    }

    /// Removes a node that nothing needs any more, and then its parent likewise.
    fn prune(&mut self, mut id: NodeId) {
        loop {
            let node = self.node(id);
            if node.children > 0 || node.pins > 0 || node.blocks != [None; 2] {
                return;
            }
            let Node { parent, hash, .. } = *node;
            self.nodes[id.0 as usize] = None;
            self.index.remove(&hash);
            self.free.push(id);
            match parent {
                Parent::Root(_) => return,
                Parent::Node(parent) => {
                    self.node_mut(parent).children -= 1;
                    id = parent;
                }
            }
        }
    }

    fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.0 as usize].as_ref().expect("whoever names a node keeps it")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.0 as usize].as_mut().expect("whoever names a node keeps it")
    }

    /// Nodes of the tree.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether the tree has no node.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Checks that nodes, blocks, hashes and counts agree with each other and with the open `cursors`.
    ///
    /// # Panics
    /// When they do not: a bug in this crate.
    pub fn check<'a>(&self, cursors: impl Iterator<Item = &'a Cursor>) {
        let mut children = vec![0; self.nodes.len()];
        let mut pins = vec![0; self.nodes.len()];
        cursors.filter_map(|cursor| cursor.node).for_each(|id| pins[id.0 as usize] += 1);
        let live = (0..).zip(&self.nodes).filter_map(|(id, node)| Some((NodeId(id), node.as_ref()?)));
        let mut nodes = 0;
        let mut blocks = [0; 2];
        for (id, node) in live.clone() {
            nodes += 1;
            assert_eq!(self.index.get(&node.hash), Some(&id), "node {} is not found by its hash", id.0);
            let size = self.geometry.block_size.tokens() as usize;
            let tokens = &self.tokens[id.0 as usize * size..][..size];
            let before = match node.parent {
                Parent::Root(root) => root.hash(),
                Parent::Node(parent) => {
                    children[parent.0 as usize] += 1;
                    self.node(parent).hash
                }
            };
            assert_eq!(node.hash, chain(before, tokens), "node {}: hash", id.0);
            for group in KvGroup::ALL {
                if let Some(block) = node.blocks[group.index()] {
                    blocks[group.index()] += 1;
                    assert_eq!(self.shared(group).owner(block), Some(id), "{group} block {block}");
                }
            }
        }
        for (id, node) in live {
            let at = id.0 as usize;
            assert_eq!((node.children, node.pins), (children[at], pins[at]), "node {at}: counts");
            let needed = node.children + node.pins > 0 || node.blocks != [None; 2];
            assert!(needed, "node {at} is needed by nothing");
        }
        assert_eq!((nodes, nodes + self.free.len()), (self.index.len(), self.nodes.len()), "nodes");
        for group in KvGroup::ALL {
            assert_eq!(self.shared(group).len(), blocks[group.index()], "{group} blocks in the tree");
        }
    }
}

/// The hash of a block behind a prefix with hash `before`.
fn chain(before: u64, block: &[TokenId]) -> u64 {
    let mut hash = fold(before, 3);
    for pair in block.chunks(2) {
        let high = pair.get(1).map_or(u64::from(u32::MAX), |token| token.0.into());
        hash = fold(hash, high << 32 | u64::from(pair[0].0));
    }
    hash
}

/// One round of a multiply-and-fold hash: both halves of the product are kept.
fn fold(hash: u64, value: u64) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let product = u128::from(hash.rotate_left(23) ^ value) * u128::from(ODD);
    (product as u64) ^ (product >> 64) as u64 ^ ODD.rotate_left(32)
}
