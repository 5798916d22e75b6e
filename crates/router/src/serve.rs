//! A router's life: bind, serve, withdraw, drain.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use proto::v1::cohort_server::CohortServer;
use proto::vllm::control_server::ControlServer;
use proto::vllm::inference_server::InferenceServer;
use proto::worker::registry_server::RegistryServer;
use security::{Acceptor, Badge, Clients, Dialer, KeyFile, Tokens, incoming};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tower::util::MapResponseLayer;
use types::limits::{HEADER_BYTES_MAX, MESSAGE_BYTES_MAX};

use crate::call::random_u64;
use crate::config::Access;
use crate::discovery::Discovery;
use crate::gate::{Callers, Gate, GateLayer};
use crate::gather::Gathered;
use crate::metrics::Metrics;
use crate::pipeline::Shared;
use crate::registry::Desk;
use crate::running::Running;
use crate::service::Service;
use crate::services::Services;
use crate::text::Text;
use crate::tuned::Tuning;
use crate::workers::{Groups, Progress};
use crate::{Change, Config, Error, ModelFiles, http, tuned, undecoded, vllm};

/// A caller that vanished without a word is noticed after both together.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// Time for the last bytes of finished answers to leave before connections are dropped.
const FLUSH_GRACE: Duration = Duration::from_millis(200);
/// What health is reported for: the server as a whole, and each service.
const HEALTH_NAMES: [&str; 4] = ["", "cohort.v1.Cohort", "vllm.Inference", "vllm.Control"];

/// Where a router listens, with the ports the system chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// gRPC.
    pub grpc: SocketAddr,
    /// HTTP, when it was asked for.
    pub http: Option<SocketAddr>,
}

/// Serves until `shutdown`, then withdraws and drains as `config` says. `bound` is called once, as soon as the
/// listeners answer. Needs a tokio runtime with its time and net drivers.
///
/// # Errors
/// [`Error::Bind`] for an address that cannot be had, [`Error::File`] for a tokenizer or template that cannot be
/// used, [`Error::NoWorkers`] and [`Error::WorkerAddress`] for a bad list of workers, [`Error::Security`] for certificates
/// and keys that cannot be used, [`Error::Serve`] when a
/// listener breaks.
pub async fn serve(
    config: Config,
    files: ModelFiles,
    bound: impl FnOnce(Bound),
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let (_, changes) = mpsc::channel(1);
    serve_changing(config, files, bound, shutdown, changes).await
}

