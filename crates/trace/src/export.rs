//! The way of spans to a collector: a bounded queue, a thread that sends batches, and one warning when they do not arrive.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, SpanData, SpanExporter,
};
use tokio::runtime::{Handle, Runtime};
use tonic::transport::Channel;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::FilterFn;
use tracing_subscriber::registry::LookupSpan;

use crate::is_span;

/// Spans that wait to be sent; more are dropped.
pub const QUEUE_MAX: usize = 4096;
/// Spans of one message.
const BATCH_MAX: usize = 512;
/// Longest that spans wait for others to be sent with.
const DELAY: Duration = Duration::from_secs(1);
/// Longest that a message may take.
const SEND_MAX: Duration = Duration::from_secs(3);
/// Longest that a process waits at its end for the last spans to leave.
pub const FLUSH_MAX: Duration = Duration::from_secs(2);

/// What is sent where, and under which name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The collector, as `http://host:port` or `https://host:port`.
    pub endpoint: String,
    /// What this process is called: `cohort-router`.
    pub service: &'static str,
    /// What else is said of it, such as its rank.
    pub facts: Vec<(&'static str, String)>,
}

/// Makes the connection to an encrypted collector, inside the runtime that it is used in.
pub type Connect = Box<dyn FnOnce() -> Channel + Send>;

/// Why nothing can be exported.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The thread that sends has no runtime.
    #[error("the runtime for traces cannot be started: {0}")]
    Runtime(#[from] std::io::Error),
    /// The endpoint is no address.
    #[error("traces cannot be sent to {endpoint}: {source}")]
    Endpoint {
        /// The endpoint.
        endpoint: String,
        /// Why not.
        source: ExporterBuildError,
    },
}

/// Sends spans until it is dropped, which sends the last ones within [`FLUSH_MAX`].
pub struct Exporter {
    provider: SdkTracerProvider,
    runtime: Option<Runtime>,
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").finish_non_exhaustive()
    }
}

/// Starts to export: the layer takes in the spans of requests and nothing else. A collector that is not reached in plain text
/// needs a connection of the caller's making.
///
/// # Errors
/// [`Error`] for an endpoint that is none. One that is down, or comes later, is no error.
pub fn start<S>(
    export: &Export,
    connect: Option<Connect>,
) -> Result<(impl Layer<S> + use<S>, Exporter), Error>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("traces")
        .enable_all()
        .build()?;
    let inside = runtime.enter();
    let sender = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(export.endpoint.clone())
        .with_timeout(SEND_MAX);
    let sender = match connect {
        Some(connect) => sender.with_channel(connect()),
        None => sender,
    };
    let sender =
        sender.build().map_err(|source| Error::Endpoint { endpoint: export.endpoint.clone(), source })?;
    drop(inside);
    let quiet = Quiet {
        inner: sender,
        endpoint: export.endpoint.clone(),
        handle: runtime.handle().clone(),
        outage: Arc::default(),
    };
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(QUEUE_MAX)
        .with_max_export_batch_size(BATCH_MAX)
        .with_scheduled_delay(DELAY)
        .build();
    let facts = export.facts.iter().map(|(key, value)| KeyValue::new(*key, value.clone()));
    let resource = Resource::builder_empty()
        .with_service_name(export.service)
        .with_attribute(KeyValue::new("service.namespace", "cohort"))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("process.pid", i64::from(std::process::id())))
        .with_attributes(facts)
        .build();
    let provider = SdkTracerProvider::builder()
        .with_span_processor(BatchSpanProcessor::builder(quiet).with_batch_config(batches).build())
        // Spans are made of traced requests only.
        .with_sampler(Sampler::AlwaysOn)
        .with_resource(resource)
        .build();
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("cohort"))
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_filter(
            FilterFn::new(|metadata| metadata.is_span() && is_span(metadata))
                .with_max_level_hint(LevelFilter::ERROR),
        );
    Ok((layer, Exporter { provider, runtime: Some(runtime) }))
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_MAX) {
            tracing::debug!(%error, "the last spans were not sent");
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// An exporter that says once that it cannot send, and once that it can again.
#[derive(Debug)]
struct Quiet<E> {
    inner: E,
    endpoint: String,
    handle: Handle,
    outage: Arc<Outage>,
}

#[derive(Debug, Default)]
struct Outage {
    on: AtomicBool,
    /// Spans lost in it.
    lost: AtomicU64,
}

impl<E: SpanExporter> SpanExporter for Quiet<E> {
    fn export(&self, batch: Vec<SpanData>) -> impl Future<Output = OTelSdkResult> + Send {
        let (spans, outage, endpoint) = (batch.len() as u64, Arc::clone(&self.outage), self.endpoint.clone());
        // The thread that waits for this has no runtime of its own.
        let inside = self.handle.enter();
        // A collector that does not even take the connection is not waited for either.
        let sending = tokio::time::timeout(SEND_MAX, self.inner.export(batch));
        drop(inside);
        async move {
            let sent = sending.await.unwrap_or(Err(OTelSdkError::Timeout(SEND_MAX)));
            match &sent {
                Ok(()) => {
                    if outage.on.swap(false, Ordering::Relaxed) {
                        let lost = outage.lost.swap(0, Ordering::Relaxed);
                        tracing::info!(endpoint, lost, "traces are sent again");
                    }
                }
                Err(error) => {
                    outage.lost.fetch_add(spans, Ordering::Relaxed);
                    if !outage.on.swap(true, Ordering::Relaxed) {
                        tracing::warn!(
                            endpoint, %error,
                            "traces cannot be sent; requests go on without, and this is not said again"
                        );
                    }
                }
            }
            sent
        }
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
