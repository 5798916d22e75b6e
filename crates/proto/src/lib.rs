//! The wire: generated messages and services, the only place where they become our own types, and the one table from
//! errors to gRPC statuses.
//!
//! - [`v1`] is what callers of a router speak, [`vllm`] what clients of vLLM do, [`worker`] what a router says to the
//!   leader of a group;
//! - [`Prompt`], [`Phase`] and the `From`/`TryFrom` implementations turn messages into checked types and back;
//! - [`Failure`] is every way a request can fail, with its status code and details.
#![forbid(unsafe_code)]

mod codec;
mod convert;
mod exposition;
mod pace;
mod phase;
mod prompt;
mod status;
mod timeout;

pub use codec::{Codec, Writer};
pub use convert::{GenerationFields, bad_words, constraint, priority, stop_strings};
pub use exposition::{OPEN_METRICS, TEXT, exposed};
pub use pace::{PAUSE_MAX, Pace};
pub use phase::Phase;
pub use prompt::{Chat, Message, Prompt, Role, ToolChoice};
pub use status::{Failure, RETRY_AFTER, Violation};
pub use timeout::timeout;

/// Generated from `proto/cohort/v1/cohort.proto`: the public API.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::needless_pass_by_value,
    clippy::too_many_lines,
    reason = "generated code; its documentation is the .proto file"
)]
pub mod v1 {
    tonic::include_proto!("cohort.v1");
}

/// Generated from `proto/cohort/worker/v1/worker.proto`: router to leader.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::needless_pass_by_value,
    clippy::too_many_lines,
    reason = "generated code; its documentation is the .proto file"
)]
pub mod worker {
    tonic::include_proto!("cohort.worker.v1");
}

/// Generated from `proto/vllm`: the API of vLLM's gRPC server, for clients written for it.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::needless_pass_by_value,
    clippy::struct_excessive_bools,
    clippy::too_many_lines,
    reason = "generated code; its documentation is the .proto files"
)]
pub mod vllm {
    tonic::include_proto!("vllm");
}

/// The encoded `google.protobuf.FileDescriptorSet` of all files, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
