//! A collector of traces: it takes spans by OTLP over gRPC, as a real one does, and keeps them.

use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use security::{Acceptor, Clients, ServerTls, incoming};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// A span as it arrived.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    /// The process that sent it: `cohort-router`.
    pub(crate) service: String,
    pub(crate) name: String,
    pub(crate) trace: String,
    pub(crate) id: String,
    /// Empty for none.
    pub(crate) parent: String,
    /// Nanoseconds.
    pub(crate) time: [u64; 2],
    pub(crate) facts: Vec<(String, Value)>,
    pub(crate) failed: bool,
}

impl Seen {
    pub(crate) fn fact(&self, key: &str) -> Option<&Value> {
        self.facts.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    #[track_caller]
    pub(crate) fn text(&self, key: &str) -> &str {
        match self.fact(key) {
            Some(Value::StringValue(text)) => text,
            other => panic!("{key} is {other:?} in {self:?}"),
        }
    }

    #[track_caller]
    pub(crate) fn number(&self, key: &str) -> i64 {
        match self.fact(key) {
            Some(Value::IntValue(number)) => *number,
            other => panic!("{key} is {other:?} in {self:?}"),
        }
    }

    #[track_caller]
    pub(crate) fn seconds(&self, key: &str) -> f64 {
        match self.fact(key) {
            Some(Value::DoubleValue(number)) => *number,
            other => panic!("{key} is {other:?} in {self:?}"),
        }
    }
}

/// Runs until it is dropped.
pub(crate) struct Collector {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    _runtime: Runtime,
}

struct Taker(Arc<Mutex<Vec<Seen>>>);

#[tonic::async_trait]
impl TraceService for Taker {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut seen = self.0.lock().unwrap();
        for from in request.into_inner().resource_spans {
            let resource = facts(from.resource.unwrap_or_default().attributes);
            let service = resource.iter().find(|(key, _)| key == "service.name");
            let Some((_, Value::StringValue(service))) = service else { panic!("no name: {resource:?}") };
            for span in from.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                seen.push(Seen {
                    service: service.clone(),
                    name: span.name,
                    trace: hex(&span.trace_id),
                    id: hex(&span.span_id),
                    parent: hex(&span.parent_span_id),
                    time: [span.start_time_unix_nano, span.end_time_unix_nano],
                    facts: facts(span.attributes),
                    failed: span.status.is_some_and(|status| status.code == 2),
                });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn facts(all: Vec<KeyValue>) -> Vec<(String, Value)> {
    let value = |value: Option<AnyValue>| value.and_then(|value| value.value);
    all.into_iter().filter_map(|fact| Some((fact.key, value(fact.value)?))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Collector {
    pub(crate) fn start() -> Self {
        Self::behind(None)
    }

    /// One that is reached through TLS.
    pub(crate) fn encrypted(tls: &ServerTls) -> Self {
        Self::behind(Some(tls))
    }

    fn behind(tls: Option<&ServerTls>) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let door = Acceptor::new(tls, Clients::Anybody, &[b"h2"]).unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let (address, seen) = (listener.local_addr().unwrap(), Arc::default());
        let service = TraceServiceServer::new(Taker(Arc::clone(&seen)));
        runtime.spawn(async {
            Server::builder().add_service(service).serve_with_incoming(incoming(listener, door)).await
        });
        let scheme = if tls.is_some() { "https" } else { "http" };
        Self { url: format!("{scheme}://{address}"), seen, _runtime: runtime }
    }

    /// The flag that sends traces here.
    pub(crate) fn flag(&self) -> String {
        format!("--otlp-endpoint={}", self.url)
    }

    /// What has arrived of a trace.
    pub(crate) fn of(&self, trace: &str) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().filter(|span| span.trace == trace).cloned().collect()
    }

    /// Everything that has arrived.
    pub(crate) fn all(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}
