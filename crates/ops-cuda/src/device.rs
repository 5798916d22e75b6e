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
use crate::cache::KernelCache;
use crate::check::{KernelShape, attention_source};
use crate::comm::{OpenSum, Queued, Watch};
use crate::graph::{Event, Graph, Lanes};
use crate::kernels::{Address, Params, Source};
use crate::loaded::Kernels;
use crate::memory::{DeviceBuffer, Residence, Resident};
use crate::nvrtc::Compiled;
use crate::{Error, arch, probe};

/// The target whose warpgroup products and copy engine some kernels use.
pub(crate) const HOPPER: &str = "sm_90a";
/// The first major compute capability whose kernels can start before the one before them has ended.
const OVERLAPPING: i32 = 9;
/// How often a rank that waits for other cards asks whether they are well.
const WATCH_EVERY: Duration = Duration::from_millis(2);
/// Counters for launches whose last block has more to do: one for the router, the others for attention.
const COUNTERS: usize = 8192;

/// How to use a card.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which of the cards that `probe` found.
    pub ordinal: usize,
    /// Compute dtype.
    pub dtype: DType,
    /// Memory for activations; [`crate::Activations::bytes`] says how much a model needs.
    pub activations: Bytes,
    /// Where compiled kernels are kept.
    pub cache: KernelCache,
    /// The rank's heads, when they are known: their attention is then compiled beside the other kernels, and not when the
    /// first cache layer is made.
    pub heads: Option<KernelShape>,
}

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
    /// Sums over ranks that were queued in this step so far.
    sums: Cell<u32>,
    /// The other branch has been marked.
    marked: Cell<bool>,
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
            sums: Cell::new(0),
            marked: Cell::new(false),
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

    /// In the branch that came first: a launch of the other one may wait for this place.
    pub(crate) fn mark_branch(&self) -> Result<(), Error> {
        let branches = self.lane.get() == 1;
        self.marked.set(branches);
        if branches { self.lanes.mark() } else { Ok(()) }
    }

    /// What is queued from here on comes after the place that the branch before has marked, if it has.
    pub(crate) fn follow_branch(&self) -> Result<(), Error> {
        if self.marked.replace(false) && self.lane.get() == 0 {
            self.lanes.pass()?;
            self.chained.set([false, self.chained.get()[1]]);
        }
        Ok(())
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

    /// A step begins: its sums over ranks are counted from 1 on.
    pub(crate) fn begin_sums(&self) {
        self.sums.set(0);
    }

    /// The number in its step of a sum over ranks that is to be queued.
    pub(crate) fn next_sum(&self) -> u32 {
        self.sums.set(self.sums.get() + 1);
        self.sums.get()
    }

    /// Queues a recorded step.
    pub(crate) fn repeat(&self, graph: &Graph) -> Result<(), Error> {
        graph.launch(self.stream())?;
        self.unchain();
        self.watches.borrow().iter().try_for_each(|watch| watch.queued(Queued::Recorded, self.stream()))
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
        self.marked.set(false);
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
    pub(crate) fn of(compiled: &Compiled) -> Result<Self, Error> {
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
