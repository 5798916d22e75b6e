//! The scheduler: which tokens of which sequences run in the next step, and where their keys and values live.
//!
//! Pure decisions. There is no clock, thread, socket, model or tensor in here: [`Engine::apply`] takes an
//! [`Event`] and the time, [`Engine::plan`] the time, and both only return data. The same events at the same times
//! give the same plans.
//!
//! Read in this order: [`Event`] and [`Effect`] (what goes in and out), `engine.rs` (the state and `apply`),
//! `schedule.rs` (how a step is made), `group.rs` (where a sequence runs), [`kv`] (blocks), [`StepPlan`] (what every rank executes), [`Drawn`] (the tokens
//! it may refer to) and [`SlotTables`] (its mirror image on every rank).
#![forbid(unsafe_code)]

mod answers;
mod briefing;
mod check;
mod config;
mod drawn;
mod engine;
mod error;
mod event;
mod group;
pub mod kv;
mod masks;
mod plan;
mod rank;
mod sabotage;
mod schedule;
mod sequence;
mod slots;
mod wire;

pub use answers::RowKind;
pub use briefing::{Brief, Briefed, Briefing, Briefings};
pub use config::{BLOCKS_CEILING, Config, RUNNING_CEILING, STEP_TOKENS_CEILING};
pub use drawn::Drawn;
pub use engine::{Engine, Load, STEPS_IN_FLIGHT_MAX};
pub use error::Error;
pub use event::{
    Effect, Event, Finish, PrefixReuse, Refusal, Request, RequestOptions, RowOutput, StepOutput,
    TokenLogprob, Usage,
};
pub use masks::{Allowed, Masks};
pub use plan::{Input, PlannedSequence, RowPurpose, RowWork, Step, StepPlan};
pub use rank::{AGEING_MAX, AGEING_PER_LEVEL};
#[doc(hidden)]
pub use sabotage::Sabotage;
pub use slots::SlotTables;
pub use types::{BlockTable, KvGroup};
pub use wire::{Frame, PLAN_VERSION};
