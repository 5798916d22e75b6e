//! What this machine has for NVIDIA GPUs, asked at run time: nothing here links against CUDA, and a machine without a
//! driver answers with the piece that is missing.
//!
//! The op set itself is not implemented on CUDA in this version; [`Error::NoKernels`] says so instead of computing
//! anything.

use std::fmt;

use cudarc::driver::result as driver;
use types::Bytes;

/// Why CUDA cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A run-time library that is not installed.
    #[error("{library} is not found ({purpose}); install {package}")]
    LibraryMissing {
        /// File name.
        library: &'static str,
        /// What it is needed for.
        purpose: &'static str,
        /// Where it comes from.
        package: &'static str,
    },
    /// The driver is there and refused.
    #[error("the CUDA driver failed at {call}: {reason}")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's words.
        reason: String,
    },
    /// The driver sees no card.
    #[error("the CUDA driver finds no device; is one assigned to this process (CUDA_VISIBLE_DEVICES)?")]
    NoDevice,
    /// Everything is there, and this version has no GPU kernels.
    #[error("{found} can be used, but this version computes on the CPU only; use --device cpu")]
    NoKernels {
        /// The devices found.
        found: String,
    },
}

/// One card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// The driver's name for it.
    pub name: String,
    /// Memory in all.
    pub memory: Bytes,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The cards this process may use.
    pub cards: Vec<Card>,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, card) in self.cards.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{} ({})", card.name, card.memory)?;
        }
        Ok(())
    }
}

/// Looks for the libraries and cards.
///
/// # Errors
/// The first piece that is missing, and where to get it.
pub fn probe() -> Result<Found, Error> {
    // SAFETY: the four calls open a shared library by name and look at the result; no CUDA function is called.
    let present = unsafe {
        [
            cudarc::driver::sys::is_culib_present(),
            cudarc::nvrtc::sys::is_culib_present(),
            cudarc::cublaslt::sys::is_culib_present(),
        ]
    };
    let libraries = [
        ("libcuda.so.1", "the driver", "the NVIDIA driver"),
        ("libnvrtc.so", "compiling kernels", "cuda-nvrtc of the CUDA 13 runtime"),
        ("libcublasLt.so", "matrix products", "libcublas of the CUDA 13 runtime"),
    ];
    for (present, (library, purpose, package)) in present.into_iter().zip(libraries) {
        if !present {
            return Err(Error::LibraryMissing { library, purpose, package });
        }
    }
    cards()
}

fn cards() -> Result<Found, Error> {
    let failed = |call| move |error: driver::DriverError| Error::Driver { call, reason: error.to_string() };
    driver::init().map_err(failed("cuInit"))?;
    let count = driver::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    let card = |ordinal| {
        let device = driver::device::get(ordinal).map_err(failed("cuDeviceGet"))?;
        let name = driver::device::get_name(device).map_err(failed("cuDeviceGetName"))?;
        // SAFETY: `device` was just returned by the driver.
        let memory = unsafe { driver::device::total_mem(device) }.map_err(failed("cuDeviceTotalMem"))?;
        Ok(Card { name, memory: Bytes(memory as u64) })
    };
    let cards = (0..count).map(card).collect::<Result<Vec<_>, Error>>()?;
    if cards.is_empty() {
        return Err(Error::NoDevice);
    }
    Ok(Found { cards })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_is_told_which_library_is_missing() {
        match probe() {
            Ok(found) => assert!(!found.cards.is_empty()),
            Err(error @ Error::LibraryMissing { .. }) => assert!(error.to_string().contains("install")),
            Err(other) => assert!(!other.to_string().is_empty()),
        }
    }
}
