//! One card as its owner thread uses it: the context, the stream all work goes through, the activations' arena, and
//! the compiled kernels.

use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_void};
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{
    CUdevice_attribute, CUfunction, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchConfig, CUmodule, CUresult, CUstream, cuLaunchKernelEx, cuStreamQuery,
};
use cudarc::driver::{CudaContext, result};
use types::{Bytes, DType};

use crate::arena::FreeList;
use crate::backend::Options;
use crate::bulk::BulkTiles;
use crate::cache::KernelCache;
use crate::check::{attention_source, in_parallel};
use crate::comm::{OpenSum, Watch};
use crate::graph::{Event, Lanes};
use crate::kernels::{Address, GemmParams, Params, Source};
use crate::memory::{DeviceBuffer, Residence, Resident};
use crate::nvrtc::Compiled;
use crate::sampling::Sampling;
use crate::{Error, arch, probe};

/// The target whose warpgroup products and copy engine some kernels use.
pub(crate) const HOPPER: &str = "sm_90a";
/// The first major compute capability whose kernels can start before the one before them has ended.
const OVERLAPPING: i32 = 9;
/// How often a rank that waits for other cards asks whether they are well.
const WATCH_EVERY: Duration = Duration::from_millis(2);
/// Counters for launches whose last block has more to do: one for the router, the others for attention.
const COUNTERS: usize = 8192;

/// A card in use. Not `Send`: one thread owns it.
#[derive(Debug)]
pub(crate) struct Device {
    // Freed first to last: memory before the context it belongs to.
    watches: RefCell<Vec<Rc<Watch>>>,
    /// A sum over ranks that the next launch has to end.
    open: RefCell<Option<OpenSum>>,
    /// Where what stays is, once it was reserved.
    residence: RefCell<Option<Residence>>,
    pub(crate) arena: DeviceBuffer,
    pub(crate) free: RefCell<FreeList>,
    pub(crate) kernels: Kernels,
    pub(crate) multiprocessors: u32,
    /// Counters of blocks that arrived, zero between launches.
    counters: DeviceBuffer,
    cache: KernelCache,
    /// Compiled when the card was opened, loaded when they are first needed.
    early: Vec<(Source, Compiled)>,
    arch: String,
    lanes: Lanes,
    lane: Cell<usize>,
    /// Whether what a lane was given last is a kernel of its own.
    chained: Cell<[bool; 2]>,
    overlaps: bool,
    context: Arc<CudaContext>,
}

