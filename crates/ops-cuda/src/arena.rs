//! The activations' memory: one allocation made at start, cut into pieces that return when their tensor is dropped.
//! All work is on one stream, so a piece may be handed out again as soon as it is back.

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
}

impl FreeList {
    pub(crate) fn new(size: u64) -> Self {
        let size = size / ALIGNMENT * ALIGNMENT;
        Self { free: vec![(0, size)], size }
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

    /// Takes back what `take` gave.
    pub(crate) fn give_back(&mut self, offset: u64, bytes: u64) {
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
    fn a_full_arena_gives_nothing() {
        let mut list = FreeList::new(512);
        assert_eq!(list.take(512), Some(0));
        assert_eq!(list.take(1), None);
        assert_eq!(list.room(), (Bytes(0), Bytes(512)));
    }
}
