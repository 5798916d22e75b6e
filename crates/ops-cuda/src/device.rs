//! One card as its owner thread uses it: the context, the stream all work goes through, the activations' arena, and
//! the compiled kernels.

use std::cell::RefCell;
use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{CUdevice_attribute, CUfunction, CUmodule, CUstream};
use cudarc::driver::{CudaContext, CudaStream, result};
use types::{Bytes, DType};

use crate::arena::FreeList;
use crate::cache::KernelCache;
use crate::check::in_parallel;
use crate::kernels::{Address, Params, Source};
use crate::memory::DeviceBuffer;
use crate::nvrtc::Compiled;
use crate::{Error, arch, probe};

/// A card in use. Not `Send`: one thread owns it.
#[derive(Debug)]
pub(crate) struct Device {
    // Freed first to last: memory before the context it belongs to.
    pub(crate) arena: DeviceBuffer,
    pub(crate) free: RefCell<FreeList>,
    pub(crate) kernels: Kernels,
    pub(crate) multiprocessors: u32,
    cache: KernelCache,
    arch: String,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

impl Device {
    pub(crate) fn open(
        ordinal: usize,
        dtype: DType,
        arena: Bytes,
        cache: KernelCache,
    ) -> Result<Self, Error> {
        probe()?;
        let context = CudaContext::new(ordinal).map_err(Error::driver("cuDevicePrimaryCtxRetain"))?;
        let capability = context.compute_capability().map_err(Error::driver("cuDeviceGetAttribute"))?;
        arch::card(&context.name().map_err(Error::driver("cuDeviceGetName"))?, capability)?;
        let arch = arch::target(capability);
        let stream = context.new_stream().map_err(Error::driver("cuStreamCreate"))?;
        let count = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
        let multiprocessors = count.map_err(Error::driver("cuDeviceGetAttribute"))?;
        let kernels = Kernels::load(dtype, &arch, &cache)?;
        let arena_bytes = usize::try_from(arena.0).unwrap_or(usize::MAX);
        Ok(Self {
            arena: DeviceBuffer::new("activations", arena_bytes)?,
            free: RefCell::new(FreeList::new(arena.0)),
            kernels,
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1),
            cache,
            arch,
            stream,
            context,
        })
    }

    pub(crate) fn name(&self) -> Result<String, Error> {
        self.context.name().map_err(Error::driver("cuDeviceGetName"))
    }

    pub(crate) fn module(&self, source: &Source) -> Result<Module, Error> {
        Module::load(source, &self.arch, &self.cache)
    }

    /// Makes the context current on the calling thread.
    pub(crate) fn bind(&self) -> Result<(), Error> {
        self.context.bind_to_thread().map_err(Error::driver("cuCtxSetCurrent"))
    }

    pub(crate) fn stream(&self) -> CUstream {
        self.stream.cu_stream()
    }

    pub(crate) fn synchronize(&self) -> Result<(), Error> {
        self.stream.synchronize().map_err(Error::driver("cuStreamSynchronize"))
    }

    /// Copies `from` to the device after what was launched before, and waits.
    pub(crate) fn upload<E>(&self, to: Address, from: &[E]) -> Result<(), Error> {
        // SAFETY: the caller's buffer has room for `from`, and the wait below keeps `from` alive for the copy.
        unsafe { result::memcpy_htod_async(to, from, self.stream()) }
            .map_err(Error::driver("cuMemcpyHtoDAsync"))?;
        self.synchronize()
    }

    /// Copies to `to` after what was launched before, and waits.
    pub(crate) fn download(&self, to: &mut [u8], from: Address) -> Result<(), Error> {
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
        // SAFETY: both ranges lie in live allocations by the caller's shapes.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream()) }
            .map_err(Error::driver("cuMemcpyDtoDAsync"))
    }

    /// Fills with zeros, in stream order.
    pub(crate) fn zero(&self, at: Address, bytes: usize) -> Result<(), Error> {
        // SAFETY: the range lies in a live allocation of at least `bytes`.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream()) }
            .map_err(Error::driver("cuMemsetD8Async"))
    }

