//! A connection to a leader over which every request is sent by its own task.
//!
//! tonic's channel hands a request to a task through a queue, that one to the connection's, and a third one waits for the
//! answer: each is a turn of the runtime with cold caches, several times for each request. Here the request's task writes
//! its frames into the connection's buffers and reads its answer from there; the connection's task moves bytes.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use h2::client::{Builder, Connection, SendRequest};
use h2::{Ping, PingPong, RecvStream};
use http_body::Frame;
use security::{Badge, Dialer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use tonic::codegen::http::{Request, Response, Uri};
use tonic::codegen::{Body, Bytes, Service};
use types::limits::HEADER_BYTES_MAX;

use crate::gather::Gathered;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A leader that vanished without a word (a lost host, a cut cable) is noticed after both together.
const PINGS: Pings = Pings { interval: Duration::from_secs(2), timeout: Duration::from_secs(3) };
const WINDOW_BYTES: u32 = 16 << 20;
/// Streams that were given up and whose last frames may still come.
const RESETS_MAX: usize = 4096;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A connection to one leader, made when it is used, and again when it must. A service for tonic's clients whose requests
/// have one message: what they send is known before the answer is waited for.
#[derive(Clone)]
pub(crate) struct Line(Arc<Inner>);

struct Inner {
    uri: Uri,
    dial: Dial,
    /// Shown with every request.
    badge: Badge,
    /// Held while a connection is made: whoever comes meanwhile waits for the same one.
    open: Mutex<Option<SendRequest<Bytes>>>,
}

/// How a connection is made.
pub(super) enum Dial {
    /// As it is.
    Plain,
    /// Inside TLS, with a peer whose certificate has this name instead of the host.
    Tls(Dialer, Option<String>),
}

/// How often a leader is asked whether it is there, and how long it may take to answer.
#[derive(Debug, Clone, Copy)]
struct Pings {
    interval: Duration,
    timeout: Duration,
}

/// The body of an answer.
pub(crate) struct Received {
    stream: RecvStream,
    /// Whether all of its data has come: trailers are next.
    read: bool,
}

impl Line {
    /// To the host and port of `uri`.
    pub(super) fn new(uri: Uri, dial: Dial, badge: Badge) -> Self {
        Self(Arc::new(Inner { uri, dial, badge, open: Mutex::default() }))
    }

    /// Where it leads.
    pub(super) fn uri(&self) -> &Uri {
        &self.0.uri
    }
}

impl Inner {
    /// A handle of the connection, which is made if there is none that takes requests.
    async fn connection(&self) -> io::Result<SendRequest<Bytes>> {
        let mut open = self.open.lock().await;
        if let Some(connection) = &mut *open {
            // At once: this handle opens no streams of its own. One that is ending takes no more of them.
            if poll_fn(|cx| connection.poll_ready(cx)).await.is_ok() {
                return Ok(connection.clone());
            }
            *open = None;
        }
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
        let made = timeout(CONNECT_TIMEOUT, self.connect()).await.map_err(late)??;
        *open = Some(made.clone());
        Ok(made)
    }

    async fn connect(&self) -> io::Result<SendRequest<Bytes>> {
        match &self.dial {
            Dial::Plain => begin(connect(&self.uri).await?, PINGS).await,
            Dial::Tls(dialer, name) => {
                begin(dialer.connect_certified(&self.uri, name.as_deref()).await?, PINGS).await
            }
        }
    }
}

/// A connection to the host and port of `uri`.
async fn connect(uri: &Uri) -> io::Result<TcpStream> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let tcp = TcpStream::connect((host, uri.port_u16().unwrap_or_default())).await?;
    // Without it a request waits 40 ms for a delayed acknowledgement.
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

/// Speaks HTTP/2 over `transport` in a task that ends with it.
async fn begin<T>(transport: T, pings: Pings) -> io::Result<SendRequest<Bytes>>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut settings = Builder::new();
    settings
        .initial_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_header_list_size(HEADER_BYTES_MAX)
        .enable_push(false)
        // Each answer that is given up is a stream reset, and what was under way for it then comes for a stream that is gone.
        // The other end is ours: that is no attack, and must not end the connection of all others.
        .max_concurrent_reset_streams(RESETS_MAX)
        .max_local_error_reset_streams(None);
    let made = settings.handshake(Gathered::new(transport)).await;
    let (requests, mut connection) = made.map_err(io::Error::other)?;
    let silence = silence(connection.ping_pong(), pings);
    tokio::spawn(keep(connection, silence));
    Ok(requests)
}

