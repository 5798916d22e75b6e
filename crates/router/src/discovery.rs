//! Where the groups are: addresses of the configuration, and names whose every address is a group, asked again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::sync::Notify;

use crate::workers::{Address, Groups};
use crate::{Config, Error};

/// What a name begins with, before its scheme: `dns+http://cohort-groups:7000`.
const NAME_PREFIX: &str = "dns+";
/// Addresses of one name that are looked at: far more groups than a router serves.
const ADDRESSES_MAX: usize = 1024;
/// Weight of a group of which nothing is said.
const WEIGHT_DEFAULT: u32 = 1;
/// Longest wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Who knows the addresses of a name.
pub trait Resolve: fmt::Debug + Send + Sync {
    /// All of them; none is an answer too.
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>>;
}

/// The system: its hosts file, its name servers.
#[derive(Debug, Clone, Copy, Default)]
pub struct System;

impl Resolve for System {
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
    }
}

/// How names are asked for.
#[derive(Debug, Clone)]
pub struct Names {
    /// Between two questions.
    pub interval: Duration,
    /// How long an address counts after the last answer that had it: a name that flaps, or that nobody answers for, takes no
    /// group away before.
    pub hold: Duration,
    /// Who is asked.
    pub resolver: Arc<dyn Resolve>,
}

impl Default for Names {
    fn default() -> Self {
        Self { interval: Duration::from_secs(5), hold: Duration::from_secs(60), resolver: Arc::new(System) }
    }
}

/// What is known of a name. Pure: it is told the time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known(BTreeMap<SocketAddr, Instant>);

impl Known {
    /// An answer came, or none did, which is as good as an empty one.
    pub fn answered(&mut self, answer: &[SocketAddr], now: Instant, hold: Duration) {
        self.0.extend(answer.iter().take(ADDRESSES_MAX).map(|address| (*address, now)));
        self.0.retain(|_, last| now.saturating_duration_since(*last) <= hold);
    }

    /// The addresses that count now.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.0.keys().copied()
    }
}

/// A name of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    scheme: &'static str,
    host: String,
    port: u16,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scheme, host, port } = self;
        write!(f, "{NAME_PREFIX}{scheme}://{host}:{port}")
    }
}

impl Name {
    /// Where one of its groups listens, and the name that group's certificate must have.
    fn address(&self, at: SocketAddr) -> (String, Option<String>) {
        let certified = (self.scheme == "https").then(|| self.host.clone());
        (format!("{}://{at}", self.scheme), certified)
    }
}

/// The sources of a configuration.
#[derive(Debug, Clone, Default)]
struct Sources {
    fixed: Vec<String>,
    names: BTreeMap<Name, Known>,
    /// Leaders that have registered, until when they count.
    registered: BTreeMap<String, Instant>,
    registration_hold: Option<Duration>,
    /// Of addresses, and of names for each of their addresses; all others weigh 1.
    weights: BTreeMap<String, u32>,
}

impl Sources {
    fn of(config: &Config) -> Result<Self, Error> {
        let registration_hold = config.registration_hold;
        let weights = config.weights.clone();
        let mut sources = Self { registration_hold, weights, ..Self::default() };
        for text in &config.workers {
            match text.strip_prefix(NAME_PREFIX) {
                None => sources.fixed.push(text.clone()),
                Some(url) => _ = sources.names.insert(name(text, url)?, Known::default()),
            }
        }
        Ok(sources)
    }

    fn addresses(&self) -> Vec<Address> {
        // What is said of an address counts before what is said of its name.
        let weigh = |url: String, certified, of_name: u32| {
            let weight = self.weights.get(&url).copied().unwrap_or(of_name);
            Address { url, certified, weight }
        };
        let plain = self.fixed.iter().map(|url| weigh(url.clone(), None, WEIGHT_DEFAULT));
        let named = self.names.iter().flat_map(|(name, known)| {
            let of_name = self.weights.get(&name.to_string()).copied().unwrap_or(WEIGHT_DEFAULT);
            known.addresses().map(move |at| (name.address(at), of_name))
        });
        let named = named.map(|((url, certified), of_name)| weigh(url, certified, of_name));
        let registered = self.registered.keys().map(|url| weigh(url.clone(), None, WEIGHT_DEFAULT));
        let mut all: Vec<Address> = plain.chain(named).chain(registered).collect();
        all.dedup();
        all
    }
}

fn name(text: &str, url: &str) -> Result<Name, Error> {
    let parts = || {
        let (scheme, rest) = url.split_once("://")?;
        let scheme = ["http", "https"].into_iter().find(|known| *known == scheme)?;
        let (host, port) = rest.rsplit_once(':')?;
        let plain = !host.is_empty() && !host.contains(['/', ':', '[', ']', '@']);
        Some(Name { scheme, host: plain.then(|| host.to_owned())?, port: port.parse().ok()? })
    };
    parts().ok_or_else(|| Error::WorkerAddress {
        address: text.to_owned(),
        reason: "a name of several groups is written dns+http://name:port".to_owned(),
    })
}

/// Keeps a router's groups those that its sources name.
#[derive(Debug)]
pub(crate) struct Discovery {
    groups: Arc<Groups>,
    inside: Mutex<Inside>,
    /// Told when there is something new to ask for.
    changed: Notify,
}