impl Device {
    pub(crate) fn open(options: &Options) -> Result<Self, Error> {
        let &Options { ordinal, dtype, activations, ref cache, ref heads } = options;
        let found = probe()?.cards.len();
        if ordinal >= found {
            return Err(Error::Ordinal { ordinal, found });
        }
        let context = CudaContext::new(ordinal).map_err(Error::driver("cuDevicePrimaryCtxRetain"))?;
        let capability = context.compute_capability().map_err(Error::driver("cuDeviceGetAttribute"))?;
        arch::card(&context.name().map_err(Error::driver("cuDeviceGetName"))?, capability)?;
        let arch = arch::target(capability);
        context.bind_to_thread().map_err(Error::driver("cuCtxSetCurrent"))?;
        let lanes = Lanes::new()?;
        let count = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
        let multiprocessors = count.map_err(Error::driver("cuDeviceGetAttribute"))?;
        let mut early = vec![Source::dummy(dtype)];
        early.extend(heads.map(|shape| attention_source(&shape)));
        let (kernels, early) = Kernels::load((dtype, early), &arch, cache)?;
        let arena_bytes = usize::try_from(activations.0).unwrap_or(usize::MAX);
        let counters = DeviceBuffer::new("counters", COUNTERS * size_of::<u32>())?;
        let device = Self {
            watches: RefCell::default(),
            open: RefCell::default(),
            residence: RefCell::default(),
            arena: DeviceBuffer::new("activations", arena_bytes)?,
            free: RefCell::new(FreeList::new(activations.0)),
            kernels,
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1),
            counters,
            cache: cache.clone(),
            early,
            arch,
            lanes,
            lane: Cell::new(0),
            chained: Cell::new([false; 2]),
            overlaps: capability.0 >= OVERLAPPING,
            context,
        };
        device.zero(device.counters.address(), COUNTERS * size_of::<u32>())?;
        device.synchronize()?;
        Ok(device)
    }

    /// Takes the memory of what stays, as one piece.
    pub(crate) fn reside(&self, bytes: Bytes) -> Result<(), Error> {
        *self.residence.borrow_mut() = Some(Residence::new(bytes)?);
        Ok(())
    }

    /// Memory of something that stays.
    pub(crate) fn resident(&self, what: &'static str, bytes: usize) -> Result<Resident, Error> {
        match &mut *self.residence.borrow_mut() {
            Some(residence) => residence.take(what, bytes),
            None => Resident::alone(what, bytes),
        }
    }

    pub(crate) const fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub(crate) fn name(&self) -> Result<String, Error> {
        self.context.name().map_err(Error::driver("cuDeviceGetName"))
    }

    pub(crate) fn module(&self, source: &Source) -> Result<Module, Error> {
        match self.early.iter().find(|(early, _)| early == source) {
            Some((_, compiled)) => Module::of(compiled),
            None => Module::of(&self.cache.get(source, &self.arch)?),
        }
    }

    /// Whether the kernels of [`HOPPER`] alone are there.
    pub(crate) fn is_hopper(&self) -> bool {
        self.arch == HOPPER
    }

    /// Makes the context current on the calling thread.
    pub(crate) fn bind(&self) -> Result<(), Error> {
        self.context.bind_to_thread().map_err(Error::driver("cuCtxSetCurrent"))
    }

    pub(crate) fn stream(&self) -> CUstream {
        self.lanes.stream(self.lane.get())
    }

    pub(crate) const fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    /// What is queued from here on goes beside what follows [`Device::other_lane`], until [`Device::join`].
    pub(crate) fn fork(&self) -> Result<(), Error> {
        self.lanes.follow(1)?;
        self.chained.set([self.chained.get()[0], false]);
        self.free.borrow_mut().hold();
        self.lane.set(1);
        Ok(())
    }

    pub(crate) fn other_lane(&self) {
        self.lane.set(0);
    }

    /// Nothing without a fork.
    pub(crate) fn join(&self) -> Result<(), Error> {
        if self.free.borrow().is_held() {
            self.lanes.follow(0)?;
            self.unchain();
        }
        self.alone();
        Ok(())
    }

    /// The next launch waits for everything before it.
    pub(crate) fn unchain(&self) {
        self.chained.set([false; 2]);
    }

    /// Leaves a sum over ranks to the next launch; nothing else may be launched before it.
    pub(crate) fn leave_open(&self, sum: OpenSum) {
        *self.open.borrow_mut() = Some(sum);
    }

    /// What [`Device::leave_open`] left of the tensor at `address`.
    pub(crate) fn take_open(&self, address: Address) -> Option<OpenSum> {
        self.open.borrow_mut().take_if(|open| open.address == address)
    }

    /// Back to one lane, whatever was begun.
    pub(crate) fn alone(&self) {
        *self.open.borrow_mut() = None;
        self.lane.set(0);
        self.free.borrow_mut().release();
    }

    /// The first of `count` counters from number `first` on, if there are as many.
    pub(crate) fn counters(&self, first: usize, count: usize) -> Option<Address> {
        let end = first.checked_add(count)?;
        (end <= COUNTERS).then(|| self.counters.address() + (first * size_of::<u32>()) as u64)
    }

    /// What tells this rank's card apart from all others.
    pub(crate) fn identity(&self) -> Result<[u8; 16], Error> {
        let uuid = self.context.uuid().map_err(Error::driver("cuDeviceGetUuid"))?;
        Ok(uuid.bytes.map(std::ffi::c_char::cast_unsigned))
    }

    /// From here on whoever waits for the card looks after `watch`'s communicator.
    pub(crate) fn watch(&self, watch: Rc<Watch>) {
        self.watches.borrow_mut().push(watch);
    }

    pub(crate) fn synchronize(&self) -> Result<(), Error> {
        let watches = self.watches.borrow();
        if watches.is_empty() {
            // SAFETY: the stream is alive.
            return unsafe { result::stream::synchronize(self.stream()) }
                .map_err(Error::driver("cuStreamSynchronize"));
        }
        // Other cards have a part in what is waited for: the wait must have an end without them.
        let (started, mut next) = (Instant::now(), WATCH_EVERY);
        loop {
            // SAFETY: the stream is alive.
            match unsafe { cuStreamQuery(self.stream()) } {
                CUresult::CUDA_ERROR_NOT_READY => std::hint::spin_loop(),
                other => {
                    other.result().map_err(Error::driver("cuStreamQuery"))?;
                    break;
                }
            }
            let waited = started.elapsed();
            if waited > next {
                watches.iter().try_for_each(|watch| watch.check(waited))?;
                next = waited + WATCH_EVERY;
            }
        }
        watches.iter().for_each(|watch| watch.passed());
        Ok(())
    }

    /// Whether `mark` has been passed, for one who asks again and again since `begun`; `next` is the time of the next look
    /// after the other cards that have a part in it.
    pub(crate) fn has_passed(
        &self,
        mark: &Event,
        (begun, next): (Instant, &Cell<Duration>),
    ) -> Result<bool, Error> {
        let watches = self.watches.borrow();
        if mark.has_passed()? {
            watches.iter().for_each(|watch| watch.passed());
            return Ok(true);
        }
        let waited = begun.elapsed();
        if !watches.is_empty() && waited > next.get() {
            watches.iter().try_for_each(|watch| watch.check(waited))?;
            next.set(waited + WATCH_EVERY);
        }
        Ok(false)
    }

    /// Copies `from` to the device after what was launched before, and waits.
    pub(crate) fn upload<E>(&self, to: Address, from: &[E]) -> Result<(), Error> {
        self.unchain();
        // SAFETY: the caller's buffer has room for `from`, and the wait below keeps `from` alive for the copy.
        unsafe { result::memcpy_htod_async(to, from, self.stream()) }
            .map_err(Error::driver("cuMemcpyHtoDAsync"))?;
        self.synchronize()
    }

    /// Copies to `to` after what was launched before, and waits.
    pub(crate) fn download(&self, to: &mut [u8], from: Address) -> Result<(), Error> {
        self.unchain();
        // SAFETY: `from` has `to.len()` readable bytes by the caller's shapes, and the wait keeps `to` borrowed.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream()) }
            .map_err(Error::driver("cuMemcpyDtoHAsync"))?;
        self.synchronize()
    }

    /// Copies between two places of the device, in stream order.
    pub(crate) fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.unchain();
        // SAFETY: both ranges lie in live allocations by the caller's shapes.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream()) }
            .map_err(Error::driver("cuMemcpyDtoDAsync"))
    }

    /// Fills with zeros, in stream order.
    pub(crate) fn zero(&self, at: Address, bytes: usize) -> Result<(), Error> {
        self.unchain();
        // SAFETY: the range lies in a live allocation of at least `bytes`.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream()) }
            .map_err(Error::driver("cuMemsetD8Async"))
    }

    /// Queues `function` over `grid`. A grid with nothing in it is not launched.
    pub(crate) fn launch<P: Params>(&self, function: Function, grid: Grid, params: &P) -> Result<(), Error> {
        self.queue(function, grid, params, false)
    }

    /// As [`Device::launch`], for a kernel that calls `await_inputs`: it may start while the one before it in its lane
    /// still runs.
    pub(crate) fn launch_early<P: Params>(
        &self,
        function: Function,
        grid: Grid,
        params: &P,
    ) -> Result<(), Error> {
        self.queue(function, grid, params, self.overlaps && self.chained.get()[self.lane.get()])
    }

    fn queue<P: Params>(
        &self,
        function: Function,
        Grid { blocks, threads, shared }: Grid,
        params: &P,
        early: bool,
    ) -> Result<(), Error> {
        if blocks.0 == 0 || blocks.1 == 0 || blocks.2 == 0 {
            return Ok(());
        }
        if self.open.borrow().is_some() {
            return Err(Error::SumOpen);
        }
        let mut params = *params;
        let mut arguments = [(&raw mut params).cast::<c_void>()];
        let mut attribute = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: blocks.0,
            gridDimY: blocks.1,
            gridDimZ: blocks.2,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: self.stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(early),
        };
        // SAFETY: the function belongs to a loaded module; `Params` repeats its one argument; addresses in it come
        // from live buffers, whose sizes the op checked; the driver copies argument and attribute before it returns.
        unsafe { cuLaunchKernelEx(&raw const config, function.0, arguments.as_mut_ptr(), ptr::null_mut()) }
            .result()
            .map_err(Error::driver("cuLaunchKernelEx"))?;
        let mut chained = self.chained.get();
        chained[self.lane.get()] = true;
        self.chained.set(chained);
        Ok(())
    }
}

