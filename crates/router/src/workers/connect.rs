//! Connections to leaders.

use std::time::Duration;

use security::{Badge, Dialer};
use tokio::time::timeout;
use tonic::Status;
use tonic::codegen::http::Uri;

use super::Address;
use super::line::{Dial, Line};
use crate::Error;

/// A status in a few words; tonic hides the reason of a failed connection in the source chain.
pub(crate) fn describe(status: &Status) -> String {
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

/// The outcome of a call to a leader, or that it took too long.
pub(crate) async fn in_time<T>(
    patience: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let late = |_| Err(Status::deadline_exceeded("no answer in time"));
    timeout(patience, call).await.unwrap_or_else(late)
}

/// The same host's other port, as a URL; empty for port 0.
pub(super) fn at_port(address: &str, port: u32) -> String {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    if port == 0 { String::new() } else { format!("{host}:{port}") }
}

/// A connection that is made when it is used, and again when it must; every request shows `badge`.
pub(super) fn line(address: &Address, dialer: Option<&Dialer>, badge: Badge) -> Result<Line, Error> {
    let url = &address.url;
    let uri = uri(url)?;
    if uri.scheme_str() != Some("https") {
        return Ok(Line::new(uri, Dial::Plain, badge));
    }
    let dialer = dialer.cloned().ok_or_else(|| {
        let reason = "https needs the authority of the group's certificate: set cluster.tls.ca".to_owned();
        Error::WorkerAddress { address: url.clone(), reason }
    })?;
    Ok(Line::new(uri, Dial::Tls(dialer, address.certified.clone()), badge))
}

fn uri(address: &str) -> Result<Uri, Error> {
    let refuse = |reason: String| Error::WorkerAddress { address: address.to_owned(), reason };
    let uri = Uri::try_from(address).map_err(|error| refuse(error.to_string()))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.port().is_none() {
        return Err(refuse("it needs the scheme http or https and a port".to_owned()));
    }
    Ok(uri)
}