#[derive(Debug)]
struct Inside {
    sources: Sources,
    how: Names,
    /// Names that were not answered for when they were last asked for.
    unanswered: BTreeSet<Name>,
}

impl Discovery {
    /// With the sources of a configuration; its names are asked for by [`Discovery::keep_asking`].
    ///
    /// # Errors
    /// [`Error::NoWorkers`] and [`Error::WorkerAddress`].
    pub(crate) fn new(groups: Arc<Groups>, config: &Config) -> Result<Arc<Self>, Error> {
        let (sources, how) = (Sources::default(), config.names.clone());
        let inside = Inside { sources, how, unanswered: BTreeSet::new() };
        let discovery = Arc::new(Self { groups, inside: Mutex::new(inside), changed: Notify::new() });
        discovery.set(config)?;
        Ok(discovery)
    }

    /// Goes on with the sources of another configuration. Of names that stay, nothing is forgotten.
    ///
    /// # Errors
    /// As [`Discovery::new`]; nothing is changed then.
    pub(crate) fn set(&self, config: &Config) -> Result<(), Error> {
        if config.workers.is_empty() && config.registration_hold.is_none() {
            return Err(Error::NoWorkers);
        }
        let mut sources = Sources::of(config)?;
        let mut inside = self.inside();
        for (name, known) in &mut sources.names {
            if let Some(before) = inside.sources.names.get(name) {
                known.clone_from(before);
            }
        }
        if sources.registration_hold.is_some() {
            sources.registered.clone_from(&inside.sources.registered);
        }
        self.groups.set(&sources.addresses())?;
        (inside.sources, inside.how) = (sources, config.names.clone());
        drop(inside);
        self.changed.notify_one();
        Ok(())
    }

    /// A leader says that it is there. Returns how long that counts.
    ///
    /// # Errors
    /// [`Error::WorkerAddress`], also when there are too many.
    pub(crate) fn register(&self, url: &str) -> Result<Duration, Error> {
        let refused =
            |reason: &str| Error::WorkerAddress { address: url.to_owned(), reason: reason.to_owned() };
        let mut inside = self.inside();
        let sources = &mut inside.sources;
        let hold =
            sources.registration_hold.ok_or_else(|| refused("groups do not register here any more"))?;
        let known = sources.registered.contains_key(url);
        if !known && sources.registered.len() >= ADDRESSES_MAX {
            return Err(refused("too many groups have registered"));
        }
        sources.registered.insert(url.to_owned(), Instant::now() + hold);
        if !known {
            let addresses = sources.addresses();
            if let Err(error) = self.groups.set(&addresses) {
                sources.registered.remove(url);
                return Err(error);
            }
            tracing::info!(group = %url, "a group has registered");
            self.changed.notify_one();
        }
        Ok(hold)
    }

    /// Forgets leaders that have not been heard of for too long. Returns when to look again.
    fn expire(&self, now: Instant) -> Option<Instant> {
        let mut inside = self.inside();
        let sources = &mut inside.sources;
        let before = sources.registered.len();
        sources.registered.retain(|url, until| {
            let stays = *until > now;
            if !stays {
                tracing::warn!(group = %url, "a group that had registered is not heard of any more");
            }
            stays
        });
        let next = sources.registered.values().min().copied();
        if sources.registered.len() != before
            && let Err(error) = self.groups.set(&sources.addresses())
        {
            tracing::warn!(%error, "the groups cannot be changed");
        }
        next
    }

    /// Asks for every name, at once and again after each interval, and forgets who has not been heard of.
    pub(crate) async fn keep_asking(self: Arc<Self>) {
        loop {
            let (names, how) = {
                let inside = self.inside();
                (inside.sources.names.keys().cloned().collect::<Vec<_>>(), inside.how.clone())
            };
            futures::future::join_all(names.into_iter().map(|name| self.ask(name, &how))).await;
            let again = tokio::time::Instant::now() + how.interval;
            loop {
                let look = self.expire(Instant::now()).map_or(again, |next| again.min(next.into()));
                tokio::select! {
                    () = tokio::time::sleep_until(look) => {}
                    () = self.changed.notified() => break,
                }
                if look == again {
                    break;
                }
            }
        }
    }

    async fn ask(&self, name: Name, how: &Names) {
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, how.resolver.resolve(&name.host, name.port)).await;
        let answer = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let mut inside = self.inside();
        let Some(known) = inside.sources.names.get_mut(&name) else { return };
        let before = known.clone();
        known.answered(answer.as_deref().unwrap_or_default(), Instant::now(), how.hold);
        let same = before.addresses().eq(known.addresses());
        let (count, addresses) = (known.addresses().count(), inside.sources.addresses());
        if let Err(error) = self.groups.set(&addresses) {
            tracing::warn!(%name, %error, "the addresses of a name cannot be used");
        }
        let empty = answer.as_ref().map_or(true, Vec::is_empty);
        let news =
            if empty { inside.unanswered.insert(name.clone()) } else { inside.unanswered.remove(&name) };
        drop(inside);
        // Said once, and again when it is over.
        match answer {
            _ if empty && !news && same => {}
            Err(error) => tracing::warn!(%name, %error, kept = count, "a name was not resolved"),
            Ok(_) if empty => {
                tracing::warn!(%name, kept = count, "a name has no address");
            }
            Ok(_) if news || !same => {
                tracing::info!(%name, addresses = count, "the addresses of a name have changed")
            }
            Ok(_) => {}
        }
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
