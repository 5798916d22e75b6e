//! Buffers that are used again: a layer makes the same tensors as the one before, so after the first step nothing is asked
//! of the allocator, and no fresh page is touched.
//!
//! Each thread keeps what it dropped. A rank's tensors are made and dropped on the one thread that runs its model.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers of one type that a thread keeps; a layer has fewer alive or waiting at any time.
const KEPT_MAX: usize = 64;

/// Elements of a buffer that may serve any smaller need.
const SMALL: usize = 256;

/// Elements that have a store of dropped buffers on every thread; nobody else's can.
pub trait Element: Copy + 'static {
    /// Runs `work` on this thread's store; `None` when the thread is ending.
    fn store<R>(work: impl FnOnce(&mut Vec<Vec<Self>>) -> R) -> Option<R>;
}

thread_local! {
    static F32: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
    static U32: RefCell<Vec<Vec<u32>>> = const { RefCell::new(Vec::new()) };
}

impl Element for f32 {
    fn store<R>(work: impl FnOnce(&mut Vec<Vec<Self>>) -> R) -> Option<R> {
        F32.try_with(|store| work(&mut store.borrow_mut())).ok()
    }
}

impl Element for u32 {
    fn store<R>(work: impl FnOnce(&mut Vec<Vec<Self>>) -> R) -> Option<R> {
        U32.try_with(|store| work(&mut store.borrow_mut())).ok()
    }
}

/// A vector whose memory is kept for the next one when it is dropped.
#[derive(Debug, PartialEq)]
pub struct Recycled<T: Element>(Vec<T>);

impl<T: Element> Recycled<T> {
    /// Empty, with room for `room` elements.
    pub(crate) fn with_room(room: usize) -> Self {
        let found = T::store(|store| {
            // The smallest that is large enough; far larger ones are left for those who need them.
            let fitting = room..=room.saturating_mul(4).max(SMALL);
            let found = (0..store.len()).filter(|at| fitting.contains(&store[*at].capacity()));
            found.min_by_key(|at| store[*at].capacity()).map(|at| store.remove(at))
        });
        let mut buffer = found.flatten().unwrap_or_default();
        buffer.clear();
        buffer.reserve(room);
        Self(buffer)
    }
}

impl<T: Element> From<Vec<T>> for Recycled<T> {
    fn from(buffer: Vec<T>) -> Self {
        Self(buffer)
    }
}

impl<T: Element> Clone for Recycled<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::with_room(self.0.len());
        copy.0.extend_from_slice(&self.0);
        copy
    }
}

impl<T: Element> Drop for Recycled<T> {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        if buffer.capacity() > 0 {
            // On a thread that is ending there is nobody to keep it for.
            let _ = T::store(|store| {
                if store.capacity() == 0 {
                    store.reserve_exact(KEPT_MAX);
                }
                // The oldest makes room, so that the store follows the sizes in use.
                if store.len() == KEPT_MAX {
                    store.remove(0);
                }
                store.push(buffer);
            });
        }
    }
}

impl<T: Element> Deref for Recycled<T> {
    type Target = Vec<T>;

    fn deref(&self) -> &Vec<T> {
        &self.0
    }
}

impl<T: Element> DerefMut for Recycled<T> {
    fn deref_mut(&mut self) -> &mut Vec<T> {
        &mut self.0
    }
}
