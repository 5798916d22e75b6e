//! The block pool and tables: every block is in exactly one place.

mod support;

use std::collections::BTreeSet;

use engine::KvGroup;
use engine::kv::{Block, Kv, Pool, Table, Tables};
use proptest::prelude::*;
use support::config;

#[test]
fn a_block_returns_to_the_pool_once() {
    let mut pool = Pool::new(KvGroup::Full, 2);
    let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
    assert_ne!(a.id(), b.id());
    assert_eq!(pool.take(), None, "no more than there are");
    pool.give_back(a);
    assert_eq!(pool.free(), 1);
    pool.give_back(b);
    assert_eq!(pool.free(), pool.total());
}

#[test]
#[should_panic(expected = "went to the wrong pool")]
fn a_block_does_not_return_to_another_groups_pool() {
    let block = Pool::new(KvGroup::Full, 1).take().unwrap();
    Pool::new(KvGroup::Sliding, 1).give_back(block);
}

#[test]
fn a_table_parts_with_its_first_blocks_only() {
    let mut pool = Pool::new(KvGroup::Sliding, 4);
    let mut table = Table::default();
    for _ in 0..4 {
        table.push(pool.take().unwrap());
    }
    let ids: Vec<_> = table.ids().collect();
    assert_eq!(table.pop_before(0), None);
    for expected in &ids[..2] {
        assert_eq!(table.pop_before(2).map(|block| block.id()), Some(*expected));
    }
    assert_eq!(table.pop_before(2), None);
    assert_eq!((table.first(), table.end(), table.len()), (2, 4, 2));
    assert_eq!(table.ids().collect::<Vec<_>>(), &ids[2..]);
}

#[test]
fn the_room_is_that_of_the_scarcer_group() {
    let mut kv = Kv::new(&engine::Config { blocks: [5, 3], ..config() });
    let mut tables = Tables::default();
    assert_eq!(kv.room(&tables, 0), 12);
    kv.extend(&mut tables, 6);
    assert_eq!(kv.room(&tables, 6), 6, "two tokens in the block begun, four in the last one");
    kv.release(&mut tables);
    assert_eq!(kv.room(&tables, 0), 12);
}

proptest! {
    #[test]
    fn takes_and_returns_in_any_order_conserve_blocks(
        total in 1_u32..40, moves in prop::collection::vec((any::<bool>(), any::<usize>()), 0..200),
    ) {
        let mut pool = Pool::new(KvGroup::Full, total);
        let mut held: Vec<Block> = Vec::new();
        for (take, pick) in moves {
            if take {
                held.extend(pool.take());
            } else if !held.is_empty() {
                pool.give_back(held.swap_remove(pick % held.len()));
            }
            let ids: BTreeSet<_> = pool.free_blocks().chain(held.iter().map(Block::id)).map(|id| id.0).collect();
            prop_assert_eq!(ids, (0..total).collect::<BTreeSet<_>>());
            prop_assert_eq!(pool.free() as usize + held.len(), total as usize);
        }
    }
}
