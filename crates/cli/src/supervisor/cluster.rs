//! A router and its worker groups on one machine. A member that dies after it was ready is restarted at the same
//! address; one that dies before ends the cluster with its error. Groups may be added and taken away while it runs: a new
//! one is told to the router as soon as its leader listens, and one that leaves is stopped once the router sends it nothing
//! any more.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::backoff::Backoff;
use super::child::{self, Exit, Handle, Spec, Update};
use super::orders::Order;
use crate::report::{Event, Line, Serving};

/// Updates held for a slow supervisor; a child waits when there are more.
const UPDATES_MAX: usize = 1024;
/// Members whose wait before a restart is over, held likewise.
const DUE_MAX: usize = 64;

/// One process the cluster supervises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Member {
    /// A worker group, counted from 0.
    Group(u32),
    /// The router.
    Router,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group(index) => write!(f, "group {index}"),
            Self::Router => f.write_str("router"),
        }
    }
}

/// A group's leader, once it listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader {
    /// Its group, counted from 0.
    pub group: u32,
    /// Where it listens.
    pub address: SocketAddr,
}

/// What may change while a cluster runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Size {
    /// Number of groups.
    pub groups: u32,
    /// How long a member may take to stop.
    pub grace: Duration,
    /// What members log; `None` leaves it to `RUST_LOG` or their own default. The router is told by its arguments.
    pub log_level: Option<String>,
}

/// What a cluster consists of.
pub struct Cluster<G, R> {
    /// At the start.
    pub size: Size,
    /// How to start a group; when restarted, it is given the address its leader had.
    pub group: G,
    /// How to start the router for these leaders; when restarted, it is given the addresses it had.
    pub router: R,
}

/// What the owner of a cluster hears.
#[derive(Debug, Clone, PartialEq)]
pub enum Happening {
    /// A member's process has started.
    Started {
        /// Which.
        member: Member,
        /// Its process id.
        pid: u32,
    },
    /// A process reported something.
    Said {
        /// The member it belongs to.
        member: Member,
        /// The report.
        line: Line,
    },
    /// All members have been ready once; said once.
    Up(Serving),
    /// A member died and will be started again.
    Restarting {
        /// Which.
        member: Member,
        /// When.
        after: Duration,
        /// How it died.
        why: String,
    },
    /// A group that was taken away has ended.
    Left(u32),
}

/// What is known of one member.
#[derive(Default)]
struct State {
    running: Option<Handle>,
    /// Where a group's leader listens, from its first report on.
    address: Option<SocketAddr>,
    /// Where a router serves, from its first report on.
    serving: Option<Serving>,
    ever_ready: bool,
    ready_since: Option<Instant>,
    backoff: Backoff,
    /// A group that is not wanted any more.
    leaving: bool,
    /// Whether it was told to stop because it leaves.
    stopped: bool,
}

struct Members<'a, G, R, O> {
    cluster: &'a Cluster<G, R>,
    size: Size,
    /// The leaders the router was last told of.
    told: Vec<Leader>,
    /// Orders it has not answered.
    unanswered: u32,
    states: BTreeMap<Member, State>,
    updates: mpsc::Sender<(Member, Update)>,
    /// Members whose wait before a restart is over.
    due: mpsc::Sender<Member>,
    on: O,
    up: bool,
    stopping: bool,
    failure: Option<anyhow::Error>,
}

