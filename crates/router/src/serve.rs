//! A router's life: bind, serve, withdraw, drain.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use proto::worker::registry_server::RegistryServer;
use security::{Acceptor, Badge, Clients, Dialer, KeyFile, SharedSecret, Tokens};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::call::random_u64;
use crate::config::Access;
use crate::discovery::Discovery;
use crate::doorway::{Doorway, Loading};
use crate::gate::{Callers, Gate};
use crate::grpc::Health;
use crate::metrics::Metrics;
use crate::pipeline::Shared;
use crate::registry::Desk;
use crate::running::Running;
use crate::text::Text;
use crate::tuned::Tuning;
use crate::workers::Groups;
use crate::{Change, Config, Error, ModelFiles, grpc, http, tuned};

/// Time for the last bytes of finished answers to leave before connections are dropped.
const FLUSH_GRACE: Duration = Duration::from_millis(200);
/// Per cent of a start after which the text files are read.
const FILES_PERCENT: u32 = 10;

/// Where a router listens, with the ports the system chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// gRPC.
    pub grpc: SocketAddr,
    /// HTTP, when it was asked for.
    pub http: Option<SocketAddr>,
}

/// How far a start is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Both listeners answer: probes with how far the start is, all else with a refusal.
    Listening(Bound),
    /// The text files are read, and requests are taken.
    Serving(Bound),
}

/// Serves until `shutdown`, then withdraws and drains as `config` says. `bound` is called once, as soon as requests are
/// taken. Needs a tokio runtime with its time and net drivers.
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
    let mut bound = Some(bound);
    let told = |start| match start {
        Start::Serving(at) => bound.take().into_iter().for_each(|bound| bound(at)),
        Start::Listening(_) => {}
    };
    serve_changing(config, move || Ok(files), told, shutdown, changes).await
}

/// As [`serve`], and goes on with other configurations as they come, without dropping a request. The listeners are up before
/// `files` are read, which may take a while; `told` hears of both.
///
/// # Errors
/// As [`serve`], and what `files` says.
pub async fn serve_changing(
    config: Config,
    files: impl FnOnce() -> Result<ModelFiles, Error> + Send + 'static,
    mut told: impl FnMut(Start),
    shutdown: CancellationToken,
    changes: mpsc::Receiver<Change>,
) -> Result<(), Error> {
    let Doors { grpc: grpc_door, http: http_door, callers, dialer } = Doors::new(&config.access)?;
    let badge = Badge::new(config.access.secret.as_ref());
    config.access.secret.iter().for_each(SharedSecret::watch);
    // Watch tasks and listeners end when this function does, however it ends.
    let stop = CancellationToken::new();
    let _stop_on_exit = stop.clone().drop_guard();
    let router_id = format!("router-{:016x}", random_u64());
    let groups = Arc::new(Groups::new(dialer, badge, router_id, stop.clone()));
    let discovery = Discovery::new(Arc::clone(&groups), &config)?;
    let desk = desk(&config, &discovery, &groups)?;
    let listener = bind(config.grpc_listen, "--grpc-listen").await?;
    let http = match config.http_listen {
        Some(address) => Some(bind(address, "--http-listen").await?),
        None => None,
    };
    let places = Bound {
        grpc: local_address(&listener, config.grpc_listen, "--grpc-listen")?,
        http: match (&http, config.http_listen) {
            (Some(listener), Some(asked)) => Some(local_address(listener, asked, "--http-listen")?),
            _ => None,
        },
    };
    let refuse = CancellationToken::new();
    let (loading, tuning) = (Loading::default(), Arc::new(Tuning::new(&config)));
    let metrics = Arc::new(Metrics::new(&groups));
    let gate = Arc::new(Gate::new(callers, Arc::clone(&metrics)));
    let health = Health::new().await;
    let grpc_doorway = Doorway::new(grpc::start(&health, loading.clone()));
    let http_doorway = Doorway::new(http::start(loading.clone()));
    let mut grpc = AbortOnDropHandle::new(tokio::spawn(grpc::serve(
        (listener, grpc_door),
        (grpc_doorway.clone(), Arc::clone(&gate)),
        config.connection_age_max,
        refuse.clone(),
    )));
    let mut http = AbortOnDropHandle::new(tokio::spawn(serve_http(
        http.map(|listener| (listener, http_door)),
        http_doorway.clone(),
        Arc::clone(&tuning),
        refuse.clone(),
    )));
    told(Start::Listening(places));
    let text = tokio::select! {
        text = read_text(files, loading) => text?,
        // Nothing is open yet.
        () = shutdown.cancelled() => return Ok(()),
    };
    let shared = share(&config, (text, groups), (gate, metrics), tuning);
    tokio::spawn(stop.clone().run_until_cancelled_owned(turn_away(shutdown.clone(), Arc::clone(&shared))));
    tokio::spawn(stop.clone().run_until_cancelled_owned(Arc::clone(&discovery).keep_asking()));
    let changing = tuned::keep_changing(Arc::clone(&shared), discovery, changes);
    tokio::spawn(stop.clone().run_until_cancelled_owned(changing));
    grpc_doorway.open(grpc::routes(&shared, desk, &health)?);
    http_doorway.open(http::routes(Arc::clone(&shared)));
    tokio::spawn(stop.run_until_cancelled_owned(health.keep_reporting(Arc::clone(&shared))));
    told(Start::Serving(places));
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

/// Where groups register, if they may.
fn desk(
    config: &Config,
    discovery: &Arc<Discovery>,
    groups: &Arc<Groups>,
) -> Result<Option<RegistryServer<Desk>>, Error> {
    match (config.registration_hold, &config.access.secret) {
        (None, _) => Ok(None),
        (Some(_), None) => Err(Error::NoSecret),
        (Some(_), Some(secret)) => {
            let (discovery, groups) = (Arc::clone(discovery), Arc::clone(groups));
            Ok(Some(RegistryServer::new(Desk { discovery, groups, secret: secret.clone() })))
        }
    }
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

/// What turns text into tokens, which takes a large vocabulary seconds.
async fn read_text(
    files: impl FnOnce() -> Result<ModelFiles, Error> + Send + 'static,
    loading: Loading,
) -> Result<Option<Text>, Error> {
    let read = move || {
        let files = files()?;
        loading.set(FILES_PERCENT);
        Text::load_telling(&files, |percent| loading.set(percent))
    };
    let text = tokio::task::spawn_blocking(read).await;
    text.map_err(|error| Error::File { file: "tokenizer.json", reason: error.to_string() })?
}

fn share(
    config: &Config,
    (text, groups): (Option<Text>, Arc<Groups>),
    (gate, metrics): (Arc<Gate>, Arc<Metrics>),
    tuning: Arc<Tuning>,
) -> Arc<Shared> {
    let closing = CancellationToken::new();
    Arc::new(Shared {
        gate,
        metrics,
        groups,
        text,
        model_name: config.model_name.clone(),
        tuning,
        running: Arc::new(Running::new(closing.clone())),
        withdrawn: CancellationToken::new(),
        closing,
        tracing: config.tracing,
    })
}

async fn turn_away(shutdown: CancellationToken, shared: Arc<Shared>) {
    shutdown.cancelled().await;
    shared.withdrawn.cancel();
}

async fn serve_http(
    listener: Option<(TcpListener, Acceptor)>,
    doorway: Doorway<Router>,
    tuning: Arc<Tuning>,
    refuse: CancellationToken,
) -> Result<(), Error> {
    let Some(listener) = listener else { return std::future::pending().await };
    http::listen(listener, doorway, move || tuning.get().http_patience, refuse).await;
    Ok(())
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
