//! Device and pinned host memory that is freed when dropped.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::rc::Rc;
use std::slice;
use std::sync::atomic::AtomicU32;

use cudarc::driver::result;
use types::Bytes;

use crate::Error;
use crate::kernels::Address;

/// Page-locked and mapped for all contexts: `CU_MEMHOSTALLOC_PORTABLE`.
const PORTABLE: u32 = 1;
/// What stays begins at multiples of this, as allocations do.
pub(crate) const ALIGNMENT: u64 = 256;

/// Memory of the current context's device that nothing has taken.
pub(crate) fn free() -> Result<Bytes, Error> {
    let (free, _) = result::mem_get_info().map_err(Error::driver("cuMemGetInfo"))?;
    Ok(Bytes(free as u64))
}

/// One allocation on the device. The context must be current on the thread that makes and drops it.
#[derive(Debug)]
pub(crate) struct DeviceBuffer {
    address: Address,
    bytes: u64,
}

impl DeviceBuffer {
    pub(crate) fn new(what: &'static str, bytes: usize) -> Result<Self, Error> {
        let (available, _) = result::mem_get_info().map_err(Error::driver("cuMemGetInfo"))?;
        if bytes > available {
            return Err(Error::Memory {
                what,
                needed: Bytes(bytes as u64),
                available: Bytes(available as u64),
            });
        }
        // SAFETY: the memory is owned by this value, and nothing reads it before it was written.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|_| Error::Memory {
            what,
            needed: Bytes(bytes as u64),
            available: Bytes(available as u64),
        })?;
        Ok(Self { address, bytes: bytes as u64 })
    }

    pub(crate) const fn address(&self) -> Address {
        self.address
    }

    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by this value and freed only here; the driver waits for work that still uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// What stays on the card until the end (weights, keys and values), taken at boot as one allocation and cut from front
/// to back.
#[derive(Debug)]
pub(crate) struct Residence {
    whole: Rc<DeviceBuffer>,
    taken: u64,
}

impl Residence {
    /// Takes `bytes`.
    pub(crate) fn new(bytes: Bytes) -> Result<Self, Error> {
        let bytes = usize::try_from(bytes.0).unwrap_or(usize::MAX);
        let whole = Rc::new(DeviceBuffer::new("weights, keys and values", bytes)?);
        Ok(Self { whole, taken: 0 })
    }

    /// The next `bytes` of it.
    pub(crate) fn take(&mut self, what: &'static str, bytes: usize) -> Result<Resident, Error> {
        let (needed, available) = (bytes as u64, self.whole.bytes() - self.taken);
        if needed > available {
            // The planner works out what stays from the same shapes.
            return Err(Error::Memory { what, needed: Bytes(needed), available: Bytes(available) });
        }
        let address = self.whole.address() + self.taken;
        self.taken = (self.taken + needed).next_multiple_of(ALIGNMENT).min(self.whole.bytes());
        Ok(Resident { address, bytes: needed, _owner: Owner::Shared { _whole: Rc::clone(&self.whole) } })
    }
}

/// Memory of something that stays: a part of the [`Residence`], or an allocation of its own where none was made.
#[derive(Debug)]
pub(crate) struct Resident {
    address: Address,
    bytes: u64,
    _owner: Owner,
}

/// Whose memory it is: held, so that it is not given back before.
#[derive(Debug)]
enum Owner {
    Shared { _whole: Rc<DeviceBuffer> },
    Own { _buffer: DeviceBuffer },
}

impl Resident {
    /// An allocation of its own.
    pub(crate) fn alone(what: &'static str, bytes: usize) -> Result<Self, Error> {
        let buffer = DeviceBuffer::new(what, bytes)?;
        Ok(Self { address: buffer.address(), bytes: buffer.bytes(), _owner: Owner::Own { _buffer: buffer } })
    }

    pub(crate) const fn address(&self) -> Address {
        self.address
    }

    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Page-locked host memory, which copies reach at full speed.
#[derive(Debug)]
pub(crate) struct Pinned {
    start: NonNull<u8>,
    bytes: usize,
    /// What was too small. Giving it back would wait for every card of the process, and one of them may be waiting for
    /// what this rank has yet to queue.
    outgrown: Option<Box<Self>>,
}

// SAFETY: the memory is the value's own, and page-locked memory may be read, written and freed by any thread.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(crate) fn new(bytes: usize) -> Result<Self, Error> {
        let bytes = bytes.max(1);
        // SAFETY: the memory is owned by this value and zeroed below before anything reads it.
        let start =
            unsafe { result::malloc_host(bytes, PORTABLE) }.map_err(Error::driver("cuMemHostAlloc"))?;
        let start = NonNull::new(start.cast::<u8>())
            .ok_or_else(|| Error::Driver { call: "cuMemHostAlloc", reason: "no address".to_owned() })?;
        // SAFETY: `bytes` bytes were just allocated there.
        unsafe { start.as_ptr().write_bytes(0, bytes) };
        Ok(Self { start, bytes, outgrown: None })
    }

    /// Makes room for `bytes`; what was inside is lost when it grows. Sizes double, so what was outgrown is less than what
    /// is there.
    pub(crate) fn reserve(&mut self, bytes: usize) -> Result<(), Error> {
        if bytes > self.bytes {
            let outgrown = std::mem::replace(self, Self::new(bytes.next_power_of_two())?);
            self.outgrown = Some(Box::new(outgrown));
        }
        Ok(())
    }

    /// The first `bytes` bytes, for a copy that is queued: `self` is not read before it is done.
    #[expect(clippy::mut_from_ref, reason = "the caller says when the memory is written")]
    pub(crate) unsafe fn unread(&self, bytes: usize) -> &mut [u8] {
        // SAFETY: allocated with at least this size; the caller lets nobody read it until it is written.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), bytes.min(self.bytes)) }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with this size, initialised, and borrowed with `self`.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// The host's address, which is also the card's: memory allocated through a context with unified addresses is mapped.
    pub(crate) fn address(&self) -> Address {
        self.start.as_ptr() as Address
    }

    /// The word at number `index`, which the card may write at any time; such memory is never taken as a slice.
    pub(crate) fn word(&self, index: usize) -> &AtomicU32 {
        assert!((index + 1) * size_of::<u32>() <= self.bytes, "a word of the allocation");
        // SAFETY: in the allocation, aligned because page-locked memory begins at a page, and borrowed with `self`.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().cast::<u32>().add(index)) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this size, initialised, and borrowed with `self`.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by this value and freed only here.
        let _ = unsafe { result::free_host(self.start.as_ptr().cast::<c_void>()) };
    }
}
