//! Finding NVIDIA's libraries at run time. They are looked for by name, as the system's loader does; a folder named in
//! `COHORT_CUDA_LIBRARIES` (several: separated by `:`) comes first, so that libraries unpacked from a package need no
//! loader configuration.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, fs};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};

use crate::Error;

/// Folders to look in first.
pub const FOLDERS_VARIABLE: &str = "COHORT_CUDA_LIBRARIES";
/// In the order they are needed: what NVRTC loads by name must be there before it asks.
const NAMES: [&str; 3] = ["libnvrtc-builtins.so", "libnvrtc.so", "libnccl.so"];
/// What NCCL's packages call it; without the version's number only development packages have it.
pub(crate) const NCCL: &str = "libnccl.so.2";

/// A library that CUDA needs at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needed {
    /// The driver.
    Driver,
    /// The kernel compiler.
    Nvrtc,
    /// The collectives between cards, for groups of several.
    Nccl,
}

impl Needed {
    /// What is said when it is not there.
    pub(crate) const fn missing(self) -> Error {
        match self {
            Self::Driver => Error::LibraryMissing {
                library: "libcuda.so.1",
                purpose: "the driver",
                package: "the NVIDIA driver, 580 or newer (in a container: start it with the NVIDIA runtime)",
            },
            Self::Nvrtc => Error::LibraryMissing {
                library: "libnvrtc.so",
                purpose: "compiling kernels",
                package: "cuda-nvrtc of the CUDA 13 runtime, or the Python package nvidia-cuda-nvrtc with its folder \
                          of libraries in COHORT_CUDA_LIBRARIES",
            },
            Self::Nccl => Error::LibraryMissing {
                library: NCCL,
                purpose: "collectives between cards",
                package: "libnccl2 2.21 or newer for CUDA 13, or the Python package nvidia-nccl-cu13 with its folder of \
                          libraries in COHORT_CUDA_LIBRARIES",
            },
        }
    }

    /// Whether it can be loaded.
    pub(crate) fn present(self) -> bool {
        preload();
        // SAFETY: opens a shared library by name and looks at the result; no function of it is called.
        unsafe {
            match self {
                Self::Driver => cudarc::driver::sys::is_culib_present(),
                Self::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Self::Nccl => nccl().is_ok(),
            }
        }
    }

    /// Refuses to go on without it.
    pub(crate) fn require(self) -> Result<(), Error> {
        if self.present() { Ok(()) } else { Err(self.missing()) }
    }
}

/// Opens NCCL.
pub(crate) fn nccl() -> Result<Library, Error> {
    preload();
    // SAFETY: the library is NVIDIA's, whose initialisers may run at any time.
    unsafe { Library::open(Some(NCCL), RTLD_LAZY) }.map_err(|_| Needed::Nccl.missing())
}

/// Loads the libraries found in the named folders, once. Later look-ups by name then find them.
fn preload() {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| {
        let folders = env::var_os(FOLDERS_VARIABLE).unwrap_or_default();
        for file in env::split_paths(&folders).flat_map(|folder| files(&folder)) {
            // SAFETY: the user names the folder as that of NVIDIA's libraries, whose initialisers may run at any time.
            match unsafe { Library::open(Some(&file), RTLD_LAZY | RTLD_GLOBAL) } {
                // Kept open until the process ends.
                Ok(library) => std::mem::forget(library),
                Err(error) => {
                    tracing::warn!(file = %file.display(), %error, "{FOLDERS_VARIABLE}: not loaded")
                }
            }
        }
    });
}

/// The libraries in `folder`, in the order they are needed.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    names.sort();
    // A package may carry builds for other glibc versions beside the one meant.
    let is = |file: &Path, start: &str| {
        let name = file.file_name().and_then(OsStr::to_str).unwrap_or_default();
        name.starts_with(start) && !name.contains(".alt.")
    };
    NAMES
        .iter()
        .flat_map(|start| names.iter().filter(|file| is(file, start)).cloned().collect::<Vec<_>>())
        .collect()
}
