//! The router: text in, text out. It admits a request, renders and tokenizes it, places it at a worker group, and
//! turns the token ids that come back into text. Strings never pass below this crate.
//!
//! [`serve`] runs one; [`text`] and [`read_chat`] can be used by themselves.
#![forbid(unsafe_code)]

mod admission;
pub mod affinity;
mod answer;
pub mod breaker;
mod call;
mod config;
pub mod discovery;
mod doorway;
mod error;
pub mod fair;
mod forward;
mod gate;
mod gather;
mod grpc;
mod http;
mod metrics;
mod migrations;
pub mod pick;
mod pipeline;
mod registry;
mod resume;
mod room;
mod running;
mod serve;
mod service;
mod services;
pub mod text;
mod trail;
mod tuned;
mod undecoded;
mod vllm;
mod workers;

pub use config::{Access, Config, HttpPatience, Limits, ModelFiles, QueueLimits};
pub use error::Error;
pub use http::read_chat;
pub use serve::{Bound, Start, serve, serve_changing};
pub use trail::Tracing;
pub use tuned::Change;
