//! One rank of a group: boot, the leader's and the followers' loops, the executor that turns a step plan into a
//! batch for the model, and the leader's gRPC service.
#![forbid(unsafe_code)]

mod activity;
mod boot;
mod capacity;
mod chunk;
mod config;
mod device;
mod error;
mod executor;
mod fit;
mod flight;
mod follower;
mod gap;
mod guide;
mod inbox;
mod leader;
mod metrics;
mod numerics;
mod pipeline;
mod pulse;
mod registrar;
mod report;
mod run;
mod server;
mod service;
mod standing;
mod state;
mod streams;
mod traced;

pub use capacity::{Capacity, CollectiveCosts, GroupShape, KvCosts, Memory, RankBytes};
pub use config::{Access, Config, Device, Limits, LoadFormat, Routers};
pub use device::{StepBounds, cuda_options};
pub use error::Error;
pub use fit::{Memory as RankMemory, Part};
pub use flight::{FlightRecorder, STEPS_KEPT, step_json};
pub use gap::{GapSummary, Gaps};
pub use pipeline::{Execute, Job, Pipeline, Progress, Ran, Steps};
pub use proto::Phase;
pub use pulse::ALIVE_INTERVAL;
pub use report::{Report, Reporter};
pub use run::run;
