//! The gRPC listener: its services, and its health.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use proto::v1::cohort_server::CohortServer;
use proto::vllm::control_server::ControlServer;
use proto::vllm::inference_server::InferenceServer;
use proto::worker::registry_server::RegistryServer;
use security::{Acceptor, incoming};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tower::util::MapResponseLayer;
use types::limits::{HEADER_BYTES_MAX, MESSAGE_BYTES_MAX};

use crate::doorway::{Doorway, Loading};
use crate::gate::{Gate, GateLayer};
use crate::gather::Gathered;
use crate::pipeline::Shared;
use crate::registry::Desk;
use crate::service::Service;
use crate::services::Services;
use crate::workers::Progress;
use crate::{Error, undecoded, vllm};

/// A caller that vanished without a word is noticed after both together.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// What health is reported for: the server as a whole, and each service.
const HEALTH_NAMES: [&str; 4] = ["", "cohort.v1.Cohort", "vllm.Inference", "vllm.Control"];

/// What health says, from the first moment on.
#[derive(Clone)]
pub(crate) struct Health(HealthReporter);

impl Health {
    /// Of a router that does not serve yet.
    pub(crate) async fn new() -> Self {
        let health = Self(HealthReporter::new());
        health.report(false).await;
        health
    }

    fn service(&self) -> HealthServer<HealthService> {
        HealthServer::new(HealthService::from_health_reporter(self.0.clone()))
    }

    async fn report(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in HEALTH_NAMES {
            self.0.set_service_status(name, status).await;
        }
    }

    /// Goes with the groups, and with the order to stop.
    pub(crate) async fn keep_reporting(self, shared: Arc<Shared>) {
        let mut changes = shared.groups.changes();
        let mut reported = false;
        loop {
            let serving = shared.groups.progress() == Progress::Serving && !shared.withdrawn.is_cancelled();
            // Groups also change by every load report; who watches health is told of changes of health only.
            if serving != reported {
                self.report(serving).await;
                reported = serving;
            }
            tokio::select! {
                () = shared.withdrawn.cancelled(), if !shared.withdrawn.is_cancelled() => {}
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// The services of a start that is as far as `loading` says: health, and a refusal of all else.
pub(crate) fn start(health: &Health, loading: Loading) -> Services {
    let not_yet = move || async move { loading.refusal().to_status().into_http::<Body>() };
    let others = Routes::new(health.service()).into_axum_router().fallback(not_yet).into();
    Services { cohort: None, others }
}

/// The services of a router that serves.
///
/// # Errors
/// [`Error::Serve`] when reflection cannot read our own descriptors.
pub(crate) fn routes(
    shared: &Arc<Shared>,
    desk: Option<RegistryServer<Desk>>,
    health: &Health,
) -> Result<Services, Error> {
    let broken = |error: tonic_reflection::server::Error| broken(error.to_string());
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("cohort.v1.Cohort")
            .with_service_name("vllm.Inference")
            .with_service_name("vllm.Control")
            .with_service_name("grpc.health.v1.Health")
    };
    let cohort = CohortServer::new(Service::new(Arc::clone(shared)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let inference = InferenceServer::new(vllm::Inference::new(Arc::clone(shared)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let control = ControlServer::new(vllm::Control::new(Arc::clone(shared)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut others = Routes::new(inference)
        .add_service(control)
        .add_service(health.service())
        .add_service(reflection().build_v1().map_err(broken)?)
        .add_service(reflection().build_v1alpha().map_err(broken)?);
    if let Some(desk) = desk {
        others = others.add_service(desk);
    }
    Ok(Services { cohort: Some(cohort), others: others.prepare() })
}

/// Serves until `refuse`; then open calls are finished.
///
/// # Errors
/// [`Error::Serve`] when the listener breaks.
pub(crate) async fn serve(
    (listener, door): (TcpListener, Acceptor),
    (doorway, gate): (Doorway<Services>, Arc<Gate>),
    age_max: Duration,
    refuse: CancellationToken,
) -> Result<(), Error> {
    let mut server = Server::builder();
    if !age_max.is_zero() {
        server = server.max_connection_age(age_max);
    }
    server
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(STREAM_WINDOW_BYTES)
        .http2_max_header_list_size(Some(HEADER_BYTES_MAX))
        .layer(GateLayer(gate))
        .layer(MapResponseLayer::new(undecoded::explain))
        .layer(doorway)
        .add_routes(Routes::default())
        .serve_with_incoming_shutdown(gathered(incoming(listener, door)), refuse.cancelled_owned())
        .await
        .map_err(|error| broken(error.to_string()))
}

fn broken(reason: String) -> Error {
    Error::Serve { what: "gRPC", reason }
}

/// Connections that write once a turn.
fn gathered(
    streams: impl Stream<Item = io::Result<security::Stream>> + Send,
) -> impl Stream<Item = io::Result<Gathered<security::Stream>>> + Send {
    streams.map(|stream| stream.map(Gathered::new))
}
