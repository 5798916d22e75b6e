//! What this machine has for NVIDIA GPUs, asked at run time.

use std::fmt;

use cudarc::driver::result as driver;
use types::Bytes;

use crate::Error;

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
    // SAFETY: the calls open a shared library by name and look at the result; no CUDA function is called.
    let present =
        unsafe { [cudarc::driver::sys::is_culib_present(), cudarc::nvrtc::sys::is_culib_present()] };
    let libraries = [
        ("libcuda.so.1", "the driver", "the NVIDIA driver"),
        ("libnvrtc.so", "compiling kernels", "cuda-nvrtc of the CUDA 13 runtime"),
    ];
    for (present, (library, purpose, package)) in present.into_iter().zip(libraries) {
        if !present {
            return Err(Error::LibraryMissing { library, purpose, package });
        }
    }
    cards()
}

fn cards() -> Result<Found, Error> {
    let failed = Error::driver;
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