    /// Queues `function` over `grid`. A grid with nothing in it is not launched.
    pub(crate) fn launch<P: Params>(&self, function: Function, grid: Grid, params: &P) -> Result<(), Error> {
        let Grid { blocks, threads, shared } = grid;
        if blocks.0 == 0 || blocks.1 == 0 || blocks.2 == 0 {
            return Ok(());
        }
        let mut params = *params;
        let mut arguments = [(&raw mut params).cast::<c_void>()];
        // SAFETY: the function belongs to a loaded module; `Params` repeats its one argument; addresses in it come
        // from live buffers, whose sizes the op checked; the driver copies the argument before it returns.
        unsafe {
            result::launch_kernel(function.0, blocks, (threads, 1, 1), shared, self.stream(), &mut arguments)
        }
        .map_err(Error::driver("cuLaunchKernel"))
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
    fn allow_shared(self, bytes: u32) -> Result<(), Error> {
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
    fn load(source: &Source, arch: &str, cache: &KernelCache) -> Result<Self, Error> {
        Self::of(&cache.get(source, arch)?)
    }

    fn of(compiled: &Compiled) -> Result<Self, Error> {
        // SAFETY: the image is a whole cubin, and the driver copies it.
        let module = unsafe { result::module::load_data(compiled.cubin.as_ptr().cast::<c_void>()) };
        module.map(Self).map_err(Error::driver("cuModuleLoadData"))
    }

    pub(crate) fn function(&self, name: &str) -> Result<Function, Error> {
        let name = CString::new(name)
            .map_err(|e| Error::Driver { call: "cuModuleGetFunction", reason: e.to_string() })?;
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.0, name) };
        function.map(Function).map_err(Error::driver("cuModuleGetFunction"))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded by this value and unloaded only here; the driver finishes running kernels first.
        let _ = unsafe { result::module::unload(self.0) };
    }
}

/// Bytes of shared memory of the tensor-core tiles: three stages of (rows + columns) × 64 bf16.
pub(crate) const fn gemm_shared(tile: u32) -> u32 {
    3 * 2 * tile * 64 * 2
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
    /// For 1, 2, 4 and 8 rows.
    pub(crate) skinny: [Function; 4],
    pub(crate) skinny_unaligned: Function,
    pub(crate) route: Function,
    pub(crate) expert_up: Function,
    pub(crate) expert_down: Function,
    pub(crate) group_pairs: Function,
    pub(crate) combine: Function,
    /// Tiles of 64 and of 128; bf16 alone has them.
    pub(crate) gemm: Option<[Function; 2]>,
    _modules: Vec<Module>,
}

impl Kernels {
    fn load(dtype: DType, arch: &str, cache: &KernelCache) -> Result<Self, Error> {
        // Compiling takes seconds for each file when nothing is kept yet.
        let compiled = in_parallel(&Source::common(dtype), |source| cache.get(source, arch))?;
        let mut modules = compiled.iter().map(Module::of);
        let mut next = || modules.next().unwrap_or_else(|| unreachable!("every model has these files"));
        let (rows, skinny, experts) = (next()?, next()?, next()?);
        let tiles = modules.next().transpose()?;
        let gemm = match &tiles {
            Some(tiles) => {
                let functions = [tiles.function("gemm64")?, tiles.function("gemm128")?];
                functions[0].allow_shared(gemm_shared(64))?;
                functions[1].allow_shared(gemm_shared(128))?;
                Some(functions)
            }
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
            skinny: [
                skinny.function("skinny1")?,
                skinny.function("skinny2")?,
                skinny.function("skinny4")?,
                skinny.function("skinny8")?,
            ],
            skinny_unaligned: skinny.function("skinny_unaligned")?,
            route: experts.function("route")?,
            expert_up: experts.function("expert_up")?,
            expert_down: experts.function("expert_down")?,
            group_pairs: experts.function("group_pairs")?,
            combine: experts.function("combine")?,
            gemm,
            _modules: [rows, skinny, experts].into_iter().chain(tiles).collect(),
        })
    }
}
