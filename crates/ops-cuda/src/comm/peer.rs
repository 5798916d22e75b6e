//! Sums between cards that see each other's memory, in one launch (`kernels/peer.cu`): every rank writes its part into
//! slots on the other ranks' cards.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::cuIpcCloseMemHandle;
use ops::{Error, Norm};
use types::{Bytes, DType};

use super::watch::{Queued, Watch};
use crate::Tensor;
use crate::device::{Device, Function, Grid, Module};
use crate::kernels::{Address, AllReduceNormParams, AllReduceParams, PEERS_MAX, Params, PeersParams, Source};
use crate::memory::{DeviceBuffer, Pinned};
use crate::tensor::{Weight, size};

/// Bytes of a place, which carries two numbers and their flags.
const PLACE_BYTES: usize = 16;
/// Bytes of numbers in a place.
const CARRIED_BYTES: usize = 8;
/// Slots that calls take in turn.
const SLOTS: usize = 2;
/// What is shared with other processes is mapped in pieces of this size.
const MAPPED_BYTES: usize = 2 << 20;
/// Threads of a block, and the pairs of numbers that each may have: `PEER_THREADS` and the kernels' names.
const THREADS: u32 = 512;
const PAIRS: [u32; 3] = [2, 4, 8];
const WARP: u32 = 32;
/// Pairs of a block of `all_reduce`.
const TILE_PAIRS: u32 = 4 * THREADS;
/// Calls before the flags begin anew and unused places are cleared, for the first time: few, so that every process
/// comes by.
const FIRST_CALL: u32 = (1 << 31) - 32;

/// What NCCL may take of a card for one communicator. Version 2.28 took 386 MiB between two H200s; each rank logs it.
const NCCL_BYTES: Bytes = Bytes(512 << 20);
/// Words of the page-locked memory.
const GIVE_UP: usize = 0;
const BEGUN: usize = 1;
const WAITED_FOR: usize = 2;
const HOST_BYTES: usize = 4096;
/// Words of the card's own memory: calls, blocks that arrived, whether the line is over.
const STATE_WORDS: usize = 3;

/// One rank's memory that the others write to: slots of all ranks, twice.
#[derive(Debug)]
pub(super) struct Slots {
    buffer: DeviceBuffer,
    state: DeviceBuffer,
    host: Pinned,
}

impl Slots {
    /// For sums of up to `bytes` over so many ranks; zeroed.
    pub(super) fn new(device: &Device, ranks: usize, bytes: usize) -> Result<Self, crate::Error> {
        let all = Self::bytes(ranks, bytes);
        let buffer = DeviceBuffer::new("slots for the other ranks' sums", all)?;
        let state = DeviceBuffer::new("the state of sums between cards", STATE_WORDS * size_of::<u32>())?;
        device.zero(buffer.address(), all)?;
        device.upload(state.address(), &[FIRST_CALL, 0, 0])?;
        let host = Pinned::new(HOST_BYTES)?;
        Ok(Self { buffer, state, host })
    }

    fn bytes(ranks: usize, bytes: usize) -> usize {
        let places = SLOTS * ranks * bytes.div_ceil(CARRIED_BYTES) * PLACE_BYTES;
        places.div_ceil(MAPPED_BYTES) * MAPPED_BYTES
    }

    pub(super) const fn address(&self) -> Address {
        self.buffer.address()
    }
}

/// Memory of a card that a line between so many ranks takes: NCCL's, and the slots for sums of up to `one_shot` bytes.
#[must_use]
pub fn line_bytes(ranks: usize, one_shot: Bytes) -> Bytes {
    if ranks < 2 {
        return Bytes(0);
    }
    let slots = match usize::try_from(one_shot.0) {
        Ok(bytes) if bytes > 0 && ranks <= PEERS_MAX => Slots::bytes(ranks, bytes) as u64,
        _ => 0,
    };
    NCCL_BYTES + Bytes(slots)
}

/// Another rank's slots.
#[derive(Debug)]
pub(super) enum Mapped {
    /// Of a rank of this process.
    Same(Address),
    /// Of another process, mapped into this one.
    Opened(Address),
}

impl Mapped {
    const fn address(&self) -> Address {
        match self {
            Self::Same(address) | Self::Opened(address) => *address,
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Self::Opened(address) = *self {
            // SAFETY: opened by whoever made this value, and closed only here; the context outlives the line.
            let _ = unsafe { cuIpcCloseMemHandle(address) };
        }
    }
}

/// What all ranks agreed on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub(super) rank: usize,
    pub(super) ranks: usize,
    /// Bytes of a sum at most.
    pub(super) bytes_max: usize,
    /// Blocks that fit on every rank's card at once.
    pub(super) blocks_max: u32,
}

#[derive(Debug, Clone, Copy)]
struct Functions {
    all_reduce: Function,
    /// For so many [`PAIRS`] a thread.
    all_reduce_norm: [Function; 3],
}

/// This rank's end of the line. All ranks make the same calls in the same order.
#[derive(Debug)]
pub(crate) struct Peer {
    // Freed first to last: what is mapped before the slots.
    mapped: Vec<Option<Mapped>>,
    slots: Slots,
    functions: Functions,
    terms: Terms,
    _module: Module,
    _context: Arc<CudaContext>,
}

