//! The op set on NVIDIA GPUs, in fp32 or bf16. Nothing here links against CUDA: driver and compiler are looked for at
//! run time ([`probe`]), kernels (`kernels/*.cu`) are compiled by NVRTC for the card found and kept on disk
//! ([`KernelCache`]).
//!
//! One card, one owner thread, two streams: the second runs beside the first inside recorded decode steps, which are
//! launched as one graph. Activations live in one arena made at start; weights and KV caches are
//! allocated while loading; nothing is allocated in a step. This crate is the only one with `unsafe` code.
//!
//! Sums are taken in an order that depends on how many rows a step has, so results are equal from run to run for the
//! same step, and not bit for bit across batches.
#![deny(unsafe_op_in_unsafe_fn)]

mod activations;
mod arch;
mod arena;
mod attention;
mod backend;
mod bulk;
mod cache;
mod check;
mod comm;
mod device;
mod dispatch;
mod draw;
mod dummy;
mod error;
mod experts;
mod graph;
mod idle;
mod kernels;
mod landing;
mod libraries;
mod loaded;
mod loading;
mod measure;
mod memory;
mod nccl;
mod nvrtc;
mod probe;
mod products;
mod sampling;
mod step;
mod tensor;
mod timing;

pub use activations::Activations;
pub use attention::KvLayer;
pub use backend::CudaBackend;
pub use cache::KernelCache;
pub use check::{KernelReport, KernelShape, ProgramReport, check, sources};
pub use comm::{
    CardLine, ONE_SHOT_DEFAULT, ONE_SHOT_VARIABLE, Patience, SoloDevice, Staged, connect, connect_cards,
    line_bytes, one_shot, place_on_machine,
};
pub use device::Options;
pub use error::Error;
pub use kernels::Source;
pub use landing::Drawing;
pub use libraries::FOLDERS_VARIABLE;
pub use nvrtc::{Compiled, compile};
pub use probe::{Card, Found, probe};
pub use sampling::DRAWN_ROWS_MAX;
pub use tensor::{Routed, Tensor, Weight};
