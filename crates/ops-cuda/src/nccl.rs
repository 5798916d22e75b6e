//! NCCL as it is found at run time: the functions used here, and a communicator that never blocks its caller for ever.
//!
//! Communicators are non-blocking: a call may answer "in progress", and is then asked for until it has an outcome or its
//! time is over. (NCCL user guide, "Fault tolerance": `ncclCommInitRankConfig` with `blocking = 0`,
//! `ncclCommGetAsyncError`, `ncclCommAbort`.)

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{
    cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId,
};
use libloading::os::unix::Library;
use types::{DType, TpRank};

use crate::kernels::Address;
use crate::{Error, libraries};

/// `NCCL_CONFIG_INITIALIZER` of nccl.h 2.28: an int left to NCCL.
const UNDEFINED: c_int = c_int::MIN;
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
/// The header that `ncclConfig_t` is of; a newer library knows how to read it.
const CONFIG_VERSION: c_uint = 22_809;
/// Older libraries have no non-blocking communicators with this layout.
const OLDEST: c_int = 22_100;
/// Between two questions how a call goes.
const PAUSE: Duration = Duration::from_micros(50);

/// What starts a communicator: made by rank 0, given to all.
pub(crate) const ID_BYTES: usize = 128;

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of the library, which stays loaded.
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn load(library: &Library) -> Result<Self, String> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the type is that of the function in nccl.h.
                        let symbol = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>($name) };
                        *symbol.map_err(|error| error.to_string())?
                    },)*
                })
            }
        }
    };
}

