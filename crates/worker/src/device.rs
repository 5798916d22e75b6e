//! Which backend a rank runs on.

use std::num::NonZero;
use std::thread::available_parallelism;

use types::{Bytes, TpSize};

use crate::{Device, Error};

/// Decides for the CPU, or says why CUDA cannot be used.
///
/// # Errors
/// [`Error::Cuda`] when CUDA was asked for.
pub(crate) fn choose(device: Device) -> Result<(), Error> {
    match device {
        Device::Cpu => Ok(()),
        Device::Auto => {
            if let Ok(found) = ops_cuda::probe() {
                tracing::info!(%found, "a GPU is there, and this version computes on the CPU only");
            }
            Ok(())
        }
        Device::Cuda => {
            let found = ops_cuda::probe().map_err(Error::Cuda)?;
            Err(Error::Cuda(ops_cuda::Error::NoKernels { found: found.to_string() }))
        }
    }
}

/// Memory this machine can still give out, or `None` where it does not say.
pub(crate) fn memory_available() -> Option<Bytes> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kibibytes << 10))
}

/// Threads of one rank: what was asked for, or an equal share of the cores the ranks of this machine have.
pub(crate) fn threads(asked: Option<usize>, ranks: TpSize) -> usize {
    let cores = available_parallelism().map_or(1, NonZero::get);
    asked.unwrap_or(cores / ranks.as_usize()).max(1)
}
