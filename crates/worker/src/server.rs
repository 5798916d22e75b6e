//! The leader's listener: open before anything is loaded, so that routers and probes see the start.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use proto::Failure;
use proto::worker::worker_server::WorkerServer;
use security::{Acceptor, Clients, SECRET_HEADER, SharedSecret, incoming};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::{Request, Status};
use tonic_health::ServingStatus;
use types::limits::{HEADER_BYTES_MAX, MESSAGE_BYTES_MAX};

use crate::flight::FlightRecorder;
use crate::guide::Kitchen;
use crate::inbox::Inbox;
use crate::metrics::{self, FollowerMetrics, Leading, Metrics, Shown};
use crate::registrar::Registrar;
use crate::service::Service;
use crate::standing::Standing;
use crate::state::StatePublisher;
use crate::{Config, Error, boot};

/// HTTP/2 pings while idle, and how long one may go unanswered: a router that vanished is noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time the last messages have to reach routers once nothing is open any more.
const CLOSE_GRACE: Duration = Duration::from_secs(1);
/// Threads for gRPC; tokens are computed elsewhere.
const IO_THREADS: usize = 1;
/// A name whose health is SERVING while requests are taken.
const SERVICE_NAME: &str = "cohort.worker.v1.Worker";
/// The server as a whole: SERVING while requests are taken and a router sends them.
const READY_NAME: &str = "";
/// A name whose health is SERVING for as long as this process answers, whatever phase it is in: for liveness probes.
const LIVE_NAME: &str = "live";

/// The running server.
pub(crate) struct GrpcServer {
    runtime: Runtime,
    task: JoinHandle<Result<(), tonic::transport::Error>>,
    closing: CancellationToken,
    address: SocketAddr,
}

impl GrpcServer {
    /// Listens where `config` says, for routers and, if asked to, for whoever watches.
    pub(crate) fn start(
        config: &Config,
        inbox: Inbox,
        state: &Arc<StatePublisher>,
        metrics: &Arc<Metrics>,
        flight: &Arc<FlightRecorder>,
    ) -> Result<Self, Error> {
        let tls = config.access.tls.as_ref();
        let door = Acceptor::new(tls, Clients::Required, &[b"h2"])?;
        // Whoever watches, and the kubelet, have no certificate.
        let (listener, address) =
            listen(config.listen).map_err(|source| Error::Listen { address: config.listen, source })?;
        let watched = Watched::bind(config)?;
        let runtime = runtime("grpc")?;
        let closing = CancellationToken::new();
        let (state, metrics) = (Arc::clone(state), Arc::clone(metrics));
        if let Some(watched) = watched {
            state.metrics_port(watched.address.port());
            let leading =
                Leading { metrics: Arc::clone(&metrics), inbox: inbox.clone(), plan: boot::parallel(config) };
            watched.serve(&runtime, Shown::Leader(leading), Arc::clone(&state));
        }
        if let Some(registrar) = Registrar::new(config, address, &state)? {
            runtime.spawn(registrar.keep_registering());
        }
        let kitchen = Arc::new(Kitchen::new(config.model.clone()));
        let service = Service {
            inbox,
            state: Arc::clone(&state),
            metrics,
            flight: Arc::clone(flight),
            kitchen,
            plan: boot::parallel(config),
            closing: closing.clone(),
        };
        let served = serve((listener, door), (service, config.access.secret.clone()), state, closing.clone());
        let task = runtime.spawn(served);
        Ok(Self { runtime, task, closing, address })
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets open streams deliver their last messages, then closes.
    pub(crate) fn close(self) -> Result<(), Error> {
        self.closing.cancel();
        let Self { runtime, task, .. } = self;
        let outcome = runtime.block_on(async { tokio::time::timeout(CLOSE_GRACE, task).await });
        runtime.shutdown_timeout(Duration::from_millis(100));
        match outcome {
            // Still open after the grace: the connection of a router that does not read.
            Err(_) => Ok(()),
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(Error::Server(error.to_string())),
            Ok(Err(error)) => Err(Error::Server(error.to_string())),
        }
    }
}

/// The listener for whoever watches a rank.
struct Watched {
    listener: TcpListener,
    address: SocketAddr,
    door: Acceptor,
}

impl Watched {
    /// Where `config` says, if it does.
    fn bind(config: &Config) -> Result<Option<Self>, Error> {
        let Some(address) = config.metrics_listen else { return Ok(None) };
        // Whoever watches, and the kubelet, have no certificate.
        let door = Acceptor::new(config.access.tls.as_ref(), Clients::Anybody, &[b"http/1.1"])?;
        let (listener, address) =
            listen(address).map_err(|source| Error::MetricsListen { address, source })?;
        Ok(Some(Self { listener, address, door }))
    }

