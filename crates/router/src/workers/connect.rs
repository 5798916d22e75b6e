//! Connections to leaders.

use std::time::Duration;

use security::Dialer;
use tonic::transport::{Channel, Endpoint};

use super::Address;
use crate::Error;

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

/// A connection that is made when it is used, and again when it must.
pub(super) fn channel(address: &Address, dialer: Option<&Dialer>) -> Result<Channel, Error> {
    let url = &address.url;
    let endpoint = endpoint(url)?;
    if endpoint.uri().scheme_str() != Some("https") {
        return Ok(endpoint.connect_lazy());
    }
    let dialer = dialer.ok_or_else(|| {
        let reason = "https needs the authority of the group's certificate: set cluster.tls.ca".to_owned();
        Error::WorkerAddress { address: url.clone(), reason }
    })?;
    Ok(dialer.channel_certified(&endpoint, address.certified.as_deref()))
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
        .tcp_nodelay(true)
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
