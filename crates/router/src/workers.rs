//! The worker groups: one task each that keeps watching its leader, and what all of them together amount to.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use proto::worker::worker_client::WorkerClient;
use proto::{Failure, Phase, RETRY_AFTER, worker};
use security::{Badge, Dialer, Identified};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use types::limits::{CONTEXT_TOKENS_MAX, MESSAGE_BYTES_MAX};

use crate::Error;
use crate::affinity::{Affinity, Chain};
use crate::breaker::{Breaker, RetryBudget};
use crate::pick::{Candidate, Why, choose};

/// A leader that cannot be reached is tried again after this, doubled each time up to the maximum.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A leader that vanished without a word (a lost host, a cut cable) is noticed after both together.
const PING_INTERVAL: Duration = Duration::from_secs(3);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
const STREAM_WINDOW_BYTES: u32 = 16 << 20;

/// What a group says of its model, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) name: String,
    pub(crate) vocab_size: u32,
    pub(crate) context_tokens_max: u32,
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) dtype: String,
    pub(crate) tensor_parallel: u32,
    pub(crate) config_hash: String,
}

impl Facts {
    fn from_wire(wire: worker::ModelFacts) -> Result<Self, String> {
        let worker::ModelFacts {
            name,
            vocab_size,
            context_tokens_max,
            eos_token_ids,
            dtype,
            tensor_parallel,
            config_hash,
        } = wire;
        if vocab_size == 0 || !(1..=CONTEXT_TOKENS_MAX).contains(&context_tokens_max) {
            return Err(format!("reports vocabulary {vocab_size} and context {context_tokens_max}"));
        }
        Ok(Self { name, vocab_size, context_tokens_max, eos_token_ids, dtype, tensor_parallel, config_hash })
    }

    /// Whether a request checked against `self` may run where `other` is served.
    fn same_model(&self, other: &Self) -> bool {
        (&self.name, self.vocab_size, self.context_tokens_max, &self.config_hash)
            == (&other.name, other.vocab_size, other.context_tokens_max, &other.config_hash)
    }
}

/// How far the cluster is, as health and refusals say it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Progress {
    /// At least one group takes requests.
    Serving,
    /// The most advanced group is in this phase, so many per cent of it done.
    Phase(Phase, u32),
    /// No leader answers.
    Unreachable(String),
}

impl Progress {
    /// The refusal that says why nothing is served now.
    pub(crate) fn refusal(self) -> Failure {
        match self {
            Self::Phase(phase, percent) => Failure::NotServing { phase, percent, retry_after: RETRY_AFTER },
            Self::Unreachable(why) => Failure::Unavailable { why, retry_after: RETRY_AFTER },
            Self::Serving => Failure::Unavailable {
                why: "the groups that serve have just refused this request".to_owned(),
                retry_after: RETRY_AFTER,
            },
        }
    }

    /// The phase's name and percent.
    pub(crate) fn describe(&self) -> (&'static str, u32) {
        match self {
            Self::Serving => (Phase::Serving.name(), 100),
            Self::Phase(phase, percent) => (phase.name(), *percent),
            Self::Unreachable(_) => ("connecting", 0),
        }
    }
}

/// What was last heard of a group.
#[derive(Debug, Clone)]
enum Link {
    Down { why: String },
    Up { phase: Phase, percent: u32 },
}

#[derive(Debug, Clone)]
struct Seen {
    link: Link,
    facts: Option<Facts>,
    reported: u64,
    kv_blocks: u32,
}

/// One worker group.
#[derive(Debug)]
pub(crate) struct Group {
    address: String,
    channel: Channel,
    badge: Badge,
    in_flight: AtomicUsize,
}

impl Group {
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn client(&self) -> WorkerClient<Identified> {
        WorkerClient::with_interceptor(self.channel.clone(), self.badge.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }
}

/// A place at a group, counted until it is dropped.
#[derive(Debug)]
pub(crate) struct InFlight {
    group: Arc<Group>,
    index: usize,
}

impl InFlight {
    fn new(group: Arc<Group>, index: usize) -> Self {
        group.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { group, index }
    }

    /// Which of the groups it is at, as [`Groups::place`] counts them.
    pub(crate) const fn index(&self) -> usize {
        self.index
    }