    fn serve(self, runtime: &Runtime, shown: Shown, state: Arc<StatePublisher>) {
        let Self { listener, address, door } = self;
        tracing::info!(%address, "metrics are served");
        runtime.spawn(async move {
            door.watch();
            metrics::serve(incoming(into_tokio(listener), door), shown, state).await;
        });
    }
}

/// Serves what a follower shows for as long as it is held.
pub(crate) struct FollowerServer {
    _runtime: Runtime,
}

impl FollowerServer {
    /// Listens where `config` says, if it does.
    pub(crate) fn start(
        config: &Config,
        metrics: &Arc<FollowerMetrics>,
        state: &Arc<StatePublisher>,
    ) -> Result<Option<Self>, Error> {
        let Some(watched) = Watched::bind(config)? else { return Ok(None) };
        let runtime = runtime("metrics")?;
        watched.serve(&runtime, Shown::Follower(Arc::clone(metrics)), Arc::clone(state));
        Ok(Some(Self { _runtime: runtime }))
    }
}

fn runtime(name: &'static str) -> Result<Runtime, Error> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(IO_THREADS).thread_name(name).enable_all().build();
    runtime.map_err(|source| Error::Start { what: "the threads that answer callers", source })
}

fn listen(address: SocketAddr) -> std::io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Inside a runtime.
fn into_tokio(listener: TcpListener) -> tokio::net::TcpListener {
    match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => unreachable!("the listener is non-blocking and the runtime runs: {error}"),
    }
}

/// Refuses calls of whoever does not show the cluster's secret, before their messages are read.
fn members_only(mut request: Request<()>, secret: Option<&SharedSecret>) -> Result<Request<()>, Status> {
    let Some(secret) = secret else { return Ok(request) };
    let shown = request.metadata_mut().remove(SECRET_HEADER);
    if shown.is_some_and(|shown| secret.is(shown.as_bytes())) {
        return Ok(request);
    }
    let why = "this port takes calls of its own cluster only: its secret was not shown, or is another one; \
               give both processes the same cluster.secret_file";
    Err(Failure::Unauthenticated { why: why.to_owned() }.into())
}

async fn serve(
    (listener, door): (TcpListener, Acceptor),
    (service, secret): (Service, Option<SharedSecret>),
    state: Arc<StatePublisher>,
    closing: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let (mut states, mut standings) = (state.subscribe(), state.standing());
    reporter.set_service_status(LIVE_NAME, ServingStatus::Serving).await;
    tokio::spawn(async move {
        loop {
            let phase = states.borrow_and_update().phase;
            let serving = phase == i32::from(proto::worker::Phase::Serving);
            let acknowledged = *standings.borrow_and_update() == Standing::Acknowledged;
            for (name, serving) in [(SERVICE_NAME, serving), (READY_NAME, serving && acknowledged)] {
                let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
                reporter.set_service_status(name, status).await;
            }
            let changed = tokio::select! {
                changed = states.changed() => changed,
                changed = standings.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    });
    let worker = WorkerServer::new(service)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    secret.iter().for_each(SharedSecret::watch);
    let worker = InterceptedService::new(worker, move |request| members_only(request, secret.as_ref()));
    door.watch();
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(Some(HEADER_BYTES_MAX))
        .add_service(health)
        .add_service(worker)
        .serve_with_incoming_shutdown(incoming(into_tokio(listener), door), closing.cancelled_owned())
        .await
}
