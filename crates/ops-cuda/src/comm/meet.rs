//! How ranks find out whether their cards see each other's memory, and open it. All of them do, or none.

use std::collections::hash_map::RandomState;
use std::ffi::c_int;
use std::hash::BuildHasher;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::{process, ptr};

use collectives::Collective;
use cudarc::driver::result;
use cudarc::driver::sys::{
    CUdevice, CUipcMem_flags, CUipcMemHandle, CUresult, cuCtxEnablePeerAccess, cuDeviceCanAccessPeer,
    cuDevicePrimaryCtxRelease_v2, cuDevicePrimaryCtxRetain, cuIpcGetMemHandle, cuIpcOpenMemHandle_v2,
};

use super::peer::{Mapped, Peer, Slots, Terms};
use super::{machine, told};
use crate::kernels::{Address, PEERS_MAX};
use crate::{CudaBackend, Error};

/// Bytes of the words in which a rank says why it cannot.
const REASON_BYTES: usize = 200;
const HANDLE_BYTES: usize = 64;

/// What a rank tells the others of itself.
#[derive(Debug, Clone)]
struct Offer {
    machine: [u8; 16],
    card: [u8; 16],
    /// Tells processes of a machine apart, whatever number space they have.
    process: u64,
    address: Address,
    handle: [u8; HANDLE_BYTES],
    /// 0: it wants none.
    bytes_max: u64,
    multiprocessors: u32,
}

impl Offer {
    fn encode(&self) -> Vec<u8> {
        let Self { machine, card, process, address, handle, bytes_max, multiprocessors } = self;
        let numbers = [process.to_le_bytes(), address.to_le_bytes(), bytes_max.to_le_bytes()].concat();
        [&machine[..], card, &numbers, &multiprocessors.to_le_bytes(), handle].concat()
    }

    /// `None` of bytes that [`Offer::encode`] has not made.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (machine, rest) = bytes.split_first_chunk()?;
        let (card, rest) = rest.split_first_chunk()?;
        let (process, rest) = rest.split_first_chunk()?;
        let (address, rest) = rest.split_first_chunk()?;
        let (bytes_max, rest) = rest.split_first_chunk()?;
        let (multiprocessors, rest) = rest.split_first_chunk()?;
        Some(Self {
            machine: *machine,
            card: *card,
            process: u64::from_le_bytes(*process),
            address: u64::from_le_bytes(*address),
            handle: rest.try_into().ok()?,
            bytes_max: u64::from_le_bytes(*bytes_max),
            multiprocessors: u32::from_le_bytes(*multiprocessors),
        })
    }
}

/// What this process calls itself.
fn process() -> u64 {
    static OWN: OnceLock<u64> = OnceLock::new();
    *OWN.get_or_init(|| RandomState::new().hash_one(process::id()))
}

/// The line between cards that see each other's memory, for sums of up to `bytes_max`; `None`, with a line in the log,
/// when any rank cannot take part. All ranks call it together.
///
/// # Errors
/// When a rank is lost or late, or its kernels do not compile.
pub(super) fn meet<C: Collective<[f32]>>(
    backend: &CudaBackend,
    line: &mut C,
    bytes_max: usize,
) -> Result<Option<Peer>, Error> {
    let (rank, ranks) = (line.rank().as_usize(), line.rank().size().as_usize());
    if ranks == 1 {
        return Ok(None);
    }
    let device = backend.device();
    device.bind()?;
    let wanted = if ranks <= PEERS_MAX { bytes_max } else { 0 };
    let slots = (wanted > 0).then(|| Slots::new(device, ranks, wanted)).transpose();
    let own = match &slots {
        Ok(Some(slots)) => offer(backend, Some(slots.address()), wanted),
        Ok(None) => offer(backend, None, 0),
        Err(error) => Err(error.clone()),
    };
    // A rank that cannot make an offer still has to say something.
    let failed = own.as_ref().err().map(ToString::to_string);
    let own = own.or_else(|_| offer(backend, None, 0))?;
    let told_offers = told(line, &own.encode())?;
    let offers: Option<Vec<Offer>> = told_offers.iter().map(|bytes| Offer::decode(bytes)).collect();
    let opened = match (slots, offers, failed) {
        (_, _, Some(reason)) => Err(reason),
        (Ok(Some(slots)), Some(offers), None) => {
            open(backend, rank, &offers).map(|mapped| (slots, mapped, offers))
        }
        (Ok(None), _, None) if ranks > PEERS_MAX => {
            Err(format!("a group of {ranks} ranks, {PEERS_MAX} at most"))
        }
        (_, _, None) => Err("it is turned off here".to_owned()),
    };
    let mut words = opened.as_ref().err().cloned().unwrap_or_default().into_bytes();
    words.resize(REASON_BYTES, 0);
    let reasons = told(line, &words)?;
    let refused = reasons.iter().position(|reason| reason.iter().any(|&byte| byte != 0));
    if let Some(refused) = refused {
        if line.rank().is_leader() {
            let reason = String::from_utf8_lossy(&reasons[refused]).trim_end_matches('\0').to_owned();
            tracing::warn!(
                "cards do not sum through each other's memory, NCCL sums everything: rank {refused}: {reason}"
            );
        }
        return Ok(None);
    }
    let Ok((slots, mapped, offers)) = opened else { return Ok(None) };
    let least = offers.iter().map(|offer| offer.bytes_max).min().unwrap_or(0);
    let terms = Terms {
        rank,
        ranks,
        bytes_max: usize::try_from(least).unwrap_or(usize::MAX),
        blocks_max: offers.iter().map(|offer| offer.multiprocessors).min().unwrap_or(1),
    };
    tracing::info!(ranks, bytes = terms.bytes_max, "cards sum small tensors through each other's memory");
    Peer::new(device, backend.storage(), slots, mapped, terms).map(Some)
}