    pub(crate) fn group(&self) -> &Group {
        &self.group
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.group.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the watch tasks write and everybody reads; `seen[i]` belongs to `groups[i]`.
#[derive(Debug)]
struct State {
    seen: Vec<Seen>,
    /// What is served: the facts of the first group heard, for as long as a group that has them is there.
    served: Option<Facts>,
    /// One for each of `seen`.
    breakers: Vec<Breaker>,
    affinity: Affinity,
    retries: RetryBudget,
}

/// All groups of a router.
#[derive(Debug)]
pub(crate) struct Groups {
    groups: Vec<Arc<Group>>,
    state: Mutex<State>,
    changed: watch::Sender<()>,
    placements: Family<Placement, Counter>,
    resumed: Counter,
}

/// Why a group was chosen: it had the least to do, it knew the prompt's beginning, or another one had refused the request.
const LEAST_LOADED: &str = "least_loaded";
const PREFIX: &str = "prefix";
const RETRY: &str = "retry";
const REASONS: [&str; 3] = [LEAST_LOADED, PREFIX, RETRY];

/// A choice of a group.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Placement {
    group: String,
    reason: &'static str,
}

/// A group as operators see it.
#[derive(Debug, Clone)]
pub(crate) struct GroupView {
    pub(crate) address: String,
    /// Whether it takes requests.
    pub(crate) takes: bool,
    pub(crate) in_flight: usize,
}

impl Groups {
    /// Prepares a connection to each address; none is opened yet.
    /// They are made by `dialer` where an address is `https://`, and all calls show `badge`.
    pub(crate) fn new(addresses: &[String], dialer: Option<&Dialer>, badge: &Badge) -> Result<Self, Error> {
        if addresses.is_empty() {
            return Err(Error::NoWorkers);
        }
        let mut groups = Vec::with_capacity(addresses.len());
        for address in addresses {
            groups.push(Arc::new(Group {
                address: address.clone(),
                channel: channel(address, dialer)?,
                badge: badge.clone(),
                in_flight: AtomicUsize::new(0),
            }));
        }
        let link = Link::Down { why: "not connected yet".to_owned() };
        let seen = vec![Seen { link, facts: None, reported: 0, kv_blocks: 0 }; groups.len()];
        let state = Mutex::new(State {
            breakers: vec![Breaker::default(); seen.len()],
            seen,
            served: None,
            affinity: Affinity::new(Instant::now()),
            retries: RetryBudget::default(),
        });
        let placements = Family::default();
        for (group, reason) in
            groups.iter().flat_map(|group: &Arc<Group>| REASONS.map(|reason| (group, reason)))
        {
            let _ = placements.get_or_create(&Placement { group: group.address.clone(), reason });
        }
        Ok(Self { groups, state, changed: watch::Sender::new(()), placements, resumed: Counter::default() })
    }

