//! Compiles kernel files at run time for the card found. Needs libnvrtc alone, no driver and no card.

use std::ffi::{CStr, CString, c_char};
use std::ptr;

use cudarc::nvrtc::{result, sys};

use crate::Error;
use crate::kernels::Source;
use crate::libraries::Needed;

/// What a kernel file became.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// The machine code: a cubin image.
    pub cubin: Vec<u8>,
    /// Registers, shared memory and spills, in ptxas' words; empty when it came from the cache.
    pub log: String,
}

/// The compiler's version, part of every cache key.
pub(crate) fn version() -> Result<(i32, i32), Error> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are valid for the call; the library was found by `probe` or the caller.
    let status = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    match status {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok((major, minor)),
        other => Err(Error::Driver { call: "nvrtcVersion", reason: format!("{other:?}") }),
    }
}

/// Compiles `source` for `arch` (`sm_90a`).
///
/// # Errors
/// [`Error::LibraryMissing`] without libnvrtc; [`Error::Compile`] with the compiler's log.
pub fn compile(source: &Source, arch: &str) -> Result<Compiled, Error> {
    Needed::Nvrtc.require()?;
    let failed = |log: String| Error::Compile {
        file: source.file(),
        arch: arch.to_owned(),
        flags: source.defines().join(" "),
        log,
    };
    let text = CString::new(source.text()).map_err(|e| failed(e.to_string()))?;
    let program = Program(result::create_program(&text, None).map_err(|e| failed(e.to_string()))?);
    // SAFETY: the program was just created and lives until `program` is dropped.
    let outcome = unsafe { result::compile_program(program.0, &options(source, arch)) };
    let log = program.log();
    match outcome {
        Ok(()) => Ok(Compiled { cubin: program.cubin().map_err(failed)?, log }),
        Err(error) => Err(failed(format!("{error}: {log}"))),
    }
}

pub(crate) fn options(source: &Source, arch: &str) -> Vec<String> {
    // Lambdas without a word about it run on the device.
    let fixed = ["--std=c++17", "--ptxas-options=-v", "--device-as-default-execution-space"];
    let mut options = vec![format!("--gpu-architecture={arch}")];
    options.extend(fixed.map(str::to_owned));
    options.extend(source.defines().iter().map(|define| format!("-D{define}")));
    options
}

/// An NVRTC program, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program is alive.
        let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        if !log.contains(&0) {
            return String::new();
        }
        // SAFETY: the buffer holds a terminating zero, as just checked, and outlives the borrow.
        unsafe { CStr::from_ptr(log.as_ptr()) }.to_string_lossy().into_owned()
    }

    fn cubin(&self) -> Result<Vec<u8>, String> {
        let mut size = 0;
        // SAFETY: the program is alive and compiled; the pointer is valid for the call.
        let status = unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) };
        if status != sys::nvrtcResult::NVRTC_SUCCESS || size == 0 {
            return Err(format!("nvrtcGetCUBINSize gives {size} bytes, {status:?}"));
        }
        let mut cubin = vec![0_u8; size];
        // SAFETY: the buffer has the size that the library asked for.
        let status = unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast::<c_char>()) };
        match status {
            sys::nvrtcResult::NVRTC_SUCCESS => Ok(cubin),
            other => Err(format!("nvrtcGetCUBIN gives {other:?}")),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !ptr::eq(self.0, ptr::null()) {
            // SAFETY: created by this value's maker and destroyed only here; a failure leaves nothing to do.
            let _ = unsafe { result::destroy_program(self.0) };
        }
    }
}
