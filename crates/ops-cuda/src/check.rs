//! Compiling what a model needs for a card that need not be there, and reading what became of it: registers, shared
//! memory, and what went to local memory.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use types::DType;

use crate::attention::heads_together;
use crate::kernels::Source;
use crate::nvrtc::{Compiled, compile};
use crate::{Error, arch};

/// What kernels are specialised for: one rank of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KernelShape {
    /// Compute dtype.
    pub dtype: DType,
    /// D
    pub head_dim: usize,
    /// Q of the rank.
    pub query_heads: usize,
    /// K of the rank; divides Q.
    pub kv_heads: usize,
}

/// One compiled kernel file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramReport {
    /// The kernel file.
    pub file: &'static str,
    /// The constants it was compiled with.
    pub defines: Vec<String>,
    /// The target.
    pub arch: String,
    /// How long the compiler took.
    pub elapsed: Duration,
    /// Size of the machine code.
    pub cubin_bytes: usize,
    /// Its kernels, by name.
    pub kernels: Vec<KernelReport>,
}

/// What one kernel takes, in ptxas' words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelReport {
    /// Its name.
    pub name: String,
    /// Of each thread.
    pub registers: u32,
    /// Bytes of static shared memory of each block.
    pub shared_bytes: u32,
    /// Bytes of local memory of each thread, spilled values included: arrays indexed at run time, such as those of the
    /// exact sine of large angles.
    pub stack_bytes: u32,
    /// Bytes each thread spills to local memory, stores and loads.
    pub spill_bytes: u32,
}

impl KernelReport {
    /// Whether it has more live values than registers: each of them goes through memory.
    #[must_use]
    pub const fn spills(&self) -> bool {
        self.spill_bytes > 0
    }
}

/// Every kernel file that a rank of this shape compiles, those of groups with a card for each rank included.
#[must_use]
pub fn sources(shape: &KernelShape) -> Vec<Source> {
    let mut sources = Source::common(shape.dtype);
    sources.extend([attention_source(shape), Source::dummy(shape.dtype), Source::peer(shape.dtype)]);
    sources
}

/// The attention of a rank of this shape.
pub(crate) fn attention_source(shape: &KernelShape) -> Source {
    let KernelShape { dtype, head_dim, query_heads, kv_heads } = *shape;
    let (head_dim, group) = heads_together(head_dim, query_heads, kv_heads);
    Source::attention(dtype, head_dim, group)
}

/// Compiles `sources` for `arch` (`sm_90a`) on all cores, in no cache.
///
/// # Errors
/// [`Error::Arch`] for a target that kernels are not written for; [`Error::LibraryMissing`] without libnvrtc; the first
/// [`Error::Compile`].
pub fn check(sources: &[Source], arch: &str) -> Result<Vec<ProgramReport>, Error> {
    arch::known(arch)?;
    let program = |source: &Source| {
        let started = Instant::now();
        let Compiled { cubin, log } = compile(source, arch)?;
        Ok(ProgramReport {
            file: source.file(),
            defines: source.defines().to_vec(),
            arch: arch.to_owned(),
            elapsed: started.elapsed(),
            cubin_bytes: cubin.len(),
            kernels: kernels(&log),
        })
    };
    in_parallel(sources, program)
}

/// `work` on every item, on as many threads as there are cores; results in order, or the first error.
pub(crate) fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, Error> + Sync,
) -> Result<Vec<R>, Error> {
    let threads = available_parallelism().map_or(1, NonZero::get).min(items.len());
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            match items.get(at) {
                Some(item) => done.push((at, work(item))),
                None => return done,
            }
        }
    };
    let mut results: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        running
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
            .collect()
    });
    results.sort_by_key(|(at, _)| *at);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Takes ptxas' report apart:
/// `Compiling entry function 'f' for 'sm_90a'`, then lines with `bytes stack frame`, `bytes spill`, `Used 8 registers`.
fn kernels(log: &str) -> Vec<KernelReport> {
    let mut kernels: Vec<KernelReport> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or(rest).to_owned();
            kernels.push(KernelReport { name, ..KernelReport::default() });
            continue;
        }
        let Some(kernel) = kernels.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            kernel.stack_bytes = number_before(line, "bytes stack frame");
            kernel.spill_bytes =
                number_before(line, "bytes spill stores") + number_before(line, "bytes spill loads");
        } else if line.contains("registers") {
            kernel.registers = number_before(line, "registers");
            kernel.shared_bytes = number_before(line, "bytes smem");
        }
    }
    kernels.sort_by(|a, b| a.name.cmp(&b.name));
    kernels
}

/// The number in front of `unit`; 0 when the line has none.
fn number_before(line: &str, unit: &str) -> u32 {
    let Some((before, _)) = line.split_once(unit) else { return 0 };
    before.trim_end().rsplit([' ', ',']).next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'norm_rows' for 'sm_90a'
ptxas info    : Function properties for norm_rows
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 132 bytes smem
ptxas info    : Compile time = 3.1 ms
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
";

    #[test]
    fn a_report_is_read_kernel_by_kernel() {
        let [attend, norm] = kernels(LOG).try_into().expect("two kernels");
        assert_eq!((attend.name.as_str(), attend.registers, attend.shared_bytes), ("attend", 255, 0));
        assert_eq!((attend.stack_bytes, attend.spill_bytes), (16, 12));
        assert_eq!((norm.name.as_str(), norm.registers, norm.shared_bytes), ("norm_rows", 32, 132));
        assert!(attend.spills() && !norm.spills());
    }

    #[test]
    fn work_in_parallel_keeps_its_order_and_its_first_error() {
        let items: Vec<u32> = (0..100).collect();
        assert_eq!(in_parallel(&items, |&i| Ok(2 * i)), Ok(items.iter().map(|i| 2 * i).collect()));
        let failed = in_parallel(&items, |&i| if i > 40 { Err(Error::NotAlone { ranks: i }) } else { Ok(i) });
        assert_eq!(failed, Err(Error::NotAlone { ranks: 41 }));
    }
}
