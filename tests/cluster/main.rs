//! A whole cluster, as a user starts it: the real binary, real processes, real gRPC, the embedded model.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on says where")]

mod answers;
mod bad_requests;
mod bad_starts;
mod batches;
mod collector;
mod deaths;
mod dummy_weights;
mod endings;
mod examples;
mod forms;
mod lifecycle;
mod logs;
mod metrics;
mod parity;
mod registration;
mod reload;
mod resumes;
mod rotation;
mod security;
mod strangers;
mod support;
mod top;
mod traces;
