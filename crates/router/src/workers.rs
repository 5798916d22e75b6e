//! The worker groups: one task each that keeps watching its leader, and what all of them together amount to.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use proto::worker::worker_client::WorkerClient;
use proto::{Phase, worker};
use security::{Badge, Dialer};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use types::limits::MESSAGE_BYTES_MAX;

use crate::affinity::{Affinity, Chain};
use crate::breaker::{Breaker, RetryBudget};
use crate::call::random_u64;
use crate::migrations::Migrations;
use crate::pick::{Candidate, Why, choose};

mod connect;
mod facts;
mod line;
mod members;

pub(crate) use connect::{describe, in_time};
pub(crate) use facts::{Facts, Progress};
pub(crate) use line::Line;
pub(crate) use members::Address;

/// A leader that cannot be reached is tried again after this, doubled each time up to the maximum.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Longest wait for a leader to take note of what is made of its group.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(2);

/// What was last heard of a group.
#[derive(Debug, Clone)]
enum Link {
    Down { why: String },
    Up { phase: Phase, percent: u32 },
}

/// Whether a group belongs to the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It does.
    Member,
    /// Not any more: it finishes what it has and gets nothing new.
    Leaving,
    /// It is gone, and its place is free for another one.
    Gone,
}

#[derive(Debug, Clone)]
struct Seen {
    standing: Standing,
    /// Its share of the requests; with 0 it finishes what it has.
    weight: u32,
    link: Link,
    facts: Option<Facts>,
    /// Requests of other routers there, when it reported last.
    others: usize,
    kv_blocks: u32,
    metrics_port: u32,
}

/// One worker group.
#[derive(Debug)]
pub(crate) struct Group {
    address: String,
    line: Line,
    in_flight: AtomicUsize,
    /// Told when the last of those has ended.
    idle: Notify,
    /// Ends the task that watches it.
    gone: CancellationToken,
}

impl Group {
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn client(&self) -> WorkerClient<Line> {
        WorkerClient::with_origin(self.line.clone(), self.line.uri().clone())
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
        if self.group.in_flight.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.group.idle.notify_one();
        }
    }
}

/// What the watch tasks write and everybody reads. A group keeps its index for as long as anything runs there.
#[derive(Debug)]
struct State {
    groups: Vec<Arc<Group>>,
    /// One for each of `groups`.
    seen: Vec<Seen>,
    /// What is served: the facts of the first group heard, for as long as a group that has them is there.
    served: Option<Arc<Facts>>,
    /// One for each of `groups`.
    breakers: Vec<Breaker>,
    affinity: Affinity,
    retries: RetryBudget,
    random: fastrand::Rng,
}

/// All groups of a router.
#[derive(Debug)]
pub(crate) struct Groups {
    state: Mutex<State>,
    dialer: Option<Dialer>,
    badge: Badge,
    /// As which the groups know this router.
    router_id: String,
    /// Ends all tasks.
    stop: CancellationToken,
    changed: watch::Sender<()>,
    placements: Family<Placement, Counter>,
    resumed: Counter,
    pub(crate) migrations: Migrations,
}

/// Why a group was chosen: it had less to do than another, it knew the prompt's beginning, or another one had refused the request.
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
    /// Whether it serves what the others do; it takes requests then, unless its weight is 0.
    pub(crate) up: bool,
    pub(crate) in_flight: usize,
    /// Its share of the requests.
    pub(crate) weight: u32,
    /// Whether it is left alone for failing.
    pub(crate) broken: bool,
    /// Where its leader serves metrics; empty for nowhere.
    pub(crate) metrics: String,
}

impl Groups {
    /// Without any group yet. Connections are made by `dialer` where an address is `https://`, and all calls show `badge`.
    /// Tasks end with `stop`.
    pub(crate) fn new(
        dialer: Option<Dialer>,
        badge: Badge,
        router_id: String,
        stop: CancellationToken,
    ) -> Self {
        let state = Mutex::new(State {
            groups: Vec::new(),
            seen: Vec::new(),
            breakers: Vec::new(),
            served: None,
            affinity: Affinity::new(Instant::now()),
            retries: RetryBudget::default(),
            random: fastrand::Rng::with_seed(random_u64()),
        });
        Self {
            state,
            dialer,
            badge,
            router_id,
            stop,
            changed: watch::Sender::new(()),
            placements: Family::default(),
            resumed: Counter::default(),
            migrations: Migrations::default(),
        }
    }

    /// Wakes whenever a group's state has changed.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What is served, as soon as one group has said so.
    pub(crate) fn served(&self) -> Option<Arc<Facts>> {
        self.state().served.clone()
    }

