//! A rank's threads.

use ops::Error;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Below this many multiply-adds a piece of work is done where it is: waking a thread costs more.
const PARALLEL_WORK_MIN: usize = 1 << 16;

/// The threads one rank computes with. With one thread nothing is ever handed over.
pub(crate) struct Threads {
    pool: Option<ThreadPool>,
    count: usize,
}

impl Threads {
    /// `count` threads; the calling thread is one of them when it is not already part of another pool, which spares
    /// a hand-over at every operation.
    pub(crate) fn new(count: usize) -> Result<Self, Error> {
        if count <= 1 {
            return Ok(Self::single());
        }
        let named = || ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("ops-{i}"));
        let pool = named().use_current_thread().build().or_else(|_| named().build());
        let pool = pool.map_err(|e| Error::Device { op: "threads", reason: e.to_string() })?;
        Ok(Self { pool: Some(pool), count })
    }

    /// The calling thread alone.
    pub(crate) const fn single() -> Self {
        Self { pool: None, count: 1 }
    }

    /// How many threads work.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Runs `f(first, chunk)` over pieces of `out`, each `grain` elements or a multiple of it, in parallel when
    /// `work` multiply-adds are worth it; `first` is the piece's offset in `out`.
    pub(crate) fn split<F>(&self, out: &mut [f32], grain: usize, work: usize, f: F)
    where
        F: Fn(usize, &mut [f32]) + Sync + Send,
    {
        match &self.pool {
            Some(pool) if work >= PARALLEL_WORK_MIN && out.len() > grain => {
                let pieces = out.len().div_ceil(grain);
                let each = pieces.div_ceil(self.count) * grain;
                pool.install(|| {
                    out.par_chunks_mut(each).enumerate().for_each(|(i, chunk)| f(i * each, chunk));
                });
            }
            _ => f(0, out),
        }
    }

    /// Runs `f` on every item, in parallel when `work` multiply-adds are worth it.
    pub(crate) fn each<T, F>(&self, items: &mut [T], work: usize, f: F)
    where
        T: Send,
        F: Fn(&mut T) + Sync + Send,
    {
        match &self.pool {
            Some(pool) if work >= PARALLEL_WORK_MIN && items.len() > 1 => {
                pool.install(|| items.par_iter_mut().for_each(f));
            }
            _ => items.iter_mut().for_each(f),
        }
    }
}