fn offer(backend: &CudaBackend, slots: Option<Address>, bytes_max: usize) -> Result<Offer, Error> {
    let device = backend.device();
    let mut handle = MaybeUninit::<CUipcMemHandle>::zeroed();
    if let Some(address) = slots {
        // SAFETY: the address is that of a live allocation of the current context, the pointer valid for the call.
        unsafe { cuIpcGetMemHandle(handle.as_mut_ptr(), address) }
            .result()
            .map_err(Error::driver("cuIpcGetMemHandle"))?;
    }
    Ok(Offer {
        machine: machine(),
        card: device.identity()?,
        process: process(),
        address: slots.unwrap_or(0),
        // SAFETY: zeroed above, and any bytes are a handle.
        handle: unsafe { handle.assume_init() }.reserved.map(std::ffi::c_char::cast_unsigned),
        bytes_max: bytes_max as u64,
        multiprocessors: device.multiprocessors,
    })
}

/// The other ranks' slots, or why they are out of reach.
fn open(backend: &CudaBackend, rank: usize, offers: &[Offer]) -> Result<Vec<Option<Mapped>>, String> {
    let own = &offers[rank];
    let mut mapped = Vec::with_capacity(offers.len());
    for (other, offer) in offers.iter().enumerate() {
        // A rank without slots says itself why.
        if other == rank || offer.bytes_max == 0 {
            mapped.push(None);
            continue;
        }
        if offer.machine != own.machine {
            return Err(format!("rank {other} is on another machine"));
        }
        let reach = reach(backend, own, offer);
        mapped
            .push(Some(reach.map_err(|reason| format!("no access to the card of rank {other}: {reason}"))?));
    }
    Ok(mapped)
}

fn reach(backend: &CudaBackend, own: &Offer, offer: &Offer) -> Result<Mapped, String> {
    let driver = |call| move |error| Error::driver(call)(error).to_string();
    let device = visible(offer.card)?.ok_or("this process does not see it (CUDA_VISIBLE_DEVICES)")?;
    let mut can: c_int = 0;
    // SAFETY: both devices are the driver's, the pointer valid for the call.
    unsafe { cuDeviceCanAccessPeer(&raw mut can, backend.device().context().cu_device(), device) }
        .result()
        .map_err(driver("cuDeviceCanAccessPeer"))?;
    if can == 0 {
        return Err("the driver offers no peer access between the two".to_owned());
    }
    if offer.process == own.process {
        let mut context = ptr::null_mut();
        // SAFETY: the pointer is valid for the call; the retained context is released below, and kept by the rank that it
        // belongs to, which is in this process.
        unsafe { cuDevicePrimaryCtxRetain(&raw mut context, device) }
            .result()
            .map_err(driver("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: the context was just retained.
        let enabled = unsafe { cuCtxEnablePeerAccess(context, 0) };
        // SAFETY: retained above.
        let _ = unsafe { cuDevicePrimaryCtxRelease_v2(device) };
        if enabled != CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED {
            enabled.result().map_err(driver("cuCtxEnablePeerAccess"))?;
        }
        return Ok(Mapped::Same(offer.address));
    }
    let handle = CUipcMemHandle { reserved: offer.handle.map(u8::cast_signed) };
    let mut address = 0;
    let flags = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
    // SAFETY: the handle was made by the other process of its live allocation; the pointer is valid for the call.
    unsafe { cuIpcOpenMemHandle_v2(&raw mut address, handle, flags) }
        .result()
        .map_err(driver("cuIpcOpenMemHandle"))?;
    Ok(Mapped::Opened(address))
}

/// The device of that identity, if this process sees it.
fn visible(card: [u8; 16]) -> Result<Option<CUdevice>, String> {
    let driver = |call| move |error| Error::driver(call)(error).to_string();
    for ordinal in 0..result::device::get_count().map_err(driver("cuDeviceGetCount"))? {
        let device = result::device::get(ordinal).map_err(driver("cuDeviceGet"))?;
        let uuid = result::device::get_uuid(device).map_err(driver("cuDeviceGetUuid"))?;
        if uuid.bytes.map(std::ffi::c_char::cast_unsigned) == card {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_understood_as_it_was_made() {
        let offer = Offer {
            machine: [1; 16],
            card: [2; 16],
            process: process(),
            address: 3 << 40,
            handle: std::array::from_fn(|i| i as u8),
            bytes_max: 1 << 20,
            multiprocessors: 132,
        };
        let decoded = Offer::decode(&offer.encode()).expect("its own bytes");
        assert_eq!(format!("{decoded:?}"), format!("{offer:?}"));
        assert!(Offer::decode(&offer.encode()[1..]).is_none());
    }
}
