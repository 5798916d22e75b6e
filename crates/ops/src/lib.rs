//! The op set as a contract: about twenty fused, model-level operations ([`Backend`]), what a step looks like to
//! them ([`Batch`]), how weights are handed over ([`HostTensor`]), the reference sampler, and the conformance suite
//! every backend runs.
#![forbid(unsafe_code)]

mod backend;
mod batch;
mod candidates;
pub mod conformance;
mod dummy;
mod error;
mod experts;
mod host;
mod on_host;
pub mod sample;

pub use backend::{Backend, KvLayerSpec, Norm, Rope, Routing, Scoring, Window};
pub use batch::{Batch, BatchSequence, Fed};
pub use dummy::{Dummy, DummyBand, DummyPiece, chosen, dummy_unit};
pub use error::Error;
pub use experts::{ExpertOwners, ExpertSlots};
pub use host::{HostBytes, HostMemory, HostPart, HostTensor, WeightParts};
pub use on_host::{draw_rows, joined};
pub use types::{BlockTable, KvGroup};
