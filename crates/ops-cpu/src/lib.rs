//! The op set on the CPU: weights rest in candle tensors, kernels are plain Rust that the compiler vectorises for
//! the instructions found at run time, threads come from rayon.
//!
//! Every result is independent of what else is in the batch: each output element is summed in one fixed order
//! whatever the number of rows or threads, so a sequence gets the same tokens alone, in a batch, and however its
//! prompt was cut into chunks.
#![forbid(unsafe_code)]
#![allow(clippy::needless_range_loop, reason = "iterators with closures are not always inlined into kernels")]

mod attention;
mod backend;
mod comm;
mod dispatch;
mod element;
mod experts;
mod kv;
mod lanes;
mod math;
mod matmul;
mod norm;
mod recycle;
mod rope;
mod route;
mod tensor;
mod threads;
mod weight;

pub use backend::CpuBackend;
pub use comm::HostCollective;
pub use kv::KvLayer;
pub use recycle::Recycled;
pub use route::Routed;
pub use tensor::Tensor;
pub use weight::Weight;