    /// Groups configured, and groups that take requests now.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.state();
        let members = state.seen.iter().filter(|seen| seen.standing == Standing::Member).count();
        (members, (0..state.groups.len()).filter(|&index| state.takes(index)).count())
    }

    /// Every group as it is now.
    pub(crate) fn views(&self) -> Vec<GroupView> {
        let (state, now) = (self.state(), Instant::now());
        let view = |(index, group): (usize, &Arc<Group>)| GroupView {
            address: group.address.clone(),
            up: state.serves(index),
            in_flight: group.in_flight.load(Ordering::Relaxed),
            weight: state.seen[index].weight,
            broken: !state.breakers[index].lets_through(now),
            metrics: connect::at_port(&group.address, state.seen[index].metrics_port),
        };
        let here = state.groups.iter().enumerate();
        here.filter(|(index, _)| state.seen[*index].standing != Standing::Gone).map(view).collect()
    }

    /// How often each group was chosen, and how many sequences went on elsewhere, for whoever shows it.
    pub(crate) fn counters(&self) -> (Family<Placement, Counter>, Counter) {
        (self.placements.clone(), self.resumed.clone())
    }

    /// Groups that take requests now.
    pub(crate) fn ready(&self) -> Vec<Arc<Group>> {
        let state = self.state();
        let taking = state.groups.iter().enumerate().filter(|&(index, _)| state.takes(index));
        taking.map(|(_, group)| Arc::clone(group)).collect()
    }

    /// A client of group `index`, as [`Groups::place`] counts them.
    pub(crate) fn client(&self, index: usize) -> Option<WorkerClient<Line>> {
        self.state().groups.get(index).map(|group| group.client())
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
        if (0..state.groups.len()).any(|index| state.takes(index)) {
            return Progress::Serving;
        }
        if (0..state.groups.len()).any(|index| state.serves(index)) {
            return Progress::Withheld;
        }
        let members =
            || state.seen.iter().zip(&state.groups).filter(|(seen, _)| seen.standing == Standing::Member);
        let up = members().filter_map(|(seen, _)| match seen.link {
            // A group that serves another model will not help, and one that drains only goes backwards.
            Link::Up { phase: phase @ (Phase::Serving | Phase::Draining), .. } => Some((None, phase, 0)),
            Link::Up { phase, percent } => Some((Some(phase), phase, percent)),
            Link::Down { .. } => None,
        });
        match up.max_by_key(|&(rank, _, percent)| (rank, percent)) {
            Some((_, phase, percent)) => Progress::Phase(phase, percent),
            None => {
                let line = |(seen, group): (&Seen, &Arc<Group>)| match &seen.link {
                    Link::Down { why } => Some(format!("{}: {why}", group.address)),
                    Link::Up { .. } => None,
                };
                let whys: Vec<String> = members().filter_map(line).collect();
                Progress::Unreachable(match whys.is_empty() {
                    true => "no worker group is known yet".to_owned(),
                    false => format!("no worker group can be reached: {}", whys.join("; ")),
                })
            }
        }
    }

    /// Takes a place at the best group for a prompt that is not in `tried`, and adds it there. A group that fails request
    /// after request is left alone for a while.
    pub(crate) fn place(&self, tried: &mut Vec<usize>, prompt: &Chain) -> Option<InFlight> {
        let now = Instant::now();
        let mut state = self.state();
        let known = state.affinity.known(prompt, state.groups.len(), now);
        let groups = state.groups.iter().zip(known).enumerate();
        let candidates: Vec<Candidate> = groups
            .map(|(index, (group, known_tokens))| Candidate {
                eligible: state.takes(index)
                    && !tried.contains(&index)
                    && state.breakers[index].lets_through(now),
                weight: state.seen[index].weight,
                in_flight: group.in_flight.load(Ordering::Relaxed),
                others: state.seen[index].others,
                known_tokens,
            })
            .collect();
        let (index, why) = choose(&candidates, |count| state.random.usize(..count))?;
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
        let group = Arc::clone(&state.groups[index]);
        let placement = Placement { group: group.address.clone(), reason };
        self.placements.get_or_create(&placement).inc();
        tried.push(index);
        // Counted under the lock, so that two requests at once do not both see the group empty.
        Some(InFlight::new(group, index))
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
        let group = Arc::clone(&state.groups[index]);
        drop(state);
        if opened {
            let group = &group.address;
            tracing::warn!(%group, "the group fails one request after the other: it gets none for a while");
        }
    }

    async fn keep_watching(&self, index: usize, group: &Group) {
        let mut wait = RETRY_MIN;
        loop {
            let why = match self.watch_once(index, group, &mut wait).await {
                Ok(()) => "the leader ended the connection".to_owned(),
                Err(status) => describe(&status),
            };
            self.update(index, |seen| {
                seen.link = Link::Down { why: why.clone() };
                seen.others = 0;
            });
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY_MAX);
        }
    }

    async fn watch_once(
        &self,
        index: usize,
        group: &Group,
        wait: &mut Duration,
    ) -> Result<(), tonic::Status> {
        let request = worker::WatchRequest { router_id: self.router_id.clone() };
        let mut states = group.client().watch(request).await?.into_inner();
        let (mut changes, mut told) = (self.changes(), None);
        loop {
            let verdict = self.state().verdict(index);
            let unheard = verdict.is_some() && verdict != told;
            tokio::select! {
                state = states.message() => {
                    let Some(state) = state? else { return Ok(()) };
                    *wait = RETRY_MIN;
                    self.heard(index, group, state);
                }
                // What is made of it may depend on others.
                _ = changes.changed() => {}
                // It was said, and not heard.
                () = tokio::time::sleep(RETRY_MAX), if unheard => {}
            }
            let verdict = self.state().verdict(index);
            if let Some(refusal) = verdict.clone().filter(|_| verdict != told)
                && self.acknowledge(group, refusal).await
            {
                told = verdict;
            }
        }
    }

    /// Tells a leader what is made of its group; whether it heard.
    async fn acknowledge(&self, group: &Group, refusal: String) -> bool {
        let router_id = self.router_id.clone();
        let request = worker::AcknowledgeRequest { router_id, refusal };
        let told = in_time(ACKNOWLEDGE_TIMEOUT, group.client().acknowledge(request)).await;
        if let Err(status) = &told {
            tracing::warn!(group = %group.address, %status, "the group did not hear what is made of it");
        }
        told.is_ok()
    }

    fn heard(&self, index: usize, group: &Group, state: worker::WorkerState) {
        let address = &group.address;
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
        let own = group.in_flight.load(Ordering::Relaxed);
        self.update(index, |seen| {
            seen.link = Link::Up { phase, percent: state.percent.min(100) };
            seen.facts = facts;
            seen.others = usize::try_from(u64::from(load.running) + u64::from(load.waiting))
                .unwrap_or(usize::MAX)
                .saturating_sub(own);
            seen.kv_blocks = load.kv_blocks;
            seen.metrics_port = state.metrics_port;
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
        let (served, group) = (state.served.clone(), Arc::clone(&state.groups[index]));
        drop(state);
        log(&group, (took, &before), (takes, &after), served.as_deref());
        self.changed.send_replace(());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is complete before its lock is given back, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One line for each change that an operator would want to know of; load reports are not.
fn log(group: &Group, (took, before): (bool, &Seen), (takes, after): (bool, &Seen), served: Option<&Facts>) {
    let group = &group.address;
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
        && let Some(difference) = served.difference(own)
    {
        tracing::error!(%group, %difference, "the group serves something else than the others; it is not used");
    }
}

impl State {
    /// Whether group `index` gets requests.
    fn takes(&self, index: usize) -> bool {
        self.serves(index) && self.seen[index].weight > 0
    }

    /// Whether group `index` is there for what is served.
    fn serves(&self, index: usize) -> bool {
        let seen = &self.seen[index];
        let same = match (&self.served, &seen.facts) {
            (Some(served), Some(own)) => own.same_model(served),
            (None, _) | (_, None) => false,
        };
        let serves = matches!(seen.link, Link::Up { phase: Phase::Serving, .. });
        same && serves && seen.standing == Standing::Member
    }

    /// What is made of a group that serves: why it is not used, empty when it is. `None` while there is nothing to say.
    fn verdict(&self, index: usize) -> Option<String> {
        let seen = &self.seen[index];
        if seen.standing != Standing::Member || !matches!(seen.link, Link::Up { phase: Phase::Serving, .. }) {
            return None;
        }
        let (served, own) = (self.served.as_ref()?, seen.facts.as_ref()?);
        Some(served.difference(own).map_or_else(String::new, |difference| {
            format!("it serves something else than the others: {difference}")
        }))
    }

    fn choose_served(&mut self) {
        let here = |seen: &&Seen| seen.standing == Standing::Member && matches!(seen.link, Link::Up { .. });
        let mut present = self.seen.iter().filter(here);
        let kept = self.served.as_ref().is_some_and(|served| {
            present.clone().any(|seen| seen.facts.as_ref().is_some_and(|own| own.same_model(served)))
        });
        // With nobody there the old facts stay: they still describe requests well enough to refuse the bad ones.
        if !kept && let Some(first) = present.find_map(|seen| seen.facts.clone()) {
            self.served = Some(Arc::new(first));
        }
    }
}