impl Peer {
    /// `mapped` are the other ranks' slots, by rank.
    pub(super) fn new(
        device: &Device,
        dtype: DType,
        slots: Slots,
        mapped: Vec<Option<Mapped>>,
        terms: Terms,
    ) -> Result<Self, crate::Error> {
        let module = device.module(&Source::peer(dtype))?;
        let functions = Functions {
            all_reduce: module.function("all_reduce")?,
            all_reduce_norm: [
                module.function("all_reduce_norm2")?,
                module.function("all_reduce_norm4")?,
                module.function("all_reduce_norm8")?,
            ],
        };
        Ok(Self { mapped, slots, functions, terms, _module: module, _context: Arc::clone(device.context()) })
    }

    /// Whether a sum of such tensors goes this way. It depends on what all ranks have in common alone.
    pub(crate) fn takes(&self, data: &Tensor) -> bool {
        data.dtype() == DType::F32
            && data.elements() > 0
            && data.elements().is_multiple_of(2)
            && data.bytes() <= self.terms.bytes_max
    }

    /// Whether a sum of such tensors may end in the residual stream's norm.
    pub(crate) fn takes_rows(&self, data: &Tensor) -> bool {
        self.takes(data)
            && data.width().is_multiple_of(2)
            && data.width() <= (2 * PAIRS[2] * THREADS) as usize
            && data.rows() <= self.terms.blocks_max as usize
    }

    /// Bytes that a sum sends to the others, and gets from them.
    pub(crate) const fn payload(&self, data: &Tensor) -> usize {
        data.bytes() * (self.terms.ranks - 1)
    }

    pub(crate) const fn others(&self) -> usize {
        self.terms.ranks - 1
    }

    fn params(&self, number: u32) -> PeersParams {
        let mut slots = [0; PEERS_MAX];
        for (rank, slot) in slots.iter_mut().enumerate().take(self.terms.ranks) {
            *slot = self.mapped[rank].as_ref().map_or(self.slots.address(), Mapped::address);
        }
        PeersParams {
            slots,
            state: self.slots.state.address(),
            host: self.slots.host.address(),
            rank: self.terms.rank as u32,
            ranks: self.terms.ranks as u32,
            places: (self.terms.bytes_max / CARRIED_BYTES) as u32,
            number,
        }
    }

    fn launch<P: Params>(device: &Device, function: Function, grid: Grid, params: &P) -> Result<(), Error> {
        Ok(device.launch_early(function, grid, params)?)
    }

    /// Replaces `data`, which [`Peer::takes`], by its sum over the ranks: the step's sum number `number`.
    pub(crate) fn all_reduce(&self, data: &Tensor, number: u32) -> Result<(), Error> {
        let pairs = size("all_reduce_sum", data.elements() / 2)?;
        let params = AllReduceParams { peers: self.params(number), data: data.address(), pairs };
        let blocks = pairs.div_ceil(TILE_PAIRS).min(self.terms.blocks_max);
        Self::launch(data.device(), self.functions.all_reduce, Grid::new(blocks, 1, THREADS), &params)
    }

    /// x += the sum over the ranks of `sum` + scale · `more`, in place; its norm goes to `out`. [`Peer::takes_rows`] of
    /// `sum`; all are alike but for the dtype.
    fn all_reduce_norm(
        &self,
        number: u32,
        (x, out): (&Tensor, &Tensor),
        (sum, more): (&Tensor, Option<(&Tensor, f32)>),
        (weight, norm): (&Weight, Norm),
    ) -> Result<(), Error> {
        let width = size("residual_norm", sum.width())?;
        let (eps, layer) = match norm {
            Norm::Rms { eps } => (eps, 0),
            Norm::Layer { eps } => (eps, 1),
        };
        let params = AllReduceNormParams {
            peers: self.params(number),
            x: x.address(),
            out: out.address(),
            sum: sum.address(),
            more: more.map_or(0, |(more, _)| more.address()),
            weight: weight.address(),
            width,
            scale: more.map_or(0.0, |(_, scale)| scale),
            eps,
            layer,
        };
        let pairs = width / 2;
        let form = PAIRS.iter().position(|each| pairs <= each * THREADS).unwrap_or(PAIRS.len() - 1);
        let threads = pairs.div_ceil(PAIRS[form]).next_multiple_of(WARP);
        let grid = Grid::new(size("residual_norm", sum.rows())?, 1, threads);
        Self::launch(sum.device(), self.functions.all_reduce_norm[form], grid, &params)
    }

    /// Ends every wait for other ranks, now and from here on.
    pub(crate) fn give_up(&self) {
        self.slots.host.word(GIVE_UP).store(1, Ordering::Release);
    }

    /// Where the number of the sum that the card has begun last is.
    pub(super) const fn begun(&self) -> (&Pinned, usize) {
        (&self.slots.host, BEGUN)
    }

    /// The rank whose part a card was waiting for when it gave up.
    pub(crate) fn waited_for(&self) -> Option<u32> {
        self.slots.host.word(WAITED_FOR).load(Ordering::Acquire).checked_sub(1)
    }
}

/// A sum over ranks that the op which adds it to the residual stream does on its way.
#[derive(Debug)]
pub(crate) struct OpenSum {
    /// Of the tensor with this rank's part.
    pub(crate) address: Address,
    pub(super) peer: Rc<Peer>,
    pub(super) watch: Rc<Watch>,
}

impl OpenSum {
    /// See [`Peer::all_reduce_norm`].
    pub(crate) fn end(
        self,
        (x, out): (&Tensor, &Tensor),
        (sum, more): (&Tensor, Option<(&Tensor, f32)>),
        (weight, norm): (&Weight, Norm),
    ) -> Result<(), Error> {
        let number = sum.device().next_sum();
        self.peer.all_reduce_norm(number, (x, out), (sum, more), (weight, norm))?;
        Ok(self.watch.queued(Queued::Sum(number), sum.device().stream())?)
    }
}