/// Size of a launch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) blocks: (u32, u32, u32),
    pub(crate) threads: u32,
    /// Dynamic shared memory, bytes.
    pub(crate) shared: u32,
}

impl Grid {
    pub(crate) const fn new(x: u32, y: u32, threads: u32) -> Self {
        Self { blocks: (x, y, 1), threads, shared: 0 }
    }

    /// A thread for each of `count` elements.
    pub(crate) fn over(count: usize) -> Self {
        Self::new(u32::try_from(count.div_ceil(256)).unwrap_or(u32::MAX), 1, 256)
    }
}

/// A kernel of a loaded module, which its [`Module`] keeps alive.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Function(CUfunction);

impl Function {
    /// Allows `bytes` of dynamic shared memory.
    pub(crate) fn allow_shared(self, bytes: u32) -> Result<(), Error> {
        use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SIZE;
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        // SAFETY: the function belongs to a loaded module.
        unsafe { result::function::set_function_attribute(self.0, SIZE, bytes) }
            .map_err(Error::driver("cuFuncSetAttribute"))
    }
}

/// A loaded cubin.
#[derive(Debug)]
pub(crate) struct Module(CUmodule);

impl Module {
    fn of(compiled: &Compiled) -> Result<Self, Error> {
        // SAFETY: the image is a whole cubin, and the driver copies it.
        let module = unsafe { result::module::load_data(compiled.cubin.as_ptr().cast::<c_void>()) };
        module.map(Self).map_err(Error::driver("cuModuleLoadData"))
    }

