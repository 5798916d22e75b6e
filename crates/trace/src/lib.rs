//! Traces: the way of one request over processes, as spans that are sent to a collector by OTLP over gRPC.
//!
//! A request that is not traced has spans that are nothing: making, labelling and ending them costs a comparison. Who is
//! traced is decided once, where the request comes in ([`Sampling`]); everybody below goes by what it is told
//! ([`Parent`]).
#![forbid(unsafe_code)]

mod export;
mod parent;
mod sampling;
mod span;

pub use export::{Connect, Error, Export, Exporter, FLUSH_MAX, QUEUE_MAX, start};
pub use parent::{PARENT_BYTES, Parent, TRACEPARENT, TRACESTATE};
pub use sampling::Sampling;
pub use span::{Kind, Span, is_span};
