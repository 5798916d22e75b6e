//! What this machine has for NVIDIA GPUs, asked at run time.

use std::fmt;

use cudarc::driver::result as driver;
use types::Bytes;

use crate::libraries::Needed;
use crate::nvrtc::version;
use crate::{Error, arch};

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
    [Needed::Driver, Needed::Nvrtc].into_iter().try_for_each(Needed::require)?;
    cards()
}

fn cards() -> Result<Found, Error> {
    let failed = Error::driver;
    driver::init().map_err(failed("cuInit"))?;
    arch::driver(driver_version()?, version()?)?;
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

/// The newest CUDA version the driver supports: 1000 · major + 10 · minor.
fn driver_version() -> Result<i32, Error> {
    let mut version = 0;
    // SAFETY: the pointer is valid for the call, and the library was found.
    let status = unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version) };
    status.result().map_err(Error::driver("cuDriverGetVersion"))?;
    Ok(version)
}