    pub(crate) fn function(&self, name: &str) -> Result<Function, Error> {
        let failed = |why: String| Error::Driver {
            call: "cuModuleGetFunction",
            reason: format!("kernel {name}: {why}"),
        };
        let named = CString::new(name).map_err(|e| failed(e.to_string()))?;
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.0, named) };
        function.map(Function).map_err(|e| failed(e.to_string()))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded by this value and unloaded only here; the driver finishes running kernels first.
        let _ = unsafe { result::module::unload(self.0) };
    }
}

/// Bytes of shared memory of the few-row tiles: what eight warps summed of `outs` times `rows` numbers.
pub(crate) const fn tiles_shared(outs: u32, rows: u32) -> u32 {
    8 * outs * rows * 4
}

/// Rows of w in a tensor-core tile.
pub(crate) const TILE_OUTS: u32 = 128;

/// Bytes of shared memory of the tensor-core tiles: three stages of (rows + columns) × 64 bf16.
const fn gemm_shared(rows: u32) -> u32 {
    3 * (rows + TILE_OUTS) * 64 * 2
}

/// The kernels that every model needs.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) embed: Function,
    pub(crate) sum: Function,
    pub(crate) round: Function,
    pub(crate) swiglu: Function,
    pub(crate) gather: Function,
    pub(crate) norm: Function,
    pub(crate) fill: Function,
    pub(crate) pack: Function,
    pub(crate) unpack: Function,
    pub(crate) combine_rows: Function,
    /// For 1, 2, 4 and 8 rows.
    pub(crate) skinny: [Function; 4],
    pub(crate) skinny_unaligned: Function,
    pub(crate) residual_norm: Function,
    pub(crate) join_ranks: Function,
    pub(crate) route: Function,
    pub(crate) router: Function,
    pub(crate) expert_up: Function,
    pub(crate) expert_down: Function,
    pub(crate) group_pairs: Function,
    /// As much in two launches.
    pub(crate) group_many: [Function; 2],
    pub(crate) combine: Function,
    pub(crate) sampling: Sampling,
    /// bf16 alone has them.
    pub(crate) tiles: Option<Tiles>,
    _modules: Vec<Module>,
}

/// A product whose tiles go through shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedTiles {
    function: Function,
    pub(crate) rows: u32,
}

impl SharedTiles {
    fn load(module: &Module, name: &str, rows: u32) -> Result<Self, Error> {
        let function = module.function(name)?;
        function.allow_shared(gemm_shared(rows))?;
        Ok(Self { function, rows })
    }

    /// Queues `shares` blocks for each of `tiles` tiles of rows and each tile of `outs`.
    pub(crate) fn launch(
        self,
        device: &Device,
        (tiles, outs, shares): (u32, u32, u32),
        params: &GemmParams,
    ) -> Result<(), Error> {
        let blocks = (tiles, outs.div_ceil(TILE_OUTS), shares);
        let grid = Grid { blocks, threads: 128, shared: gemm_shared(self.rows) };
        device.launch_early(self.function, grid, params)
    }
}

