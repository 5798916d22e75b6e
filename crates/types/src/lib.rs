//! The nouns every other crate shares: ids, ranks, token and block counts, sampling parameters that are valid or
//! not built, and every named limit. No logic beyond arithmetic that cannot overflow; depends on nothing here.
#![forbid(unsafe_code)]

mod constraint;
mod dtype;
mod error;
mod history;
mod ids;
mod kv;
pub mod limits;
mod mask;
mod priority;
mod rules;
mod sampling;
mod sharding;
mod spec;
mod tokens;
mod tp;
mod units;

pub use constraint::Constraint;
pub use dtype::DType;
pub use error::{Error, FieldViolation};
pub use history::{History, SharedHistory};
pub use ids::{SeqId, SlotId};
pub use kv::{BlockTable, KvGroup};
pub use mask::TokenMask;
pub use priority::Priority;
pub use rules::TokenRules;
pub use sampling::{Generation, Logprobs, SamplingParams};
pub use sharding::{Dispatch, DispatchChoice, ExpertSharding};
pub use spec::GenerationSpec;
pub use tokens::{BlockId, BlockSize, Position, TokenId};
pub use tp::{TpRank, TpSize};
pub use units::{Bytes, Micros};
