//! Connections of the HTTP port, none of which can hold a place for nothing: a caller that is slow to send its request,
//! silent between requests, or does not read its answer is cut off.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use security::{Acceptor, Stream};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use types::limits::HEADER_BYTES_MAX;

use crate::config::HttpPatience;
use crate::doorway::Doorway;
use crate::gate::Certified;

/// Most connections at once; further ones wait to be accepted.
const CONNECTIONS_MAX: usize = 16_384;
/// The system may be out of file descriptors: others have to close first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `refuse`; then open answers are finished and idle connections closed.
pub(crate) async fn serve(
    (listener, acceptor): (TcpListener, Acceptor),
    routes: Doorway<Router>,
    patience: impl Fn() -> HttpPatience,
    refuse: CancellationToken,
) {
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().max_buf_size(HEADER_BYTES_MAX as usize);
    builder.http1().timer(TokioTimer::new()).keep_alive(true);
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, stream) = tokio::select! {
            () = refuse.cancelled() => break,
            (place, accepted) = accepted => match accepted {
                Ok((stream, _)) => {
                    if let Err(error) = stream.set_nodelay(true) {
                        tracing::debug!(%error, "a connection keeps its delay");
                    }
                    (place, stream)
                }
                Err(error) => {
                    tracing::debug!(%error, "a connection was not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let (mut builder, routes, acceptor) = (builder.clone(), routes.clone(), acceptor.clone());
        let patience = patience();
        // It begins when the connection waits for a head, so it bounds the silence between requests too.
        builder.http1().header_read_timeout(patience.head);
        let watcher = graceful.watcher();
        tokio::spawn(async move {
            match acceptor.accept(stream).await {
                Ok(stream) => {
                    let service = TowerToHyperService::new(routes.map_request(noted(&acceptor, &stream)));
                    let io = TokioIo::new(impatient(stream, patience));
                    let connection = watcher.watch(builder.serve_connection(io, service).into_owned());
                    if let Err(error) = connection.await {
                        tracing::debug!(error, "a connection ended");
                    }
                }
                Err(error) => tracing::debug!(%error, "a TLS handshake failed"),
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// Notes on every request what its connection's other end has shown, where something was asked of it.
fn noted<B>(acceptor: &Acceptor, stream: &Stream) -> impl Fn(Request<B>) -> Request<B> + Clone + use<B> {
    let certified = acceptor.asks_for_certificates().then(|| Certified(stream.is_certified()));
    move |mut request: Request<B>| {
        if let Some(certified) = certified {
            request.extensions_mut().insert(certified);
        }
        request
    }
}

/// A stream whose writes fail when nobody takes them for too long.
fn impatient(stream: Stream, patience: HttpPatience) -> Pin<Box<TimeoutStream<Stream>>> {
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(patience.write));
    Box::pin(stream)
}