/// Products on the tensor cores.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiles {
    /// Dense, in tiles of 128 rows.
    pub(crate) gemm: SharedTiles,
    /// Adds up what blocks that shared K made.
    pub(crate) add_shares: Function,
    /// By expert, plain and gated, in tiles of 32 and of 64 rows.
    pub(crate) grouped: [[SharedTiles; 2]; 2],
    /// Dense or by expert, for very many rows; Hopper alone has them.
    pub(crate) bulk: Option<BulkTiles>,
    /// For 8, 16, 32 and 64 rows.
    pub(crate) skinny: [Function; 4],
    pub(crate) expert_up: Function,
    pub(crate) expert_down: Function,
}

impl Tiles {
    fn load(gemm: &Module, skinny: &Module, experts: &Module, arch: &str) -> Result<Self, Error> {
        let bulk = if arch == HOPPER { Some(BulkTiles::load(gemm)?) } else { None };
        let load = |name, rows| SharedTiles::load(gemm, name, rows);
        let grouped = [
            [load("gemm32", 32)?, load("gemm32_gated", 32)?],
            [load("gemm64", 64)?, load("gemm64_gated", 64)?],
        ];
        let (gemm, add_shares) = (load("gemm128", 128)?, gemm.function("add_shares")?);
        let skinny = [
            skinny.function("tiles8")?,
            skinny.function("tiles16")?,
            skinny.function("tiles32")?,
            skinny.function("tiles64")?,
        ];
        skinny[3].allow_shared(tiles_shared(32, 64))?;
        let (expert_up, expert_down) =
            (experts.function("expert_up_tiles")?, experts.function("expert_down_tiles")?);
        Ok(Self { gemm, add_shares, grouped, bulk, skinny, expert_up, expert_down })
    }
}

impl Kernels {
    /// Compiles what every model needs, and `more` beside it.
    fn load(
        (dtype, more): (DType, Vec<Source>),
        arch: &str,
        cache: &KernelCache,
    ) -> Result<(Self, Vec<(Source, Compiled)>), Error> {
        let common = Source::common(dtype);
        let count = common.len();
        let all = [common, more].concat();
        // Compiling takes seconds for each file when nothing is kept yet.
        let mut compiled = in_parallel(&all, |source| cache.get(source, arch))?;
        let early = all.into_iter().skip(count).zip(compiled.split_off(count)).collect();
        Ok((Self::of(&compiled, arch)?, early))
    }

    fn of(compiled: &[Compiled], arch: &str) -> Result<Self, Error> {
        let mut modules = compiled.iter().map(Module::of);
        let mut next = || modules.next().unwrap_or_else(|| unreachable!("every model has these files"));
        let (rows, skinny, experts, sample) = (next()?, next()?, next()?, next()?);
        let tiles = modules.next().transpose()?;
        let functions = match &tiles {
            Some(gemm) => Some(Tiles::load(gemm, &skinny, &experts, arch)?),
            None => None,
        };
        Ok(Self {
            embed: rows.function("embed")?,
            sum: rows.function("sum")?,
            round: rows.function("round_to_storage")?,
            swiglu: rows.function("swiglu")?,
            gather: rows.function("gather")?,
            norm: rows.function("norm_rows")?,
            fill: rows.function("fill")?,
            pack: rows.function("pack_rows")?,
            unpack: rows.function("unpack_rows")?,
            combine_rows: rows.function("combine_rows")?,
            residual_norm: rows.function("residual_norm")?,
            join_ranks: rows.function("join_ranks")?,
            skinny: [
                skinny.function("skinny1")?,
                skinny.function("skinny2")?,
                skinny.function("skinny4")?,
                skinny.function("skinny8")?,
            ],
            skinny_unaligned: skinny.function("skinny_unaligned")?,
            route: experts.function("route")?,
            router: experts.function("router")?,
            expert_up: experts.function("expert_up")?,
            expert_down: experts.function("expert_down")?,
            group_pairs: experts.function("group_pairs")?,
            group_many: [experts.function("count_pairs")?, experts.function("place_pairs")?],
            combine: experts.function("combine")?,
            sampling: Sampling::of(&sample)?,
            tiles: functions,
            _modules: [rows, skinny, experts, sample].into_iter().chain(tiles).collect(),
        })
    }
}
