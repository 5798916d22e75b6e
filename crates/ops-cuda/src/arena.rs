//! The activations' memory: one allocation made at start, cut into pieces that return when their tensor is dropped.
//! Work is queued in order, so a piece may be
//! handed out again as soon as it is back; while two branches run beside each other, what comes back waits for their end.

use std::rc::Rc;

use types::Bytes;

use crate::device::Device;
use crate::kernels::Address;

/// Pieces begin at multiples of this.
const ALIGNMENT: u64 = 256;

/// Which parts of a range are free: disjoint, ascending, never adjacent.
#[derive(Debug)]
pub(crate) struct FreeList {
    free: Vec<(u64, u64)>,
    size: u64,
    /// What came back while two branches of work run beside each other: neither may get what the other still uses.
    held: Option<Vec<(u64, u64)>>,
}

impl FreeList {
    pub(crate) fn new(size: u64) -> Self {
        let size = size / ALIGNMENT * ALIGNMENT;
        Self { free: vec![(0, size)], size, held: None }
    }

    /// Offset of `bytes` free bytes, the lowest there are.
    pub(crate) fn take(&mut self, bytes: u64) -> Option<u64> {
        let bytes = rounded(bytes);
        let at = self.free.iter().position(|&(_, size)| size >= bytes)?;
        let (offset, size) = self.free[at];
        if size == bytes {
            self.free.remove(at);
        } else {
            self.free[at] = (offset + bytes, size - bytes);
        }
        Some(offset)
    }

    /// Takes these bytes, if all of them are free.
    pub(crate) fn take_at(&mut self, offset: u64, bytes: u64) -> bool {
        let bytes = rounded(bytes);
        let Some(at) = self.free.iter().position(|&(s, size)| s <= offset && offset + bytes <= s + size)
        else {
            return false;
        };
        let (start, size) = self.free.remove(at);
        let around = [(start, offset - start), (offset + bytes, start + size - offset - bytes)];
        self.free.splice(at..at, around.into_iter().filter(|piece| piece.1 > 0));
        true
    }

    /// Whether nothing is taken.
    pub(crate) fn is_whole(&self) -> bool {
        self.held.is_none() && self.free == [(0, self.size)]
    }

    /// From here on nothing that comes back is given out.
    pub(crate) fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// Whether [`FreeList::hold`] was called and not ended.
    pub(crate) const fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Ends [`FreeList::hold`].
    pub(crate) fn release(&mut self) {
        for (offset, bytes) in self.held.take().unwrap_or_default() {
            self.give_back(offset, bytes);
        }
    }

    /// Takes back what `take` gave.
    pub(crate) fn give_back(&mut self, offset: u64, bytes: u64) {
        if let Some(held) = &mut self.held {
            held.push((offset, bytes));
            return;
        }
        let bytes = rounded(bytes);
        let at = self.free.partition_point(|&(start, _)| start < offset);
        self.free.insert(at, (offset, bytes));
        if at + 1 < self.free.len() && offset + bytes == self.free[at + 1].0 {
            self.free[at].1 += self.free.remove(at + 1).1;
        }
        if at > 0 && self.free[at - 1].0 + self.free[at - 1].1 == offset {
            self.free[at - 1].1 += self.free.remove(at).1;
        }
    }

    /// Bytes in the largest free part, and bytes in all.
    pub(crate) fn room(&self) -> (Bytes, Bytes) {
        (Bytes(self.free.iter().map(|f| f.1).max().unwrap_or(0)), Bytes(self.size))
    }
}

const fn rounded(bytes: u64) -> u64 {
    // Nothing is kept at an address of its own too, so that no two live pieces share one.
    if bytes == 0 { ALIGNMENT } else { bytes.div_ceil(ALIGNMENT) * ALIGNMENT }
}

/// Memory of the arena that returns to it when dropped.
#[derive(Debug)]
pub(crate) struct Piece {
    device: Rc<Device>,
    offset: u64,
    bytes: u64,
}

impl Piece {
    pub(crate) fn new(device: &Rc<Device>, bytes: usize) -> Result<Self, ops::Error> {
        let bytes = bytes as u64;
        let mut free = device.free.borrow_mut();
        let Some(offset) = free.take(bytes) else {
            let (available, all) = free.room();
            let what = format!("a piece of the activations' {all} (made for fewer rows than this step has)");
            return Err(ops::Error::Memory { what, needed: Bytes(bytes), available });
        };
        drop(free);
        Ok(Self { device: Rc::clone(device), offset, bytes })
    }

    /// The piece at `offset`, if it is free.
    pub(crate) fn at(device: &Rc<Device>, offset: u64, bytes: u64) -> Option<Self> {
        let taken = device.free.borrow_mut().take_at(offset, bytes);
        taken.then(|| Self { device: Rc::clone(device), offset, bytes })
    }

    /// Where it lies in the arena, and its size.
    pub(crate) const fn place(&self) -> (u64, u64) {
        (self.offset, self.bytes)
    }

    pub(crate) fn address(&self) -> Address {
        self.device.arena.address() + self.offset
    }

    pub(crate) const fn device(&self) -> &Rc<Device> {
        &self.device
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.device.free.borrow_mut().give_back(self.offset, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_that_return_in_any_order_leave_one_free_range() {
        let mut list = FreeList::new(4096);
        let pieces: Vec<u64> = [100, 256, 257, 0].iter().map(|&b| list.take(b).unwrap()).collect();
        assert_eq!(pieces, [0, 256, 512, 1024]);
        for at in [2, 0, 3, 1] {
            list.give_back(pieces[at], [100, 256, 257, 0][at]);
        }
        assert_eq!(list.free, [(0, 4096)]);
    }

    #[test]
    fn a_chosen_place_is_taken_once() {
        let mut list = FreeList::new(2048);
        assert!(list.take_at(512, 300));
        assert!(!list.take_at(768, 10));
        assert_eq!(list.free, [(0, 512), (1024, 1024)]);
        list.give_back(512, 300);
        assert!(list.is_whole());
    }

    #[test]
    fn what_comes_back_while_branches_run_is_given_out_after_them() {
        let mut list = FreeList::new(512);
        assert_eq!(list.take(256), Some(0));
        list.hold();
        list.give_back(0, 256);
        assert_eq!(list.take(512), None);
        assert!(!list.is_whole());
        list.release();
        assert_eq!(list.take(512), Some(0));
    }

    #[test]
    fn a_full_arena_gives_nothing() {
        let mut list = FreeList::new(512);
        assert_eq!(list.take(512), Some(0));
        assert_eq!(list.take(1), None);
        assert_eq!(list.room(), (Bytes(0), Bytes(512)));
    }
}
