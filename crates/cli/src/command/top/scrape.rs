//! Reading the pages of one moment.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::bail;
use futures::future::join_all;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tonic::codegen::Bytes;
use tonic::codegen::http::Uri;

use crate::client::TlsFlags;
use crate::top::{Page, Sample};
use crate::wire::Connector;

/// What is spoken behind TLS.
const ALPN: &[&[u8]] = &[b"http/1.1"];
/// Longest that a page may take; the endpoint counts as down then.
const PATIENCE: Duration = Duration::from_secs(2);
/// Largest page that is read.
const PAGE_BYTES_MAX: usize = 16 << 20;

/// Reads the same endpoints again and again, and those that routers tell of.
#[derive(Debug)]
pub(super) struct Scraper {
    client: Client<Connector, Empty<Bytes>>,
    /// Whether encrypted pages can be read.
    encrypted: bool,
    routers: BTreeSet<String>,
    groups: BTreeSet<String>,
    started: Instant,
}

impl Scraper {
    pub(super) fn new(
        routers: BTreeSet<String>,
        groups: BTreeSet<String>,
        tls: &TlsFlags,
    ) -> anyhow::Result<Self> {
        let mut dialer = None;
        for (flag, address) in named("--router", &routers).chain(named("--group", &groups)) {
            let uri = address.parse::<Uri>().ok().filter(|uri| uri.port().is_some());
            match uri.as_ref().and_then(Uri::scheme_str) {
                Some("http") => {}
                Some("https") if dialer.is_some() => {}
                Some("https") => dialer = Some(tls.dialer((flag, address), ALPN)?),
                _ => bail!("{address:?} is not an address such as http://127.0.0.1:8080"),
            }
        }
        // Routers may tell of encrypted pages where none was named.
        let dialer = match dialer {
            Some(dialer) => Some(dialer),
            None => tls.dialer_if_told(ALPN)?,
        };
        let encrypted = dialer.is_some();
        let client = Client::builder(TokioExecutor::new()).build(Connector::new(dialer));
        Ok(Self { client, encrypted, routers, groups, started: Instant::now() })
    }

    /// Every page as it is now. A group that a router once told of is asked from then on.
    pub(super) async fn scrape(&mut self) -> Sample {
        let routers = self.pages(&self.routers).await;
        for page in routers.iter().filter_map(|(_, page)| page.as_ref().ok()) {
            let told = page.labels("cohort_router_group_info", "metrics");
            let spoken = told.filter(|address| {
                address.starts_with("http://") || self.encrypted && address.starts_with("https://")
            });
            self.groups.extend(spoken.map(str::to_owned));
        }
        let groups = self.pages(&self.groups).await;
        let at = self.started.elapsed();
        Sample { at, routers: routers.into_iter().collect(), groups: groups.into_iter().collect() }
    }

    async fn pages(&self, addresses: &BTreeSet<String>) -> Vec<(String, Result<Page, String>)> {
        let page = |address: String| async move {
            let page = tokio::time::timeout(PATIENCE, self.page(&address)).await;
            let page = page.unwrap_or_else(|_| Err(format!("no answer within {} s", PATIENCE.as_secs())));
            (address, page)
        };
        join_all(addresses.iter().cloned().map(page)).await
    }

    async fn page(&self, address: &str) -> Result<Page, String> {
        let uri = format!("{address}/metrics").parse::<Uri>().map_err(|error| error.to_string())?;
        let answer = self.client.get(uri).await.map_err(|error| innermost(&error))?;
        if !answer.status().is_success() {
            return Err(format!("it answers {}", answer.status()));
        }
        let body = Limited::new(answer.into_body(), PAGE_BYTES_MAX).collect().await;
        let body = body.map_err(|error| format!("its page breaks off: {error}"))?.to_bytes();
        Page::parse(&String::from_utf8_lossy(&body)).map_err(|error| error.to_string())
    }
}

/// Addresses with the flag that names them.
fn named<'a>(
    flag: &'static str,
    addresses: &'a BTreeSet<String>,
) -> impl Iterator<Item = (&'static str, &'a str)> {
    addresses.iter().map(move |address| (flag, address.as_str()))
}

/// What lies behind a failed call: `Connection refused` says more than `client error`.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