functions! {
    version = b"ncclGetVersion\0": fn(*mut c_int) -> ncclResult_t;
    unique_id = b"ncclGetUniqueId\0": fn(*mut ncclUniqueId) -> ncclResult_t;
    init = b"ncclCommInitRankConfig\0": fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> ncclResult_t;
    abort = b"ncclCommAbort\0": fn(ncclComm_t) -> ncclResult_t;
    async_error = b"ncclCommGetAsyncError\0": fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t;
    error_string = b"ncclGetErrorString\0": fn(ncclResult_t) -> *const c_char;
    last_error = b"ncclGetLastError\0": fn(ncclComm_t) -> *const c_char;
    group_start = b"ncclGroupStart\0": fn() -> ncclResult_t;
    group_end = b"ncclGroupEnd\0": fn() -> ncclResult_t;
    all_reduce = b"ncclAllReduce\0": fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> ncclResult_t;
    all_gather = b"ncclAllGather\0": fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, cudaStream_t) -> ncclResult_t;
    reduce = b"ncclReduce\0": fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
    broadcast = b"ncclBroadcast\0": fn(*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
    send = b"ncclSend\0": fn(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
    recv = b"ncclRecv\0": fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
}

/// The library of this process.
pub(crate) struct Nccl {
    functions: Functions,
    /// As NCCL counts: 22809 is 2.28.9.
    version: c_int,
    _library: Library,
}

impl Nccl {
    /// Finds the library, once.
    pub(crate) fn find() -> Result<&'static Self, Error> {
        static FOUND: OnceLock<Result<Nccl, Error>> = OnceLock::new();
        FOUND.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Self, Error> {
        let library = libraries::nccl()?;
        let refused =
            |call, reason| Error::Nccl { rank: 0, version: "of unknown version".to_owned(), call, reason };
        let functions = Functions::load(&library).map_err(|reason| refused("loading", reason))?;
        let mut version = 0;
        // SAFETY: the pointer is valid for the call.
        let result = unsafe { (functions.version)(&raw mut version) };
        if result != ncclResult_t::ncclSuccess || version < OLDEST {
            return Err(refused(
                "ncclGetVersion",
                format!("version {version}; 2.21 (22100) or newer is needed"),
            ));
        }
        Ok(Self { functions, version, _library: library })
    }

    /// The version in words: 2.28.9.
    pub(crate) fn version(&self) -> String {
        format!("{}.{}.{}", self.version / 10_000, self.version / 100 % 100, self.version % 100)
    }

    /// A new communicator's identity.
    pub(crate) fn unique_id(&self, rank: TpRank) -> Result<[u8; ID_BYTES], Error> {
        let mut id = MaybeUninit::<ncclUniqueId>::zeroed();
        // SAFETY: the pointer is valid for the call.
        let result = unsafe { (self.functions.unique_id)(id.as_mut_ptr()) };
        self.done("ncclGetUniqueId", rank, result)?;
        // SAFETY: zeroed above, and any bytes are an identity.
        Ok(unsafe { id.assume_init() }.internal.map(c_char::cast_unsigned))
    }

    fn done(&self, call: &'static str, rank: TpRank, result: ncclResult_t) -> Result<(), Error> {
        if result == ncclResult_t::ncclSuccess {
            return Ok(());
        }
        // SAFETY: NCCL gives a string that lives as long as the library.
        let words = unsafe { CStr::from_ptr((self.functions.error_string)(result)) }.to_string_lossy();
        // SAFETY: without a communicator NCCL tells the last error of this thread.
        let last = unsafe { (self.functions.last_error)(ptr::null_mut()) };
        // SAFETY: as above; NCCL gives an empty string when there was none.
        let last = if last.is_null() { "".into() } else { unsafe { CStr::from_ptr(last) }.to_string_lossy() };
        let reason =
            if last.trim().is_empty() { words.into_owned() } else { format!("{words}: {}", last.trim()) };
        Err(Error::Nccl { rank: rank.index(), version: self.version(), call, reason })
    }
}

/// This rank's place in a group of cards. Not `Send`: the thread that owns the card uses it.
pub(crate) struct Communicator {
    nccl: &'static Nccl,
    comm: ncclComm_t,
    rank: TpRank,
}

impl Communicator {
    /// Joins the group that `id` names, on the current context's card. All ranks call it.
    pub(crate) fn join(
        nccl: &'static Nccl,
        id: &[u8; ID_BYTES],
        rank: TpRank,
        within: Duration,
    ) -> Result<Self, Error> {
        let mut config = ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: UNDEFINED,
            netName: ptr::null(),
            splitShare: UNDEFINED,
            trafficClass: UNDEFINED,
            commName: ptr::null(),
            collnetEnable: UNDEFINED,
            CTAPolicy: UNDEFINED,
            shrinkShare: UNDEFINED,
            nvlsCTAs: UNDEFINED,
            nChannelsPerNetPeer: UNDEFINED,
            nvlinkCentricSched: UNDEFINED,
        };
        let id = ncclUniqueId { internal: id.map(u8::cast_signed) };
        let mut comm = ptr::null_mut();
        let count = |n: u32| c_int::try_from(n).unwrap_or(c_int::MAX);
        let (ranks, own) = (count(rank.size().get()), count(rank.index()));
        // SAFETY: all pointers are valid for the call, and a context is current on this thread.
        let result = unsafe { (nccl.functions.init)(&raw mut comm, ranks, id, own, &raw mut config) };
        if result != ncclResult_t::ncclInProgress {
            nccl.done("ncclCommInitRankConfig", rank, result)?;
        }
        let joined = Self { nccl, comm, rank };
        joined.settle("ncclCommInitRankConfig", result, within)?;
        Ok(joined)
    }

    pub(crate) const fn rank(&self) -> TpRank {
        self.rank
    }

    /// How the communicator is doing: an error of any rank shows here.
    pub(crate) fn state(&self) -> Result<bool, Error> {
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is alive, the pointer valid for the call.
        let asked = unsafe { (self.nccl.functions.async_error)(self.comm, &raw mut state) };
        self.nccl.done("ncclCommGetAsyncError", self.rank, asked)?;
        if state == ncclResult_t::ncclInProgress {
            return Ok(false);
        }
        self.nccl.done("the communicator", self.rank, state)?;
        Ok(true)
    }

    /// Waits until what was asked for is queued.
    fn settle(&self, call: &'static str, result: ncclResult_t, within: Duration) -> Result<(), Error> {
        if result != ncclResult_t::ncclInProgress {
            return self.nccl.done(call, self.rank, result);
        }
        let started = Instant::now();
        while !self.state()? {
            if started.elapsed() > within {
                let reason = format!("no outcome within {within:?}; is every rank there?");
                let version = self.nccl.version();
                return Err(Error::Nccl { rank: self.rank.index(), version, call, reason });
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Ends everything that is queued, here and with the others. The communicator is of no use after it.
    pub(crate) fn abort(&mut self) {
        if !self.comm.is_null() {
            // SAFETY: alive, and given up below.
            unsafe { (self.nccl.functions.abort)(self.comm) };
            self.comm = ptr::null_mut();
        }
    }

    /// Whether it was aborted.
    pub(crate) const fn is_over(&self) -> bool {
        self.comm.is_null()
    }

    /// Queues one transfer, or several that belong together.
    pub(crate) fn queue(&self, transfers: &[Transfer], line: &Lane) -> Result<(), Error> {
        let functions = &self.nccl.functions;
        let grouped = transfers.len() != 1;
        if grouped {
            // SAFETY: ended below, whatever comes between.
            let result = unsafe { (functions.group_start)() };
            self.nccl.done("ncclGroupStart", self.rank, result)?;
        }
        let mut outcome = Ok(());
        for transfer in transfers {
            let result = self.one(transfer, line);
            // Within a group nothing has an outcome before its end.
            let pending = grouped && result == ncclResult_t::ncclInProgress;
            if outcome.is_ok() && !pending {
                outcome = self.settle(transfer.call(), result, line.within);
            }
        }
        if grouped {
            // SAFETY: begun above.
            let result = unsafe { (functions.group_end)() };
            outcome = outcome.and_then(|()| self.settle("ncclGroupEnd", result, line.within));
        }
        outcome
    }

    fn one(&self, transfer: &Transfer, line: &Lane) -> ncclResult_t {
        let functions = &self.nccl.functions;
        let (comm, stream) = (self.comm, line.stream.cast());
        let dtype = match line.dtype {
            DType::F32 => ncclDataType_t::ncclFloat32,
            DType::BF16 => ncclDataType_t::ncclBfloat16,
        };
        let from = |address: Address| address as *const c_void;
        let to = |address: Address| address as *mut c_void;
        let sum = ncclRedOp_t::ncclSum;
        // SAFETY: addresses and counts lie in live buffers of the card, as whoever queues has checked; the communicator
        // is alive, and the stream is of the card it was made on.
        unsafe {
            match *transfer {
                Transfer::AllReduce { data, count } => {
                    (functions.all_reduce)(from(data), to(data), count, dtype, sum, comm, stream)
                }
                Transfer::AllGather { own, all, count } => {
                    (functions.all_gather)(from(own), to(all), count, dtype, comm, stream)
                }
                Transfer::Reduce { data, own, count, root } => {
                    (functions.reduce)(from(data), to(own), count, dtype, sum, root, comm, stream)
                }
                Transfer::Broadcast { data, count, root } => {
                    (functions.broadcast)(from(data), to(data), count, dtype, root, comm, stream)
                }
                Transfer::Send { data, count, peer } => {
                    (functions.send)(from(data), count, dtype, peer, comm, stream)
                }
                Transfer::Recv { data, count, peer } => {
                    (functions.recv)(to(data), count, dtype, peer, comm, stream)
                }
            }
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // Unlike a finalisation, this does not wait for the other ranks.
        self.abort();
    }
}

/// Where transfers are queued, and what they carry.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) stream: CUstream,
    pub(crate) dtype: DType,
    /// Longest wait for a call's outcome.
    pub(crate) within: Duration,
}

/// One operation on numbers of the card; counts are of elements.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Transfer {
    AllReduce { data: Address, count: usize },
    AllGather { own: Address, all: Address, count: usize },
    Reduce { data: Address, own: Address, count: usize, root: c_int },
    Broadcast { data: Address, count: usize, root: c_int },
    Send { data: Address, count: usize, peer: c_int },
    Recv { data: Address, count: usize, peer: c_int },
}

impl Transfer {
    const fn call(&self) -> &'static str {
        match self {
            Self::AllReduce { .. } => "ncclAllReduce",
            Self::AllGather { .. } => "ncclAllGather",
            Self::Reduce { .. } => "ncclReduce",
            Self::Broadcast { .. } => "ncclBroadcast",
            Self::Send { .. } => "ncclSend",
            Self::Recv { .. } => "ncclRecv",
        }
    }
}
