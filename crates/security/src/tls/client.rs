//! Connections to listeners with TLS.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use rustls::sign::SingleCertAndKey;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use super::{files, provider};
use crate::Error;
use crate::live::Live;

/// The files a caller needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTls {
    /// Authorities of the listeners' certificates; PEM.
    pub ca: PathBuf,
    /// A certificate of its own and the certificate's key, for listeners that want one; PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Makes encrypted connections. New ones are made with the files as they are then.
#[derive(Debug, Clone)]
pub struct Dialer(Arc<Live<ClientConfig>>);

impl Dialer {
    /// With these files, for the protocols `alpn`, best first.
    ///
    /// # Errors
    /// What is wrong with a file.
    pub fn new(tls: &ClientTls, alpn: &'static [&'static [u8]]) -> Result<Self, Error> {
        let mut files = vec![tls.ca.clone()];
        files.extend(tls.identity.iter().flat_map(|(certificate, key)| [certificate.clone(), key.clone()]));
        let tls = tls.clone();
        let make = move |_: Option<&ClientConfig>| config(&tls, alpn);
        Ok(Self(Live::new("a caller's certificates", files, make)?))
    }

    /// Reads the files again whenever they change. Inside a runtime.
    pub fn watch(&self) {
        self.0.watch();
    }

    /// A channel to an `https://host:port` endpoint that connects when it is used, and again when it must.
    #[must_use]
    pub fn channel(&self, endpoint: &Endpoint) -> Channel {
        self.channel_certified(endpoint, None)
    }

    /// As [`Dialer::channel`], to a peer whose certificate has this name instead of the endpoint's host.
    #[must_use]
    pub fn channel_certified(&self, endpoint: &Endpoint, name: Option<&str>) -> Channel {
        let (dialer, name) = (self.clone(), name.map(str::to_owned));
        let connector = tower::service_fn(move |uri: Uri| {
            let (dialer, name) = (dialer.clone(), name.clone());
            async move { dialer.connect_certified(&uri, name.as_deref()).await.map(TokioIo::new) }
        });
        endpoint.connect_with_connector_lazy(connector)
    }

    /// A connection to the host and port of `uri`.
    ///
    /// # Errors
    /// What TCP or the handshake failed of; the peer is named.
    pub async fn connect(&self, uri: &Uri) -> io::Result<TlsStream<TcpStream>> {
        self.connect_certified(uri, None).await
    }

    /// As [`Dialer::connect`], to a peer whose certificate has this name instead of the host of `uri`.
    ///
    /// # Errors
    /// As [`Dialer::connect`]'s.
    pub async fn connect_certified(&self, uri: &Uri, name: Option<&str>) -> io::Result<TlsStream<TcpStream>> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = uri.port_u16().unwrap_or(443);
        let name = ServerName::try_from(name.unwrap_or(host).to_owned()).map_err(io::Error::other)?;
        let tcp = TcpStream::connect((host, port)).await?;
        tcp.set_nodelay(true)?;
        let handshake = TlsConnector::from(self.0.get()).connect(name, tcp).await;
        handshake.map_err(|error| io::Error::new(error.kind(), format!("TLS with {host}:{port}: {error}")))
    }
}

fn config(tls: &ClientTls, alpn: &[&[u8]]) -> Result<ClientConfig, Error> {
    let wrong = |error: rustls::Error| Error::Content { path: tls.ca.clone(), reason: error.to_string() };
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().map_err(wrong)?;
    let builder = builder.with_root_certificates(files::authorities(&tls.ca)?);
    let mut config = match &tls.identity {
        Some((certificate, key)) => {
            let pair = files::pair(certificate, key)?;
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(pair)))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}
