//! Listeners that take TLS connections.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::SingleCertAndKey;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::{Stream, files, provider};
use crate::Error;
use crate::live::Live;

/// Longest a caller may take to agree on keys.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Connections that may be agreeing on keys at once; further ones wait to be accepted.
const HANDSHAKES_MAX: usize = 512;
/// Connections that were accepted and that nobody has taken yet.
const READY_MAX: usize = 64;
/// The system may be out of file descriptors: others have to close first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The files a listener needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTls {
    /// Its certificate, and those that lead to an authority the callers know; PEM.
    pub certificate: PathBuf,
    /// The certificate's key; PEM.
    pub key: PathBuf,
    /// Authorities of the callers' certificates; without it callers need none.
    pub client_ca: Option<PathBuf>,
}

/// What a listener wants of its callers where there is an authority for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clients {
    /// A certificate.
    Required,
    /// A certificate if they have one: probes have none, and whoever serves them decides
    /// ([`Stream::is_certified`]).
    Asked,
    /// Nothing.
    Anybody,
}

/// Takes connections of a listener, with TLS or without. New connections are met with the files as they are then.
#[derive(Debug, Clone)]
pub struct Acceptor {
    live: Option<Arc<Live<ServerConfig>>>,
    asks: bool,
}

impl Acceptor {
    /// For a listener with these files, if it has any, that speaks the protocols `alpn`, best first.
    ///
    /// # Errors
    /// What is wrong with a file.
    pub fn new(
        tls: Option<&ServerTls>,
        clients: Clients,
        alpn: &'static [&'static [u8]],
    ) -> Result<Self, Error> {
        let Some(tls) = tls.cloned() else { return Ok(Self { live: None, asks: false }) };
        let asks = tls.client_ca.is_some() && clients != Clients::Anybody;
        let files = [Some(&tls.certificate), Some(&tls.key), tls.client_ca.as_ref()];
        let files = files.into_iter().flatten().cloned().collect();
        let make = move |_: Option<&ServerConfig>| config(&tls, clients, alpn);
        Ok(Self { live: Some(Live::new("a listener's certificates", files, make)?), asks })
    }

    /// Reads the files again whenever they change. Inside a runtime.
    pub fn watch(&self) {
        if let Some(live) = &self.live {
            live.watch();
        }
    }

    /// Whether callers are asked for a certificate, or must have one.
    #[must_use]
    pub const fn asks_for_certificates(&self) -> bool {
        self.asks
    }

    /// Agrees on keys with whoever connected.
    ///
    /// # Errors
    /// What the handshake failed of, or that it took too long.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<Stream> {
        let Some(live) = &self.live else { return Ok(Stream::Plain(stream)) };
        let handshake = TlsAcceptor::from(live.get()).accept(stream);
        let agreed = tokio::time::timeout(HANDSHAKE_MAX, handshake).await;
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long");
        Ok(Stream::Tls(Box::new(agreed.map_err(late)??)))
    }
}

fn config(tls: &ServerTls, clients: Clients, alpn: &[&[u8]]) -> Result<ServerConfig, Error> {
    let pair = files::pair(&tls.certificate, &tls.key)?;
    let builder = ServerConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| no_versions(tls, &error))?;
    let builder = match tls.client_ca.as_deref().filter(|_| clients != Clients::Anybody) {
        Some(path) => builder.with_client_cert_verifier(verifier(path, clients)?),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(pair)));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

fn verifier(path: &Path, clients: Clients) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    let roots = Arc::new(files::authorities(path)?);
    let builder = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let builder = match clients {
        Clients::Asked => builder.allow_unauthenticated(),
        Clients::Required | Clients::Anybody => builder,
    };
    builder.build().map_err(|error| Error::Content { path: path.to_owned(), reason: error.to_string() })
}

fn no_versions(tls: &ServerTls, error: &rustls::Error) -> Error {
    Error::Content { path: tls.certificate.clone(), reason: error.to_string() }
}

/// The connections of `listener`, in the order in which they were ready: one that is slow to agree on keys keeps nobody
/// waiting. The listener closes when the stream is dropped. Inside a runtime.
pub fn incoming(
    listener: TcpListener,
    acceptor: Acceptor,
) -> impl tokio_stream::Stream<Item = io::Result<Stream>> + Send {
    let (ready, taken) = mpsc::channel(READY_MAX);
    tokio::spawn(accept_all(listener, acceptor, ready));
    ReceiverStream::new(taken).map(Ok)
}

async fn accept_all(listener: TcpListener, acceptor: Acceptor, ready: mpsc::Sender<Stream>) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, stream) = tokio::select! {
            () = ready.closed() => return,
            (place, accepted) = accepted => match accepted {
                Ok((stream, _)) => (place, stream),
                Err(error) => {
                    tracing::debug!(%error, "a connection was not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        // Without it a token waits 40 ms for a delayed acknowledgement.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection keeps its delay");
        }
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        tokio::spawn(async move {
            match acceptor.accept(stream).await {
                Ok(stream) => _ = ready.send(stream).await,
                Err(error) => tracing::debug!(%error, "a TLS handshake failed"),
            }
            drop(place);
        });
    }
}
