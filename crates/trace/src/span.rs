//! One span.

use opentelemetry::trace::{Status, TraceContextExt};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use tracing::Metadata;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::Parent;

/// What marks the spans of requests among everything else that this program says of itself.
const TARGET: &str = "request_trace";

/// Whether this is one of ours: logs leave it out, and nothing else is sent to a collector.
#[must_use]
pub fn is_span(metadata: &Metadata<'_>) -> bool {
    metadata.target() == TARGET
}

/// On which side of a call a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It answers one.
    Server,
    /// It makes one.
    Client,
    /// Neither.
    Internal,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
            Self::Internal => "internal",
        }
    }
}

/// A part of a request's way, which ends when the last of its clones is dropped. The default is nothing.
#[derive(Debug, Clone)]
pub struct Span(tracing::Span);

impl Default for Span {
    fn default() -> Self {
        Self::none()
    }
}

impl Span {
    /// No span: what a request has that is not traced.
    #[must_use]
    pub const fn none() -> Self {
        Self(tracing::Span::none())
    }

    /// The first span of a traced request in this process, below one of another process if there is one. Nothing where
    /// nothing is exported.
    #[must_use]
    pub fn begin(name: &str, kind: Kind, parent: Option<&Parent>) -> Self {
        let span = tracing::error_span!(
            target: TARGET, parent: None, "span", otel.name = name, otel.kind = kind.name()
        );
        if span.is_disabled() {
            return Self::none();
        }
        if let Some(parent) = parent {
            // It has just been made, so it is not too late.
            let _ = span.set_parent(Context::new().with_remote_span_context(parent.0.clone()));
        }
        Self(span)
    }

    /// A part of this one, from now on.
    #[must_use]
    pub fn child(&self, name: &str, kind: Kind) -> Self {
        if !self.is_on() {
            return Self::none();
        }
        Self(tracing::error_span!(
            target: TARGET, parent: &self.0, "span", otel.name = name, otel.kind = kind.name()
        ))
    }

    /// Whether it is written down. What is costly to find out for it should be asked for only then.
    #[must_use]
    pub fn is_on(&self) -> bool {
        !self.0.is_disabled()
    }

    /// What another process, or a later span of this one, names as its parent.
    #[must_use]
    pub fn parent(&self) -> Option<Parent> {
        if !self.is_on() {
            return None;
        }
        let context = self.0.context().span().span_context().clone();
        context.is_valid().then_some(Parent(context))
    }

    /// Says something of it.
    pub fn set(&self, key: &'static str, value: impl Into<Value>) {
        if self.is_on() {
            self.0.set_attribute(key, value);
        }
    }

    /// Says it, when there is something to say.
    pub fn set_some<T: Into<Value>>(&self, key: &'static str, value: Option<T>) {
        if let Some(value) = value {
            self.set(key, value);
        }
    }

    /// Says several things under one name.
    pub fn set_all<'a>(&self, key: &'static str, values: impl IntoIterator<Item = &'a str>) {
        if self.is_on() {
            let values = values.into_iter().map(|value| StringValue::from(value.to_owned())).collect();
            self.set(key, Value::Array(Array::String(values)));
        }
    }

    /// Something that happened in it, now.
    pub fn event(&self, name: &'static str, facts: &[(&'static str, String)]) {
        if self.is_on() {
            let facts = facts.iter().map(|(key, value)| KeyValue::new(*key, value.clone()));
            self.0.add_event(name, facts.collect());
        }
    }

    /// It failed, with a kind of error that is one of few, and in words.
    pub fn fail(&self, kind: &'static str, why: impl Into<String>) {
        if self.is_on() {
            self.set("error.type", kind);
            self.0.set_status(Status::error(why.into()));
        }
    }
}
