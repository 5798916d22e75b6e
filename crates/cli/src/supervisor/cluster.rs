//! A router and its worker groups on one machine. A member that dies after it was ready is restarted at the same
//! address; one that dies before ends the cluster with its error.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::backoff::Backoff;
use super::child::{self, Exit, Handle, Spec, Update};
use crate::report::{Event, Line, Serving};

/// Updates held for a slow supervisor; a child waits when there are more.
const UPDATES_MAX: usize = 1024;

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

/// What a cluster consists of.
pub struct Cluster<G, R> {
    /// Number of groups.
    pub groups: u32,
    /// How long a member may take to stop.
    pub grace: Duration,
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
}

struct Members<'a, G, R, O> {
    cluster: &'a Cluster<G, R>,
    states: BTreeMap<Member, State>,
    updates: mpsc::Sender<(Member, Update)>,
    /// Members whose wait before a restart is over.
    due: mpsc::Sender<Member>,
    on: O,
    up: bool,
    stopping: bool,
    failure: Option<anyhow::Error>,
}

/// Runs a cluster until it is told to stop or a member dies before it was ever ready. `on` hears what happens.
///
/// # Errors
/// Names the member that died before it was ready, once all others are gone too.
pub async fn run<G, R>(
    cluster: &Cluster<G, R>,
    stop: &CancellationToken,
    on: impl FnMut(Happening),
) -> anyhow::Result<()>
where
    G: Fn(u32, Option<SocketAddr>) -> anyhow::Result<Spec>,
    R: Fn(&[SocketAddr], Option<Serving>) -> anyhow::Result<Spec>,
{
    let (updates, mut inbox) = mpsc::channel(UPDATES_MAX);
    let (due, mut restarts) = mpsc::channel(cluster.groups as usize + 1);
    let states = (0..cluster.groups).map(Member::Group).chain([Member::Router]);
    let states = states.map(|member| (member, State::default())).collect();
    let mut members =
        Members { cluster, states, updates, due, on, up: false, stopping: false, failure: None };
    for index in 0..cluster.groups {
        members.start(Member::Group(index))?;
    }
    while !(members.stopping && members.all_gone()) {
        tokio::select! {
            () = stop.cancelled(), if !members.stopping => members.stop(),
            Some((member, update)) = inbox.recv() => match update {
                Update::Said(line) => members.said(member, line)?,
                Update::Exited(exit) => members.exited(member, &exit),
            },
            Some(member) = restarts.recv(), if !members.stopping => members.start(member)?,
        }
    }
    members.failure.map_or(Ok(()), Err)
}

impl<G, R, O> Members<'_, G, R, O>
where
    G: Fn(u32, Option<SocketAddr>) -> anyhow::Result<Spec>,
    R: Fn(&[SocketAddr], Option<Serving>) -> anyhow::Result<Spec>,
    O: FnMut(Happening),
{
    fn state(&mut self, member: Member) -> &mut State {
        self.states.entry(member).or_default()
    }

    fn groups(&self) -> impl Iterator<Item = &State> {
        self.states.iter().filter(|(member, _)| **member != Member::Router).map(|(_, state)| state)
    }

    fn all_gone(&self) -> bool {
        self.states.values().all(|state| state.running.is_none())
    }

    fn start(&mut self, member: Member) -> anyhow::Result<()> {
        let spec = match member {
            Member::Group(index) => (self.cluster.group)(index, self.state(member).address)?,
            Member::Router => {
                let leaders: Vec<SocketAddr> = self.groups().filter_map(|group| group.address).collect();
                (self.cluster.router)(&leaders, self.state(member).serving)?
            }
        };
        let handle = child::spawn(&spec, member, self.updates.clone())?;
        (self.on)(Happening::Started { member, pid: handle.pid() });
        self.state(member).running = Some(handle);
        Ok(())
    }

    fn said(&mut self, member: Member, line: Line) -> anyhow::Result<()> {
        let (event, leader) = (line.event.clone(), line.rank == Some(0));
        (self.on)(Happening::Said { member, line });
        match event {
            Event::Listening { address } => {
                self.state(member).address = Some(address);
                self.start_router_once_leaders_listen()?;
            }
            Event::Serving(serving) if member == Member::Router => {
                self.state(member).serving = Some(serving);
                self.ready(member);
            }
            // Only the leader's readiness counts: it has run a step with all others.
            Event::Ready { .. } if leader => self.ready(member),
            Event::Rendezvous { .. }
            | Event::Ready { .. }
            | Event::Phase { .. }
            | Event::Loaded(_)
            | Event::Alive
            | Event::Serving(_)
            | Event::Failed { .. } => {}
        }
        Ok(())
    }

    fn start_router_once_leaders_listen(&mut self) -> anyhow::Result<()> {
        let listen = self.groups().all(|group| group.address.is_some());
        let router = self.state(Member::Router);
        let never_started = router.running.is_none() && !router.ever_ready;
        if listen && never_started && !self.stopping { self.start(Member::Router) } else { Ok(()) }
    }

    fn ready(&mut self, member: Member) {
        let state = self.state(member);
        state.ever_ready = true;
        state.ready_since = Some(Instant::now());
        let serving = self.state(Member::Router).serving;
        if let (false, Some(serving)) = (self.up, serving)
            && self.states.values().all(|state| state.ever_ready)
        {
            self.up = true;
            (self.on)(Happening::Up(serving));
        }
    }

    /// The router goes first and finishes what it has; the groups follow once it is gone.
    fn stop(&mut self) {
        self.stopping = true;
        let grace = self.cluster.grace;
        match &self.state(Member::Router).running {
            Some(router) => router.stop(grace),
            None => self.stop_groups(),
        }
    }

    fn stop_groups(&mut self) {
        for state in self.states.values() {
            if let Some(handle) = &state.running {
                handle.stop(self.cluster.grace);
            }
        }
    }

    fn exited(&mut self, member: Member, exit: &Exit) {
        let stopping = self.stopping;
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
        } else if state.ever_ready {
            let after = state.backoff.after(healthy);
            self.restart(member, after);
            (self.on)(Happening::Restarting { member, after, why: exit.to_string() });
        } else {
            self.failure = Some(anyhow!("{member} {exit}"));
            self.stop();
        }
    }

    fn restart(&self, member: Member, after: Duration) {
        let due = self.due.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let _ = due.send(member).await;
        });
    }
}
