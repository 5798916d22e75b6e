//! What keeps a GPU from being used.

use cudarc::driver::result::DriverError;
use types::Bytes;

/// Why CUDA cannot be used, or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A run-time library that is not installed.
    #[error("{library} is not found ({purpose}); install {package}")]
    LibraryMissing {
        /// File name.
        library: &'static str,
        /// What it is needed for.
        purpose: &'static str,
        /// Where it comes from.
        package: &'static str,
    },
    /// The driver is there and refused.
    #[error("the CUDA driver failed at {call}: {reason}")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's words.
        reason: String,
    },
    /// The driver sees no card.
    #[error("the CUDA driver finds no device; is one assigned to this process (CUDA_VISIBLE_DEVICES)?")]
    NoDevice,
    /// A card that is not there.
    #[error("card {ordinal} is asked for, and the driver shows this process {found}, counted from 0")]
    Ordinal {
        /// What was asked for.
        ordinal: usize,
        /// How many there are.
        found: usize,
    },
    /// A card that the kernels cannot be compiled for.
    #[error("{card} has compute capability {major}.{minor}, and the kernels need 8.0 (A100) or newer")]
    UnsupportedCard {
        /// The driver's name for it.
        card: String,
        /// Its compute capability.
        major: i32,
        /// Its compute capability, second part.
        minor: i32,
    },
    /// A target that is none of a supported card.
    #[error("`{arch}` is not a target of these kernels; use sm_80, sm_86, sm_89, sm_90a, sm_100a or sm_120a")]
    Arch {
        /// What was asked for.
        arch: String,
    },
    /// A driver that does not load what the compiler makes.
    #[error(
        "the driver supports CUDA {}.{}, and the NVRTC found is of {}.{}; install a newer NVIDIA driver, or an NVRTC of \
         CUDA {}",
        supports.0, supports.1, nvrtc.0, nvrtc.1, supports.0
    )]
    DriverTooOld {
        /// Newest CUDA version the driver supports.
        supports: (i32, i32),
        /// The compiler's version.
        nvrtc: (i32, i32),
    },
    /// The compiler refused a kernel.
    #[error("kernel file {file} does not compile for {arch} (flags {flags}): {log}")]
    Compile {
        /// The kernel file.
        file: &'static str,
        /// The target.
        arch: String,
        /// The constants it was given.
        flags: String,
        /// The compiler's words.
        log: String,
    },
    /// A line for one rank alone, over a group of several.
    #[error("a group of {ranks} ranks needs a line between their cards, not the one of a rank that is alone")]
    NotAlone {
        /// Ranks of the group.
        ranks: u32,
    },
    /// NCCL is there and refused.
    #[error("rank {rank}: NCCL {version} failed at {call}: {reason}")]
    Nccl {
        /// The rank it happened on.
        rank: u32,
        /// NCCL's version, such as 2.28.9.
        version: String,
        /// The call.
        call: &'static str,
        /// NCCL's words.
        reason: String,
    },
    /// A step's collectives did not end.
    #[error("rank {rank}: {at}: {failed}; {missing}")]
    Stuck {
        /// The rank that waited.
        rank: u32,
        /// The collective that was open.
        at: String,
        /// NCCL's words, or how long was waited.
        failed: String,
        /// Who does not answer.
        missing: String,
    },
    /// A variable of the environment that is not what it has to be.
    #[error("{name} is `{value}`, and has to be a number of bytes, 0 for none")]
    Setting {
        /// The variable.
        name: &'static str,
        /// What it says.
        value: String,
    },
    /// An op that reads a sum of which the other ranks' parts are still to come.
    #[error(
        "a sum over ranks was left to the op that adds it to the residual stream, and another op came first"
    )]
    SumOpen,
    /// What the ranks told each other before their cards could talk.
    #[error("the ranks could not agree on how their cards talk")]
    Line(#[from] collectives::Error),
    /// Memory the card does not have.
    #[error("{what} need {needed}, and the card has {available} left")]
    Memory {
        /// What the memory was for.
        what: &'static str,
        /// How much it needs.
        needed: Bytes,
        /// How much there is.
        available: Bytes,
    },
}

impl Error {
    pub(crate) fn driver(call: &'static str) -> impl Fn(DriverError) -> Self {
        move |error| Self::Driver { call, reason: error.to_string() }
    }
}

impl From<Error> for ops::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Memory { what, needed, available } => {
                Self::Memory { what: what.to_owned(), needed, available }
            }
            other => Self::Device { op: "CUDA", reason: other.to_string() },
        }
    }
}