    /// Starts the watch tasks, which end with `stop`.
    pub(crate) fn watch(self: &Arc<Self>, router_id: &str, stop: &CancellationToken) {
        for index in 0..self.groups.len() {
            let (groups, router_id) = (Arc::clone(self), router_id.to_owned());
            tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
                groups.keep_watching(index, &router_id).await;
            }));
        }
    }

    /// Wakes whenever a group's state has changed.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What is served, as soon as one group has said so.
    pub(crate) fn served(&self) -> Option<Facts> {
        self.state().served.clone()
    }

    /// Groups configured, and groups that take requests now.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (self.groups.len(), (0..self.groups.len()).filter(|&index| state.takes(index)).count())
    }

    /// Every group as it is now.
    pub(crate) fn views(&self) -> Vec<GroupView> {
        let state = self.state();
        let view = |(index, group): (usize, &Arc<Group>)| GroupView {
            address: group.address.clone(),
            takes: state.takes(index),
            in_flight: group.in_flight.load(Ordering::Relaxed),
        };
        self.groups.iter().enumerate().map(view).collect()
    }

    /// How often each group was chosen, and how many sequences went on elsewhere, for whoever shows it.
    pub(crate) fn counters(&self) -> (Family<Placement, Counter>, Counter) {
        (self.placements.clone(), self.resumed.clone())
    }

    /// Groups that take requests now.
    pub(crate) fn ready(&self) -> Vec<Arc<Group>> {
        let state = self.state();
        let taking = self.groups.iter().enumerate().filter(|&(index, _)| state.takes(index));
        taking.map(|(_, group)| Arc::clone(group)).collect()
    }

    /// A client of group `index`, as [`Groups::place`] counts them.
    pub(crate) fn client(&self, index: usize) -> Option<WorkerClient<Identified>> {
        self.groups.get(index).map(|group| group.client())
    }

    /// Counts a sequence that goes on after the loss of its group.
    pub(crate) fn count_resumed(&self) {
        self.resumed.inc();
    }

    /// Sequences that went on after the loss of their group, since the start.
    pub(crate) fn resumed(&self) -> u64 {
        self.resumed.get()
    }

    /// KV blocks of all groups together, as they reported them last.
    pub(crate) fn kv_blocks(&self) -> u64 {
        self.state().seen.iter().map(|seen| u64::from(seen.kv_blocks)).sum()
    }

    /// How far the most advanced group is.
    pub(crate) fn progress(&self) -> Progress {
        let state = self.state();
        if (0..self.groups.len()).any(|index| state.takes(index)) {
            return Progress::Serving;
        }
        let up = state.seen.iter().filter_map(|seen| match seen.link {
            // A group that serves another model will not help, and one that drains only goes backwards.
            Link::Up { phase: phase @ (Phase::Serving | Phase::Draining), .. } => Some((None, phase, 0)),
            Link::Up { phase, percent } => Some((Some(phase), phase, percent)),
            Link::Down { .. } => None,
        });
        match up.max_by_key(|&(rank, _, percent)| (rank, percent)) {
            Some((_, phase, percent)) => Progress::Phase(phase, percent),
            None => {
                let line = |(group, seen): (&Arc<Group>, &Seen)| match &seen.link {
                    Link::Down { why } => Some(format!("{}: {why}", group.address)),
                    Link::Up { .. } => None,
                };
                let whys: Vec<String> = self.groups.iter().zip(&state.seen).filter_map(line).collect();
                Progress::Unreachable(format!("no worker group can be reached: {}", whys.join("; ")))
            }
        }
    }

    /// Takes a place at the best group for a prompt that is not in `tried`, and adds it there. A group that fails request
    /// after request is left alone for a while.
    pub(crate) fn place(&self, tried: &mut Vec<usize>, prompt: &Chain) -> Option<InFlight> {
        let now = Instant::now();
        let mut state = self.state();
        let known = state.affinity.known(prompt, self.groups.len());
        let groups = self.groups.iter().zip(known).enumerate();
        let candidates: Vec<Candidate> = groups
            .map(|(index, (group, known_tokens))| Candidate {
                eligible: state.takes(index)
                    && !tried.contains(&index)
                    && state.breakers[index].lets_through(now),
                in_flight: group.in_flight.load(Ordering::Relaxed),
                reported: state.seen[index].reported,
                known_tokens,
            })
            .collect();
        let (index, why) = choose(&candidates)?;
        state.breakers[index].sent(now);
        state.affinity.learn(prompt, index, now);
        let reason = match (tried.is_empty(), why) {
            (false, _) => RETRY,
            (true, Why::Prefix) => PREFIX,
            (true, Why::LeastLoaded) => LEAST_LOADED,
        };
        if tried.is_empty() {
            state.retries.earn();
        }
        let placement = Placement { group: self.groups[index].address.clone(), reason };
        self.placements.get_or_create(&placement).inc();
        tried.push(index);
        // Counted under the lock, so that two requests at once do not both see the group empty.
        Some(InFlight::new(Arc::clone(&self.groups[index]), index))
    }

    /// As [`Groups::place`], for a request that another group refused, while such requests are few among all.
    pub(crate) fn place_again(&self, tried: &mut Vec<usize>, prompt: &Chain) -> Option<InFlight> {
        let granted = self.state().retries.spend();
        if granted { self.place(tried, prompt) } else { None }
    }

    /// A request came to its first token at a group, or the group or its connection broke before.
    pub(crate) fn tried(&self, index: usize, came_to_a_token: bool) {
        let mut state = self.state();
        if came_to_a_token {
            return state.breakers[index].succeeded();
        }
        let opened = state.breakers[index].failed(Instant::now());
        drop(state);
        if opened {
            let group = &self.groups[index].address;
            tracing::warn!(%group, "the group fails one request after the other: it gets none for a while");
        }
    }

    async fn keep_watching(&self, index: usize, router_id: &str) {
        let mut wait = RETRY_MIN;
        loop {
            let why = match self.watch_once(index, router_id, &mut wait).await {
                Ok(()) => "the leader ended the connection".to_owned(),
                Err(status) => describe(&status),
            };
            self.update(index, |seen| {
                seen.link = Link::Down { why: why.clone() };
                seen.reported = 0;
            });
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY_MAX);
        }
    }

    async fn watch_once(
        &self,
        index: usize,
        router_id: &str,
        wait: &mut Duration,
    ) -> Result<(), tonic::Status> {
        let request = worker::WatchRequest { router_id: router_id.to_owned() };
        let mut states = self.groups[index].client().watch(request).await?.into_inner();
        while let Some(state) = states.message().await? {
            *wait = RETRY_MIN;
            self.heard(index, state);
        }
        Ok(())
    }

    fn heard(&self, index: usize, state: worker::WorkerState) {
        let address = &self.groups[index].address;
        let Some(phase) = Phase::from_wire(state.phase) else {
            tracing::warn!(group = %address, phase = state.phase, "the group reports an unknown phase");
            return;
        };
        let facts = state.model.map(Facts::from_wire).transpose();
        let facts = facts.unwrap_or_else(|why| {
            tracing::warn!(group = %address, "the group {why}, which cannot be; it is not used");
            None
        });
        let load = state.load.unwrap_or_default();
        self.update(index, |seen| {
            seen.link = Link::Up { phase, percent: state.percent.min(100) };
            seen.facts = facts;
            seen.reported = u64::from(load.running) + u64::from(load.waiting);
            seen.kv_blocks = load.kv_blocks;
        });
    }

    fn update(&self, index: usize, change: impl FnOnce(&mut Seen)) {
        let mut state = self.state();
        let (took, before) = (state.takes(index), state.seen[index].clone());
        change(&mut state.seen[index]);
        state.choose_served();
        if matches!((&before.link, &state.seen[index].link), (Link::Down { .. }, Link::Up { .. })) {
            // It has begun anew: whatever its past was, its cache is empty.
            state.affinity.forget(index);
            state.breakers[index].succeeded();
        }
        let (takes, after) = (state.takes(index), state.seen[index].clone());
        let served = state.served.clone();
        drop(state);
        self.log(index, (took, &before), (takes, &after), served.as_ref());
        self.changed.send_replace(());
    }

    /// One line for each change that an operator would want to know of; load reports are not.
    fn log(
        &self,
        index: usize,
        (took, before): (bool, &Seen),
        (takes, after): (bool, &Seen),
        served: Option<&Facts>,
    ) {
        let group = &self.groups[index].address;
        match (&before.link, &after.link) {
            (Link::Up { phase: Phase::Draining, .. }, Link::Down { .. }) => {
                tracing::info!(%group, "the group has ended");
            }
            (Link::Up { .. }, Link::Down { why }) => tracing::warn!(%group, %why, "lost the group"),
            (Link::Down { .. }, Link::Up { phase, .. }) => {
                tracing::info!(%group, %phase, "reached the group")
            }
            (Link::Up { phase: old, .. }, Link::Up { phase, .. }) if old != phase => {
                tracing::info!(%group, %phase, "the group's phase changed");
            }
            _ => {}
        }
        if took != takes {
            tracing::info!(%group, takes, "the group takes requests");
        }
        if let (Some(served), Some(own)) = (served, &after.facts)
            && before.facts != after.facts
            && !own.same_model(served)
        {
            tracing::warn!(%group, ?own, ?served, "the group serves something else than the others; it is not used");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is complete before its lock is given back, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether group `index` takes requests for what is served.
    fn takes(&self, index: usize) -> bool {
        let seen = &self.seen[index];
        let same = match (&self.served, &seen.facts) {
            (Some(served), Some(own)) => own.same_model(served),
            (None, _) | (_, None) => false,
        };
        same && matches!(seen.link, Link::Up { phase: Phase::Serving, .. })
    }

    fn choose_served(&mut self) {
        let mut present = self.seen.iter().filter(|seen| matches!(seen.link, Link::Up { .. }));
        let kept = self.served.as_ref().is_some_and(|served| {
            present.clone().any(|seen| seen.facts.as_ref().is_some_and(|own| own.same_model(served)))
        });
        // With nobody there the old facts stay: they still describe requests well enough to refuse the bad ones.
        if !kept && let Some(first) = present.find_map(|seen| seen.facts.clone()) {
            self.served = Some(first);
        }
    }
}

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

fn channel(address: &str, dialer: Option<&Dialer>) -> Result<Channel, Error> {
    let endpoint = endpoint(address)?;
    if endpoint.uri().scheme_str() != Some("https") {
        return Ok(endpoint.connect_lazy());
    }
    let dialer = dialer.ok_or_else(|| {
        let reason = "https needs the authority of the group's certificate: set cluster.tls.ca".to_owned();
        Error::WorkerAddress { address: address.to_owned(), reason }
    })?;
    Ok(dialer.channel(&endpoint))
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