/// As [`serve`], and goes on with other configurations as they come, without dropping a request.
///
/// # Errors
/// As [`serve`].
pub async fn serve_changing(
    config: Config,
    files: ModelFiles,
    bound: impl FnOnce(Bound),
    shutdown: CancellationToken,
    changes: mpsc::Receiver<Change>,
) -> Result<(), Error> {
    let Doors { grpc: grpc_door, http: http_door, callers, dialer } = Doors::new(&config.access)?;
    let badge = Badge::new(config.access.secret.as_ref());
    // Watch tasks and listeners end when this function does, however it ends.
    let stop = CancellationToken::new();
    let _stop_on_exit = stop.clone().drop_guard();
    let router_id = format!("router-{:016x}", random_u64());
    let groups = Arc::new(Groups::new(dialer, badge, router_id, stop.clone()));
    let discovery = Discovery::new(Arc::clone(&groups), &config)?;
    let desk = match (config.registration_hold, &config.access.secret) {
        (None, _) => None,
        (Some(_), None) => return Err(Error::NoSecret),
        (Some(_), Some(secret)) => {
            let (discovery, groups) = (Arc::clone(&discovery), Arc::clone(&groups));
            Some(RegistryServer::new(Desk { discovery, groups, secret: secret.clone() }))
        }
    };
    let grpc = bind(config.grpc_listen, "--grpc-listen").await?;
    let http = match config.http_listen {
        Some(address) => Some(bind(address, "--http-listen").await?),
        None => None,
    };
    let places = Bound {
        grpc: local_address(&grpc, config.grpc_listen, "--grpc-listen")?,
        http: match (&http, config.http_listen) {
            (Some(listener), Some(asked)) => Some(local_address(listener, asked, "--http-listen")?),
            _ => None,
        },
    };
    let shared = share(&config, files, groups, callers).await?;
    tokio::spawn(stop.clone().run_until_cancelled_owned(turn_away(shutdown.clone(), Arc::clone(&shared))));
    tokio::spawn(stop.clone().run_until_cancelled_owned(Arc::clone(&discovery).keep_asking()));
    let changing = tuned::keep_changing(Arc::clone(&shared), discovery, changes);
    tokio::spawn(stop.clone().run_until_cancelled_owned(changing));

    let refuse = CancellationToken::new();
    let mut grpc = AbortOnDropHandle::new(tokio::spawn(serve_grpc(
        (grpc, grpc_door),
        Arc::clone(&shared),
        (config.connection_age_max, desk),
        (refuse.clone(), stop.clone()),
    )));
    let http = http.map(|listener| (listener, http_door));
    let mut http =
        AbortOnDropHandle::new(tokio::spawn(serve_http(http, Arc::clone(&shared), refuse.clone())));
    bound(places);
    tokio::select! {
        () = shutdown.cancelled() => {}
        ended = &mut grpc => return joined("gRPC", ended),
        ended = &mut http => return joined("HTTP", ended),
    }
    tracing::info!("withdrawing: health says NOT_SERVING");
    tokio::time::sleep(shared.tuning.get().withdraw_grace).await;
    refuse.cancel();
    drain(&shared, grpc).await;
    Ok(())
}

/// What the listeners and connections were told to be protected with, ready for use.
struct Doors {
    grpc: Acceptor,
    http: Acceptor,
    callers: Callers,
    dialer: Option<Dialer>,
}

impl Doors {
    fn new(access: &Access) -> Result<Self, Error> {
        let tls = access.tls.as_ref();
        let doors = Self {
            grpc: Acceptor::new(tls, Clients::Required, &[b"h2"])?,
            // Probes have no certificate; the gate tells them from the others.
            http: Acceptor::new(tls, Clients::Asked, &[b"http/1.1"])?,
            callers: Callers {
                keys: access.keys.as_deref().map(KeyFile::open).transpose()?,
                tokens: access.jwt.clone().map(Tokens::open).transpose()?,
            },
            dialer: access.group_tls.as_ref().map(|tls| Dialer::new(tls, &[b"h2"])).transpose()?,
        };
        doors.grpc.watch();
        doors.http.watch();
        doors.callers.watch();
        doors.dialer.iter().for_each(Dialer::watch);
        Ok(doors)
    }
}

async fn bind(address: SocketAddr, flag: &'static str) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error::Bind { address, flag, source })
}

fn local_address(
    listener: &TcpListener,
    address: SocketAddr,
    flag: &'static str,
) -> Result<SocketAddr, Error> {
    listener.local_addr().map_err(|source| Error::Bind { address, flag, source })
}

async fn share(
    config: &Config,
    files: ModelFiles,
    groups: Arc<Groups>,
    callers: Callers,
) -> Result<Arc<Shared>, Error> {
    let text = tokio::task::spawn_blocking(move || Text::load(&files)).await;
    let text = text.map_err(|error| Error::File { file: "tokenizer.json", reason: error.to_string() })??;
    let closing = CancellationToken::new();
    let metrics = Arc::new(Metrics::new(&groups));
    Ok(Arc::new(Shared {
        gate: Arc::new(Gate::new(callers, Arc::clone(&metrics))),
        metrics,
        groups,
        text,
        model_name: config.model_name.clone(),
        tuning: Tuning::new(config),
        running: Arc::new(Running::new(closing.clone())),
        withdrawn: CancellationToken::new(),
        closing,
        tracing: config.tracing,
    }))
}

async fn turn_away(shutdown: CancellationToken, shared: Arc<Shared>) {
    shutdown.cancelled().await;
    shared.withdrawn.cancel();
}