/// Runs a cluster until it is told to stop or a member dies before it was ever ready. `on` hears what happens; `sizes` says
/// how large it is to be from now on, and that the router is to be configured anew.
///
/// # Errors
/// Names the member that died before it was ready, once all others are gone too.
pub async fn run<G, R>(
    cluster: &Cluster<G, R>,
    stop: &CancellationToken,
    mut sizes: mpsc::Receiver<Size>,
    on: impl FnMut(Happening),
) -> anyhow::Result<()>
where
    G: Fn(u32, Option<SocketAddr>) -> anyhow::Result<Spec>,
    R: Fn(&[Leader], Option<Serving>) -> anyhow::Result<Spec>,
{
    let (updates, mut inbox) = mpsc::channel(UPDATES_MAX);
    let (due, mut restarts) = mpsc::channel(DUE_MAX);
    let size = cluster.size.clone();
    let groups = size.groups;
    let states = (0..groups).map(Member::Group).chain([Member::Router]);
    let states = states.map(|member| (member, State::default())).collect();
    let mut members = Members {
        cluster,
        size,
        told: Vec::new(),
        unanswered: 0,
        states,
        updates,
        due,
        on,
        up: false,
        stopping: false,
        failure: None,
    };
    for index in 0..groups {
        members.start(Member::Group(index))?;
    }
    while !(members.stopping && members.all_gone()) {
        tokio::select! {
            () = stop.cancelled(), if !members.stopping => members.stop(),
            Some((member, update)) = inbox.recv() => match update {
                Update::Said(line) => members.said(member, line)?,
                Update::Exited(exit) => members.exited(member, &exit)?,
            },
            Some(member) = restarts.recv(), if !members.stopping => members.start_again(member)?,
            Some(size) = sizes.recv(), if !members.stopping => members.resize(size)?,
        }
    }
    members.failure.map_or(Ok(()), Err)
}

