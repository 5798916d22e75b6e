//! Connections of the HTTP port, none of which can hold a place for nothing: a caller that is slow to send its request,
//! silent between requests, or does not read its answer is cut off.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;

use crate::config::HttpPatience;

/// Most connections at once; further ones wait to be accepted.
const CONNECTIONS_MAX: usize = 16_384;
/// The system may be out of file descriptors: others have to close first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `refuse`; then open answers are finished and idle connections closed.
pub(crate) async fn serve(
    listener: TcpListener,
    routes: Router,
    patience: HttpPatience,
    refuse: CancellationToken,
) {
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    // The time of a head begins when the connection waits for it, so it bounds the silence between requests too.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(patience.head).keep_alive(true);
    let service = TowerToHyperService::new(routes);
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
                Ok((stream, _)) => (place, stream),
                Err(error) => {
                    tracing::debug!(%error, "a connection was not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let connection = builder.serve_connection(TokioIo::new(impatient(stream, patience)), service.clone());
        let connection = graceful.watch(connection.into_owned());
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error, "a connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// A stream whose writes fail when nobody takes them for too long.
fn impatient(stream: TcpStream, patience: HttpPatience) -> Pin<Box<TimeoutStream<TcpStream>>> {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection keeps its delay");
    }
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(patience.write));
    Box::pin(stream)
}
