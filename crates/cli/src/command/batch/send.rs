//! One request of a batch over HTTP.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tonic::codegen::Bytes;
use tonic::codegen::http::{HeaderMap, Request, StatusCode, header};
use types::limits::MESSAGE_BYTES_MAX;

use super::lines::Line;
use crate::client::{self, TlsFlags};
use crate::wire::Connector;

/// Answers are longer than requests: many choices, log-probabilities.
const ANSWER_BYTES_MAX: usize = 4 * MESSAGE_BYTES_MAX;
/// A request that was not answered is sent again after this, doubled each time up to the maximum.
const WAIT_MIN: Duration = Duration::from_millis(250);
const WAIT_MAX: Duration = Duration::from_secs(30);

/// What a server said to a request.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) request_id: String,
    pub(super) body: String,
}

/// Sends requests to one server.
#[derive(Debug, Clone)]
pub(super) struct Sender {
    client: Client<Connector, Full<Bytes>>,
    server: String,
    retries: u32,
    timeout: Duration,
}

impl Sender {
    pub(super) fn new(
        (server, tls): (&str, &TlsFlags),
        retries: u32,
        timeout: Duration,
    ) -> anyhow::Result<Self> {
        let server = if server.contains("://") { server.to_owned() } else { format!("http://{server}") };
        let connector = match server.split_once("://") {
            Some(("http", _)) => Connector::default(),
            Some(("https", _)) => Connector::new(Some(tls.dialer(("--server", &server), &[b"http/1.1"])?)),
            _ => bail!("--server {server}: http:// and https:// are spoken"),
        };
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { client, server: server.trim_end_matches('/').to_owned(), retries, timeout })
    }

    /// Sends a request until it is answered. A server that is full, starting or gone is asked again.
    ///
    /// # Errors
    /// When it is still none of these after all retries.
    pub(super) async fn send(&self, line: &Line) -> anyhow::Result<Answer> {
        let mut wait = WAIT_MIN;
        let mut tries = 0;
        loop {
            let (why, asked) = match tokio::time::timeout(self.timeout, self.once(line)).await {
                Ok(Ok((answer, retry))) => match answer.status {
                    429 | 502 | 503 => (anyhow!("{} {}", answer.status, answer.body), retry),
                    _ => return Ok(answer),
                },
                Ok(Err(error)) => (error, None),
                Err(_) => (anyhow!("no answer within {} s", self.timeout.as_secs_f64()), None),
            };
            if tries == self.retries {
                return Err(why.context(format!("{}: gave up after {} tries", line.custom_id, tries + 1)));
            }
            tries += 1;
            tracing::info!(custom_id = line.custom_id, tries, %why, "sending it again");
            tokio::time::sleep(asked.unwrap_or(wait).min(WAIT_MAX)).await;
            wait = (wait * 2).min(WAIT_MAX);
        }
    }

    /// One try: the answer, and how long the server asks to wait.
    async fn once(&self, line: &Line) -> anyhow::Result<(Answer, Option<Duration>)> {
        let uri = format!("{}{}", self.server, line.url);
        let body = Full::new(Bytes::from(line.body.get().to_owned()));
        let mut request = Request::post(&uri).header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = client::api_key() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(body)?;
        let response = self.client.request(request).await;
        let response =
            response.with_context(|| format!("nothing answers at {uri}; is a cluster up? (cohort up)"))?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| anyhow!("the answer broke off: {error}"))?.to_bytes();
        let text = |headers: &HeaderMap, name: &str| {
            headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let retry = text(&parts.headers, header::RETRY_AFTER.as_str()).and_then(|value| value.parse().ok());
        let status: StatusCode = parts.status;
        let answer = Answer {
            status: status.as_u16(),
            request_id: text(&parts.headers, "x-request-id").unwrap_or_default(),
            body: String::from_utf8_lossy(&body).into_owned(),
        };
        Ok((answer, retry.map(Duration::from_secs)))
    }
}
