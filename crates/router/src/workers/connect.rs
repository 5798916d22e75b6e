//! Connections to leaders.

use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use security::Dialer;
use tokio::net::TcpStream;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::Address;
use crate::Error;
use crate::gather::Gathered;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A leader that vanished without a word (a lost host, a cut cable) is noticed after both together.
const PING_INTERVAL: Duration = Duration::from_secs(3);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
const STREAM_WINDOW_BYTES: u32 = 16 << 20;

/// A status in a few words; tonic hides the reason of a failed connection in the source chain.
pub(crate) fn describe(status: &tonic::Status) -> String {
    let mut text = match status.message() {
        "" => status.code().description().to_owned(),
        message => message.to_owned(),
    };
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let line = error.to_string();
        if !text.contains(&line) {
            text = format!("{text}: {line}");
        }
        source = error.source();
    }
    text
}

/// The same host's other port, as a URL; empty for port 0.
pub(super) fn at_port(address: &str, port: u32) -> String {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    if port == 0 { String::new() } else { format!("{host}:{port}") }
}

/// A connection that is made when it is used, and again when it must.
pub(super) fn channel(address: &Address, dialer: Option<&Dialer>) -> Result<Channel, Error> {
    let url = &address.url;
    let endpoint = endpoint(url)?;
    if endpoint.uri().scheme_str() != Some("https") {
        let connect =
            |uri: Uri| async move { connect(&uri).await.map(|tcp| TokioIo::new(Gathered::new(tcp))) };
        return Ok(endpoint.connect_with_connector_lazy(service_fn(connect)));
    }
    let dialer = dialer.cloned().ok_or_else(|| {
        let reason = "https needs the authority of the group's certificate: set cluster.tls.ca".to_owned();
        Error::WorkerAddress { address: url.clone(), reason }
    })?;
    let name = address.certified.clone();
    let connect = move |uri: Uri| {
        let (dialer, name) = (dialer.clone(), name.clone());
        async move {
            let tls = dialer.connect_certified(&uri, name.as_deref()).await;
            tls.map(|tls| TokioIo::new(Gathered::new(tls)))
        }
    };
    Ok(endpoint.connect_with_connector_lazy(service_fn(connect)))
}

/// A connection to the host and port of `uri`.
async fn connect(uri: &Uri) -> io::Result<TcpStream> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let tcp = TcpStream::connect((host, uri.port_u16().unwrap_or_default())).await?;
    // Without it a request waits 40 ms for a delayed acknowledgement.
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

fn endpoint(address: &str) -> Result<Endpoint, Error> {
    let refuse = |reason: String| Error::WorkerAddress { address: address.to_owned(), reason };
    let endpoint =
        Endpoint::from_shared(address.to_owned()).map_err(|error| refuse(describe_chain(&error)))?;
    let uri = endpoint.uri();
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.port().is_none() {
        return Err(refuse("it needs the scheme http or https and a port".to_owned()));
    }
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(STREAM_WINDOW_BYTES))
}

fn describe_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
