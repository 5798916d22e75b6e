//! Cohere MoE models: what a checkpoint computes ([`ModelConfig`]), which part of it a rank holds ([`ShardPlan`]),
//! reading exactly that part ([`load`]), and the forward pass ([`Model`]), written once over any backend and
//! collective.
#![forbid(unsafe_code)]

mod activity;
mod assemble;
mod balance;
mod catalogue;
mod checkpoint;
mod cohere_moe;
mod config;
mod dispatch;
mod dummy;
mod error;
mod identity;
mod layout;
mod load;
mod memory;
mod partial;
mod placement;
mod preset;
mod shard;
mod strict_json;
mod traffic;
mod weights;

pub use activity::Activity;
pub use balance::ExpertLoad;
pub use catalogue::Catalogue;
pub use checkpoint::{Block, Checkpoint, Element, Files, HEADER_BYTES_MAX, Header, TensorEntry};
pub use cohere_moe::{Forward, KvBudget, Model, Parts, Pending};
pub use config::{Attention, Combination, LayerConfig, Mlp, ModelConfig, MoeConfig, SharedExperts};
pub use dispatch::slice as dispatch_slice;
pub use error::{Complaint, Error, HeaderFault, TensorProblem};
pub use identity::{config_hash, dummy_hash, group_hash};
pub use load::{LoadSummary, Progress, load, load_dummy};
pub use memory::{WeightBytes, kv_bytes_per_block, kv_bytes_per_token, resident_pieces};
pub use partial::{Partial, Reduced};
pub use placement::Placement;
pub use preset::Preset;
pub use shard::{ExpertShard, ShardPlan, Sharing};
pub use traffic::{StepRows, step_traffic};
pub use weights::{GatedMlp, LayerWeights, MlpWeights, Weights};