/// Moves bytes until the connection ends, or its other end is silent. What is open then breaks.
async fn keep<T: AsyncRead + AsyncWrite + Unpin>(
    connection: Connection<Gathered<T>, Bytes>,
    silence: impl Future<Output = ()>,
) {
    tokio::select! {
        ended = connection => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection to a leader broke");
            }
        }
        () = silence => tracing::warn!("a leader does not answer pings: its connection is given up"),
    }
}

/// Returns when a ping is not answered in time.
async fn silence(pings: Option<PingPong>, Pings { interval, timeout: patience }: Pings) {
    // Only a second taker of the pings gets none.
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        sleep(interval).await;
        match timeout(patience, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection has ended, which is said there.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

impl Service<Request<tonic::body::Body>> for Line {
    type Response = Response<Received>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let Self(line) = self.clone();
        Box::pin(async move {
            let mut connection = line.connection().await?;
            let (mut head, body) = request.into_parts();
            line.badge.show(&mut head.headers);
            let message = message(body).await?;
            let (answer, mut sending) = connection.send_request(Request::from_parts(head, ()), false)?;
            // Whatever the other end has no room for yet stays in memory, where it is anyway.
            sending.send_data(message, true)?;
            let answer = answer.await?;
            Ok(answer.map(|stream| Received { stream, read: false }))
        })
    }
}

/// All of a body: one message, which comes in one piece.
async fn message(body: tonic::body::Body) -> Result<Bytes, BoxError> {
    let mut body = std::pin::pin!(body);
    let mut whole = Bytes::new();
    while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        let Ok(data) = frame?.into_data() else { continue };
        whole = match whole.is_empty() {
            true => data,
            false => [whole, data].concat().into(),
        };
    }
    Ok(whole)
}

impl Body for Received {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if !self.read {
            if let Some(data) = ready!(self.stream.poll_data(cx)) {
                let data = data?;
                // It fails only for more than was received.
                _ = self.stream.flow_control().release_capacity(data.len());
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            self.read = true;
        }
        let trailers = ready!(self.stream.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Line").field(&self.0.uri).finish()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;
    use tokio::net::TcpListener;

    use super::*;

    fn request() -> Request<tonic::body::Body> {
        Request::post("http://leader:1/").body(tonic::body::Body::empty()).unwrap()
    }

    #[tokio::test]
    async fn a_request_breaks_when_its_leader_falls_silent() {
        let (ours, theirs) = duplex(1 << 16);
        let leader = tokio::spawn(async move {
            let mut connection = h2::server::handshake(theirs).await.unwrap();
            let taken = connection.accept().await;
            (connection, taken)
        });
        let often = Duration::from_millis(20);
        let mut connection = begin(ours, Pings { interval: often, timeout: often }).await.unwrap();
        let head = request().map(|_| ());
        let (answer, _) = connection.send_request(head, true).unwrap();
        // It has the request and goes on no more.
        let _silent = leader.await.unwrap();
        assert!(timeout(Duration::from_secs(20), answer).await.expect("the silence is noticed").is_err());
    }

    #[tokio::test]
    async fn a_connection_that_ends_is_followed_by_another() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        // Answers one request for each connection.
        tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let mut connection = h2::server::handshake(tcp).await.unwrap();
                let (_, mut answer) = connection.accept().await.unwrap().unwrap();
                answer.send_response(Response::new(()), true).unwrap();
                connection.graceful_shutdown();
                while connection.accept().await.is_some() {}
            }
        });
        let mut line = Line::new(uri, Dial::Plain, Badge::default());
        for _ in 0..3 {
            assert_eq!(line.call(request()).await.unwrap().status(), 200);
            let ended = || async {
                let mut open = line.0.open.lock().await;
                let connection = open.as_mut().unwrap();
                poll_fn(|cx| connection.poll_ready(cx)).await.is_err()
            };
            while !ended().await {
                sleep(Duration::from_millis(1)).await;
            }
        }
    }
}
