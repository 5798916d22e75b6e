//! Weights that come in parts: read by other threads into page-locked memory, copied to the card while the next part is
//! read.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use cudarc::driver::result;
use ops::{Error, HostBytes, HostMemory, HostPart, WeightParts};

use crate::backend::CudaBackend;
use crate::graph::Event;
use crate::memory::Pinned;
use crate::tensor::Weight;

/// Bytes of a part: copied in about a millisecond, read by many threads in pieces.
const PART_BYTES: usize = 64 << 20;
/// One is read into, one is handed over, one is being copied.
const PARTS: usize = 3;
const OP: &str = "weight parts";

/// The page-locked memory that parts are read into.
struct Pool {
    idle: Mutex<Vec<Pinned>>,
    returned: Condvar,
}

impl Pool {
    fn new() -> Result<Self, crate::Error> {
        let idle = (0..PARTS).map(|_| Pinned::new(PART_BYTES)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { idle: Mutex::new(idle), returned: Condvar::new() })
    }
}

/// A part's memory, on loan.
struct Lent {
    /// There until it is dropped.
    memory: Option<Pinned>,
    pool: Arc<Pool>,
}

impl HostBytes for Lent {
    fn as_mut_slice(&mut self) -> &mut [u8] {
        self.memory.as_mut().map_or(&mut [], Pinned::as_mut_slice)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
            self.pool.returned.notify_one();
        }
    }
}

/// The pool as readers know it.
struct Lender(Arc<Pool>);

impl HostMemory for Lender {
    fn take(&self) -> Box<dyn HostBytes> {
        let idle = self.0.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.returned.wait_while(idle, |idle| idle.is_empty());
        let memory = waited.unwrap_or_else(PoisonError::into_inner).pop();
        Box::new(Lent { memory, pool: Arc::clone(&self.0) })
    }
}

/// The weight that is being loaded.
#[derive(Debug)]
struct Open {
    weight: Weight,
    /// Bytes that have come.
    written: u64,
}

/// What a backend knows of weights that come in parts.
#[derive(Default)]
pub(crate) struct Loading {
    open: Option<Open>,
    copying: Option<Copying>,
}

impl std::fmt::Debug for Loading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loading").field("open", &self.open).finish_non_exhaustive()
    }
}

/// A part on its way to the card: its memory may not be used again before `passed`.
struct Copying {
    passed: Event,
    _memory: Box<dyn HostBytes>,
}

impl Drop for Copying {
    fn drop(&mut self) {
        // The card reads the memory until then; a card that failed reads nothing any more.
        let _ = self.passed.wait();
    }
}

fn refused(detail: String) -> Error {
    Error::Shape { op: OP, detail }
}

impl CudaBackend {
    fn loaded(&mut self) -> Result<Weight, Error> {
        let Some(Open { weight, written }) = self.loading.open.take() else {
            return Err(refused("no weight was begun".to_owned()));
        };
        if written != weight.bytes() {
            let detail = format!("{written} of {} bytes of {:?} came", weight.bytes(), weight.dims());
            return Err(refused(detail));
        }
        Ok(weight)
    }
}

impl WeightParts for CudaBackend {
    type Weight = Weight;
    type Experts = Weight;

    fn part_bytes_max(&self) -> usize {
        PART_BYTES
    }

    fn memory(&mut self) -> Result<Arc<dyn HostMemory>, Error> {
        self.device().bind()?;
        Ok(Arc::new(Lender(Arc::new(Pool::new()?))))
    }

    fn begin(&mut self, shape: &[usize]) -> Result<(), Error> {
        self.device().bind()?;
        let weight = Weight::reserve(self.device(), shape, self.storage())?;
        self.loading.open = Some(Open { weight, written: 0 });
        Ok(())
    }

    fn write(&mut self, mut part: HostPart) -> Result<(), Error> {
        let (stream, each) = (self.device().stream(), self.storage().bytes());
        let Some(open) = &mut self.loading.open else {
            return Err(refused("no weight was begun".to_owned()));
        };
        let (at, bytes) = ((part.first * each) as u64, part.bytes as u64);
        let whole = open.weight.bytes();
        let lent = part.memory.as_mut_slice();
        if at + bytes > whole || part.bytes > lent.len() {
            let room = lent.len();
            return Err(refused(format!("bytes {at} to {} of {whole}, in {room} of memory", at + bytes)));
        }
        // SAFETY: the weight has `whole` bytes from its address on; the memory stays lent until `passed` has.
        unsafe { result::memcpy_htod_async(open.weight.address() + at, &lent[..part.bytes], stream) }
            .map_err(crate::Error::driver("cuMemcpyHtoDAsync"))?;
        open.written += bytes;
        let passed = Event::new()?;
        passed.record(stream)?;
        // The part before has surely been copied when this one has; waiting for it keeps at most two here.
        self.loading.copying = Some(Copying { passed, _memory: part.memory });
        Ok(())
    }

    fn end_weight(&mut self) -> Result<Weight, Error> {
        self.loaded()
    }

    fn end_experts(&mut self) -> Result<Weight, Error> {
        let weight = self.loaded()?;
        weight.dims3("experts")?;
        Ok(weight)
    }

    fn finish(&mut self) -> Result<(), Error> {
        self.loading.copying = None;
        self.device().unchain();
        self.synchronize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_dropped_is_lent_again() {
        let pool = Arc::new(Pool { idle: Mutex::default(), returned: Condvar::new() });
        assert_eq!(pool.idle.lock().unwrap().len(), 0);
        // Nothing in it: no driver is needed to see it go round.
        drop(Lent { memory: None, pool: Arc::clone(&pool) });
        assert_eq!(pool.idle.lock().unwrap().len(), 0, "what was never there does not come back");
    }
}
