//! Where in which trace a process was asked: the W3C trace context.

use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use opentelemetry_sdk::propagation::TraceContextPropagator;

/// The header that names trace and span.
pub const TRACEPARENT: &str = "traceparent";
/// The header with what vendors add.
pub const TRACESTATE: &str = "tracestate";
/// Bytes of [`Parent::to_bytes`].
pub const PARENT_BYTES: usize = 25;
/// Digits of the parts of a `traceparent`.
const PART_DIGITS: [usize; 4] = [2, 32, 16, 2];
/// Longest `tracestate` that is passed on: what the specification asks for at least.
const TRACESTATE_BYTES_MAX: usize = 512;

/// The span that a piece of work belongs to, in this or another process.
#[derive(Debug, Clone, PartialEq)]
pub struct Parent(pub(crate) SpanContext);

/// The two headers.
struct Headers<'a> {
    traceparent: &'a str,
    tracestate: Option<&'a str>,
}

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            TRACEPARENT => Some(self.traceparent),
            TRACESTATE => self.tracestate,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

/// Version, trace, span and flags with all their digits: the library takes shorter ones.
fn has_its_parts(traceparent: &str) -> bool {
    traceparent.split('-').map(str::len).take(PART_DIGITS.len()).eq(PART_DIGITS)
}

impl Parent {
    /// Reads the headers of a call; `None` without a `traceparent` that is one. A `tracestate` that is none, or is too long,
    /// is left out.
    #[must_use]
    pub fn read(traceparent: Option<&str>, tracestate: Option<&str>) -> Option<Self> {
        let tracestate = tracestate.filter(|state| state.len() <= TRACESTATE_BYTES_MAX);
        let headers =
            Headers { traceparent: traceparent.filter(|header| has_its_parts(header))?, tracestate };
        let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
        let parent = context.span().span_context().clone();
        parent.is_valid().then_some(Self(parent))
    }

    /// Whether its trace is written down.
    #[must_use]
    pub fn is_sampled(&self) -> bool {
        self.0.is_sampled()
    }

    /// The `traceparent` header.
    #[must_use]
    pub fn traceparent(&self) -> String {
        let flags = self.0.trace_flags() & TraceFlags::SAMPLED;
        format!("00-{}-{}-{flags:02x}", self.0.trace_id(), self.0.span_id())
    }

    /// The `tracestate` header, if there is something to say.
    #[must_use]
    pub fn tracestate(&self) -> Option<String> {
        Some(self.0.trace_state().header()).filter(|state| !state.is_empty())
    }

    /// Trace, span and flags, for a channel between processes of one group.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; PARENT_BYTES] {
        let mut bytes = [0; PARENT_BYTES];
        bytes[..16].copy_from_slice(&self.0.trace_id().to_bytes());
        bytes[16..24].copy_from_slice(&self.0.span_id().to_bytes());
        bytes[24] = self.0.trace_flags().to_u8();
        bytes
    }

    /// As [`Parent::to_bytes`] wrote it; `None` for a trace or span that is none.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; PARENT_BYTES]) -> Option<Self> {
        let (mut trace, mut span) = ([0; 16], [0; 8]);
        trace.copy_from_slice(&bytes[..16]);
        span.copy_from_slice(&bytes[16..24]);
        let flags = TraceFlags::new(bytes[24]);
        let (trace, span) = (TraceId::from_bytes(trace), SpanId::from_bytes(span));
        let parent = SpanContext::new(trace, span, flags, true, TraceState::default());
        parent.is_valid().then_some(Self(parent))
    }
}
