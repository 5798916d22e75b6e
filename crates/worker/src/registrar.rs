//! A leader that tells its routers that it is there, for as long as it serves.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::Phase;
use proto::worker::registry_client::RegistryClient;
use proto::worker::{RegisterRequest, WorkerState};
use security::{Badge, Dialer};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::config::Routers;
use crate::state::StatePublisher;
use crate::{Config, Error};

/// Between two words.
const BEAT: Duration = Duration::from_secs(2);
/// Longest wait for a router to hear one.
const PATIENCE: Duration = Duration::from_secs(2);
/// What stands before an address of several routers.
const NAME_PREFIX: &str = "dns+";

/// What it takes to register.
pub(crate) struct Registrar {
    routers: Routers,
    /// Where routers reach this leader.
    url: String,
    badge: Badge,
    dialer: Option<Dialer>,
    state: Arc<StatePublisher>,
}

impl Registrar {
    /// For a leader that listens at `bound`; `None` when there are no routers to tell.
    ///
    /// # Errors
    /// [`Error::Advertise`] when routers could not reach the address it listens at, [`Error::Security`] for a file of
    /// authorities that cannot be used.
    pub(crate) fn new(
        config: &Config,
        bound: SocketAddr,
        state: &Arc<StatePublisher>,
    ) -> Result<Option<Self>, Error> {
        let routers = config.routers.clone();
        if routers.addresses.is_empty() {
            return Ok(None);
        }
        let url = match &routers.advertise {
            Some(url) => url.clone(),
            None if bound.ip().is_unspecified() => return Err(Error::Advertise { address: bound }),
            None => {
                let scheme = if config.access.tls.is_some() { "https" } else { "http" };
                format!("{scheme}://{bound}")
            }
        };
        let dialer = routers.tls.as_ref().map(|tls| Dialer::new(tls, &[b"h2"])).transpose()?;
        let badge = Badge::new(config.access.secret.as_ref());
        Ok(Some(Self { routers, url, badge, dialer, state: Arc::clone(state) }))
    }

    /// Registers at every router while the group serves. Inside a runtime, until it is dropped.
    pub(crate) async fn keep_registering(self) {
        self.dialer.iter().for_each(Dialer::watch);
        let mut channels = HashMap::new();
        let mut heard: BTreeMap<String, Result<(), String>> = BTreeMap::new();
        let mut states = self.state.subscribe();
        loop {
            let serves = |state: &WorkerState| Phase::from_wire(state.phase) == Some(Phase::Serving);
            // From the warm-up token on, and not any more once it drains.
            let Ok(state) = states.wait_for(serves).await.map(|state| state.clone()) else { return };
            if let Some(model) = state.model {
                let request = RegisterRequest { url: self.url.clone(), model: Some(model) };
                let routers = self.found().await;
                channels.retain(|url, _| routers.iter().any(|(of, _)| of == url));
                let there = |url: &String| routers.iter().any(|(of, _)| of == url);
                let gone: Vec<String> = heard.keys().filter(|url| !there(url)).cloned().collect();
                for url in gone {
                    // What it made of the group is nothing any more.
                    self.state.registered(&url, "");
                    heard.remove(&url);
                }
                let mut told = Vec::new();
                for (url, certified) in routers {
                    if let Some(channel) = self.channel(&mut channels, &url, certified.as_deref()) {
                        told.push(self.tell(url, channel, request.clone()));
                    }
                }
                for (url, outcome) in futures::future::join_all(told).await {
                    self.note(&mut heard, url, outcome);
                }
            }
            tokio::time::sleep(BEAT).await;
        }
    }

    /// Every router's address now, with the name of its certificate where that is not the host.
    async fn found(&self) -> Vec<(String, Option<String>)> {
        let mut all = Vec::new();
        for address in &self.routers.addresses {
            let Some(named) = address.strip_prefix(NAME_PREFIX) else {
                all.push((address.clone(), None));
                continue;
            };
            let Some((scheme, host)) = named.split_once("://") else { continue };
            match tokio::net::lookup_host(host).await {
                Ok(found) => {
                    let name = host.rsplit_once(':').map(|(name, _)| name.to_owned());
                    all.extend(found.map(|at| (format!("{scheme}://{at}"), name.clone())));
                }
                Err(error) => {
                    tracing::warn!(routers = %address, %error, "the routers' name was not resolved")
                }
            }
        }
        all
    }

    fn channel(
        &self,
        channels: &mut HashMap<String, Channel>,
        url: &str,
        certified: Option<&str>,
    ) -> Option<Channel> {
        if let Some(channel) = channels.get(url) {
            return Some(channel.clone());
        }
        let endpoint =
            Endpoint::from_shared(url.to_owned()).ok()?.connect_timeout(PATIENCE).timeout(PATIENCE);
        let channel = match (url.starts_with("https://"), &self.dialer) {
            (true, Some(dialer)) => dialer.channel_certified(&endpoint, certified),
            // The configuration's check has seen to it that there are authorities.
            (true, None) => return None,
            (false, _) => endpoint.connect_lazy(),
        };
        channels.insert(url.to_owned(), channel.clone());
        Some(channel)
    }

    async fn tell(
        &self,
        url: String,
        channel: Channel,
        request: RegisterRequest,
    ) -> (String, Result<(), (Code, String)>) {
        let mut desk = RegistryClient::with_interceptor(channel, self.badge.clone());
        let outcome = desk.register(request).await;
        (url, outcome.map(drop).map_err(|status| (status.code(), status.message().to_owned())))
    }

    /// Says once what has changed.
    fn note(
        &self,
        heard: &mut BTreeMap<String, Result<(), String>>,
        router: String,
        outcome: Result<(), (Code, String)>,
    ) {
        let shown = outcome.clone().map_err(|(_, why)| why);
        if heard.get(&router) == Some(&shown) {
            return;
        }
        match outcome {
            Ok(()) => {
                tracing::info!(%router, "registered at a router");
                self.state.registered(&router, "");
            }
            Err((Code::FailedPrecondition, why)) => self.state.registered(&router, &why),
            Err((_, why)) => tracing::warn!(%router, %why, "a router did not take the registration"),
        }
        heard.insert(router, shown);
    }
}