impl<G, R, O> Members<'_, G, R, O>
where
    G: Fn(u32, Option<SocketAddr>) -> anyhow::Result<Spec>,
    R: Fn(&[Leader], Option<Serving>) -> anyhow::Result<Spec>,
    O: FnMut(Happening),
{
    fn state(&mut self, member: Member) -> &mut State {
        self.states.entry(member).or_default()
    }

    /// The groups that are wanted, with their numbers.
    fn groups(&self) -> impl Iterator<Item = (u32, &State)> {
        self.states.iter().filter_map(|(member, state)| match member {
            Member::Group(index) if !state.leaving => Some((*index, state)),
            Member::Group(_) | Member::Router => None,
        })
    }

    fn leaders(&self) -> Vec<Leader> {
        let leader = |(group, state): (u32, &State)| Some(Leader { group, address: state.address? });
        self.groups().filter_map(leader).collect()
    }

    fn all_gone(&self) -> bool {
        self.states.values().all(|state| state.running.is_none())
    }

    fn start(&mut self, member: Member) -> anyhow::Result<()> {
        let spec = match member {
            Member::Group(index) => (self.cluster.group)(index, self.state(member).address)?,
            Member::Router => {
                (self.told, self.unanswered) = (self.leaders(), 0);
                (self.cluster.router)(&self.told.clone(), self.state(member).serving)?
            }
        };
        let handle = child::spawn(&spec, member, self.updates.clone())?;
        (self.on)(Happening::Started { member, pid: handle.pid() });
        self.state(member).running = Some(handle);
        Ok(())
    }

    /// Its wait is over, unless it was taken away meanwhile.
    fn start_again(&mut self, member: Member) -> anyhow::Result<()> {
        let waits = self.states.get(&member).is_some_and(|state| state.running.is_none());
        if waits { self.start(member) } else { Ok(()) }
    }

    /// New groups start; those that are too many leave, once the router has heard of it.
    fn resize(&mut self, size: Size) -> anyhow::Result<()> {
        let groups = size.groups;
        let louder = size.log_level != self.size.log_level;
        self.size = size;
        for (member, state) in &mut self.states {
            let Member::Group(index) = member else { continue };
            state.leaving = *index >= groups;
            if let (true, Some(handle)) = (louder, &state.running) {
                handle.order(Order::Log { level: self.size.log_level.clone() });
            }
        }
        self.states.retain(|_, state| !state.leaving || state.running.is_some());
        for index in 0..groups {
            let member = Member::Group(index);
            if let Entry::Vacant(place) = self.states.entry(member) {
                place.insert(State::default());
                self.start(member)?;
            }
        }
        self.tell_router()
    }

    /// Tells the router what it is to go on with. One that does not run is started with that.
    fn tell_router(&mut self) -> anyhow::Result<()> {
        let leaders = self.leaders();
        let (running, serving) = match self.states.get(&Member::Router) {
            Some(router) => (router.running.is_some(), router.serving),
            None => (false, None),
        };
        if !running {
            self.stop_leaving();
            return Ok(());
        }
        let spec = (self.cluster.router)(&leaders, serving)?;
        let argv = spec.args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
        self.told = leaders;
        let told = match &self.state(Member::Router).running {
            Some(router) => router.order(Order::Configure { argv }),
            None => false,
        };
        match told {
            true => self.unanswered += 1,
            false => self.stop_leaving(),
        }
        Ok(())
    }

    /// The router sends nothing to them any more.
    fn stop_leaving(&mut self) {
        let grace = self.size.grace;
        for state in self.states.values_mut().filter(|state| state.leaving && !state.stopped) {
            if let Some(handle) = &state.running {
                handle.stop(grace);
                state.stopped = true;
            }
        }
    }

    fn said(&mut self, member: Member, line: Line) -> anyhow::Result<()> {
        let (event, leader) = (line.event.clone(), line.rank == Some(0));
        (self.on)(Happening::Said { member, line });
        match event {
            Event::Listening { address } => {
                self.state(member).address = Some(address);
                self.listens()?;
            }
            Event::Serving(serving) if member == Member::Router => {
                self.state(member).serving = Some(serving);
                self.ready(member);
                // What it was started with may have changed since.
                self.listens()?;
                if self.unanswered == 0 {
                    self.stop_leaving();
                }
            }
            Event::Configured { error } if member == Member::Router => {
                if let Some(error) = error {
                    tracing::error!("the router goes on as before: {error}");
                }
                self.unanswered = self.unanswered.saturating_sub(1);
                if self.unanswered == 0 {
                    self.stop_leaving();
                }
            }
            // Only the leader's readiness counts: it has run a step with all others.
            Event::Ready { .. } if leader => self.ready(member),
            Event::Rendezvous { .. }
            | Event::Ready { .. }
            | Event::Phase { .. }
            | Event::Loaded(_)
            | Event::Alive
            | Event::Serving(_)
            | Event::Configured { .. }
            | Event::Failed { .. } => {}
        }
        Ok(())
    }

    fn listens(&mut self) -> anyhow::Result<()> {
        let all = self.groups().all(|(_, group)| group.address.is_some());
        let router = self.state(Member::Router);
        let (runs, ever_ready) = (router.running.is_some(), router.ever_ready);
        match (self.stopping, runs) {
            (true, _) => Ok(()),
            (false, true) if self.leaders() != self.told => self.tell_router(),
            (false, false) if all && !ever_ready => self.start(Member::Router),
            (false, _) => Ok(()),
        }
    }

    fn ready(&mut self, member: Member) {
        let state = self.state(member);
        state.ever_ready = true;
        state.ready_since = Some(Instant::now());
        let serving = self.state(Member::Router).serving;
        if let (false, Some(serving)) = (self.up, serving)
            && self.states.values().all(|state| state.ever_ready || state.leaving)
        {
            self.up = true;
            (self.on)(Happening::Up(serving));
        }
    }

    /// The router goes first and finishes what it has; the groups follow once it is gone.
    fn stop(&mut self) {
        self.stopping = true;
        let grace = self.size.grace;
        match &self.state(Member::Router).running {
            Some(router) => router.stop(grace),
            None => self.stop_groups(),
        }
    }

    fn stop_groups(&mut self) {
        for state in self.states.values() {
            if let Some(handle) = &state.running {
                handle.stop(self.size.grace);
            }
        }
    }

    fn exited(&mut self, member: Member, exit: &Exit) -> anyhow::Result<()> {
        let (stopping, up) = (self.stopping, self.up);
        let state = self.state(member);
        state.running = None;
        let healthy = state.ready_since.take().map(|since| since.elapsed()).unwrap_or_default();
        if stopping {
            if !exit.status.success() && self.failure.is_none() {
                tracing::warn!("while stopping: {member} {exit}");
            }
            if member == Member::Router {
                self.stop_groups();
            }
        } else if let (Member::Group(index), true) = (member, state.leaving) {
            self.states.remove(&member);
            (self.on)(Happening::Left(index));
        } else if std::mem::take(&mut state.stopped) {
            // It is wanted again.
            state.address = None;
            self.start(member)?;
        } else if state.ever_ready || up {
            let after = state.backoff.after(healthy);
            self.restart(member, after);
            (self.on)(Happening::Restarting { member, after, why: exit.to_string() });
        } else {
            self.failure = Some(anyhow!("{member} {exit}"));
            self.stop();
        }
        Ok(())
    }

    fn restart(&self, member: Member, after: Duration) {
        let due = self.due.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let _ = due.send(member).await;
        });
    }
}