async fn serve_grpc(
    (listener, door): (TcpListener, Acceptor),
    shared: Arc<Shared>,
    (age_max, desk): (Duration, Option<RegistryServer<Desk>>),
    (refuse, stop): (CancellationToken, CancellationToken),
) -> Result<(), Error> {
    let broken = |reason: String| Error::Serve { what: "gRPC", reason };
    let reporter = HealthReporter::new();
    report_health(&reporter, false).await;
    let health = HealthServer::new(HealthService::from_health_reporter(reporter.clone()));
    tokio::spawn(stop.run_until_cancelled_owned(keep_reporting(reporter, Arc::clone(&shared))));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("cohort.v1.Cohort")
            .with_service_name("vllm.Inference")
            .with_service_name("vllm.Control")
            .with_service_name("grpc.health.v1.Health")
    };
    let cohort = CohortServer::new(Service::new(Arc::clone(&shared)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let inference = InferenceServer::new(vllm::Inference::new(Arc::clone(&shared)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let gate = GateLayer(Arc::clone(&shared.gate));
    let control = ControlServer::new(vllm::Control::new(shared)).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut others = Routes::new(inference).add_service(control).add_service(health);
    others = others.add_service(reflection().build_v1().map_err(|error| broken(error.to_string()))?);
    others = others.add_service(reflection().build_v1alpha().map_err(|error| broken(error.to_string()))?);
    if let Some(desk) = desk {
        others = others.add_service(desk);
    }
    let services = Services { cohort, others: others.prepare() };
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
        .layer(gate)
        .layer(MapResponseLayer::new(undecoded::explain))
        .serve_with_incoming_shutdown(services, gathered(incoming(listener, door)), refuse.cancelled_owned())
        .await
        .map_err(|error| broken(error.to_string()))
}

/// Connections that write once a turn.
fn gathered(
    streams: impl Stream<Item = io::Result<security::Stream>> + Send,
) -> impl Stream<Item = io::Result<Gathered<security::Stream>>> + Send {
    streams.map(|stream| stream.map(Gathered::new))
}

async fn serve_http(
    listener: Option<(TcpListener, Acceptor)>,
    shared: Arc<Shared>,
    refuse: CancellationToken,
) -> Result<(), Error> {
    let Some(listener) = listener else { return std::future::pending().await };
    let routes = http::routes(Arc::clone(&shared));
    http::listen(listener, routes, move || shared.tuning.get().http_patience, refuse).await;
    Ok(())
}

async fn keep_reporting(reporter: HealthReporter, shared: Arc<Shared>) {
    let mut changes = shared.groups.changes();
    let mut reported = false;
    loop {
        let serving = shared.groups.progress() == Progress::Serving && !shared.withdrawn.is_cancelled();
        // Groups also change by every load report; who watches health is told of changes of health only.
        if serving != reported {
            report_health(&reporter, serving).await;
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

async fn report_health(reporter: &HealthReporter, serving: bool) {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in HEALTH_NAMES {
        reporter.set_service_status(name, status).await;
    }
}

/// Lets open requests finish, up to the grace, then ends them. Connections that only watch health do not count.
async fn drain(shared: &Shared, mut server: AbortOnDropHandle<Result<(), Error>>) {
    let idle = async {
        shared.tuning.room().emptied().await;
        tokio::time::sleep(FLUSH_GRACE).await;
    };
    tokio::select! {
        _ = &mut server => {}
        () = idle => {}
        () = tokio::time::sleep(shared.tuning.get().drain_grace) => {
            tracing::warn!("the drain grace is over: ending the open requests");
            shared.closing.cancel();
            tokio::time::sleep(FLUSH_GRACE).await;
        }
    }
}

fn joined(what: &'static str, ended: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<(), Error> {
    match ended {
        Ok(Ok(())) => Err(Error::Serve { what, reason: "the listener closed".to_owned() }),
        Ok(Err(error)) => Err(error),
        Err(error) => Err(Error::Serve { what, reason: error.to_string() }),
    }
}
