//! The ranks of one worker group: they live and die together.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use anyhow::anyhow;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use types::TpSize;
use worker::ALIVE_INTERVAL;

use super::child::{self, Exit, Handle, Spec, Update};
use super::orders::Order;
use crate::report::{Event, Line};

/// How long ranks may take to stop once the leader is gone or another rank has failed: they have nothing to finish.
pub const FOLLOWER_GRACE: Duration = Duration::from_secs(2);
/// Shortest silence after which a rank counts as hanging, whatever a step may take: a busy machine is slow, too.
pub const SILENCE_MIN: Duration = Duration::from_secs(10);
/// Updates held for a slow supervisor; a child waits when there are more.
const UPDATES_MAX: usize = 256;

/// What a group consists of.
pub struct Group<F> {
    /// Number of ranks, on all hosts.
    pub size: TpSize,
    /// Those that run on this host.
    pub ranks: Range<u32>,
    /// How long the leader may take to finish open requests after the order to stop.
    pub leader_grace: Duration,
    /// How long a rank that was ready may give no sign of life before it is killed.
    pub silence_max: Duration,
    /// How to start a rank; all but rank 0 are told where to meet.
    pub spec: F,
}

struct Ranks<'a, F> {
    group: &'a Group<F>,
    running: BTreeMap<u32, Handle>,
    updates: mpsc::Sender<(u32, Update)>,
    /// Ranks that ended unasked; the first one, or the first one killed, is the cause.
    lost: Vec<(u32, Exit)>,
    stopping: bool,
    /// Beats missed, by rank, from the moment it was ready.
    missed: BTreeMap<u32, u32>,
    /// The rank that was killed because it missed too many.
    hung: Option<u32>,
}

/// Runs a group until it is told to stop or a rank ends. `on` hears every report, with its rank; `orders` are passed on to all
/// ranks.
///
/// # Errors
/// Names the rank that ended although nobody asked it to, and how it ended, once all others are gone too.
pub async fn run<F>(
    group: &Group<F>,
    stop: &CancellationToken,
    mut orders: mpsc::Receiver<Order>,
    mut on: impl FnMut(Line),
) -> anyhow::Result<()>
where
    F: Fn(u32, Option<SocketAddr>) -> anyhow::Result<Spec>,
{
    let (updates, mut inbox) = mpsc::channel(UPDATES_MAX);
    let mut ranks = Ranks {
        group,
        running: BTreeMap::new(),
        updates,
        lost: Vec::new(),
        stopping: false,
        missed: BTreeMap::new(),
        hung: None,
    };
    // Counted, so that a machine that slept does not find everybody silent.
    let mut beat = tokio::time::interval(ALIVE_INTERVAL);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    match group.ranks.contains(&0) {
        true => ranks.start(0, None)?,
        // Rank 0 runs on another host, which these know.
        false => group.ranks.clone().try_for_each(|rank| ranks.start(rank, None))?,
    }
    while !ranks.running.is_empty() {
        tokio::select! {
            () = stop.cancelled(), if !ranks.stopping => ranks.stop(),
            _ = beat.tick() => ranks.beat(),
            Some(order) = orders.recv() => ranks.running.values().for_each(|rank| _ = rank.order(order.clone())),
            Some((rank, update)) = inbox.recv() => match update {
                Update::Said(mut line) => {
                    if let Event::Rendezvous { address } = line.event {
                        ranks.meet(address)?;
                    }
                    ranks.heard(rank, &line.event);
                    if line.event != Event::Alive {
                        line.rank = Some(rank);
                        on(line);
                    }
                }
                Update::Exited(exit) => ranks.exited(rank, exit),
            },
        }
    }
    ranks.verdict()
}

impl<F: Fn(u32, Option<SocketAddr>) -> anyhow::Result<Spec>> Ranks<'_, F> {
    fn start(&mut self, rank: u32, rendezvous: Option<SocketAddr>) -> anyhow::Result<()> {
        let handle = child::spawn(&(self.group.spec)(rank, rendezvous)?, rank, self.updates.clone())?;
        tracing::info!(rank, pid = handle.pid(), "started");
        self.running.insert(rank, handle);
        Ok(())
    }

    /// Rank 0 listens: the others can come.
    fn meet(&mut self, rendezvous: SocketAddr) -> anyhow::Result<()> {
        if self.stopping || self.running.len() > 1 {
            return Ok(());
        }
        for rank in 1..self.group.ranks.end {
            self.start(rank, Some(rendezvous))?;
        }
        Ok(())
    }

    fn heard(&mut self, rank: u32, event: &Event) {
        if matches!(event, Event::Ready { .. }) {
            self.missed.insert(rank, 0);
        } else if let Some(missed) = self.missed.get_mut(&rank) {
            *missed = 0;
        }
    }

    /// Ends the rank that has been silent for too long. A group that is stopping has a grace of its own.
    fn beat(&mut self) {
        self.missed.values_mut().for_each(|missed| *missed += 1);
        let silent = |missed: u32| ALIVE_INTERVAL * missed > self.group.silence_max;
        let hung = self.missed.iter().find(|(_, missed)| silent(**missed)).map(|(rank, _)| *rank);
        let Some(rank) = hung.filter(|_| !self.stopping && self.hung.is_none()) else { return };
        if let Some(handle) = self.running.get(&rank) {
            tracing::error!(rank, pid = handle.pid(), "gives no sign of life: ending it");
            handle.stop(FOLLOWER_GRACE);
            self.hung = Some(rank);
        }
    }

    /// The leader goes first: while it finishes open requests it needs the others.
    fn stop(&mut self) {
        self.stopping = true;
        match self.running.get(&0) {
            Some(leader) => leader.stop(self.group.leader_grace),
            // Rank 0 runs elsewhere: the ranks here end with it, or give up when it does not end in time.
            None => self.running.values().for_each(|handle| handle.stop(self.group.leader_grace)),
        }
    }

    fn stop_all(&mut self) {
        self.stopping = true;
        for handle in self.running.values() {
            handle.stop(FOLLOWER_GRACE);
        }
    }

    fn exited(&mut self, rank: u32, exit: Exit) {
        self.running.remove(&rank);
        self.missed.remove(&rank);
        // Followers of a leader elsewhere end when it has ended the group in good order.
        self.stopping |= !self.group.ranks.contains(&0) && exit.status.success();
        let unexpected = !self.stopping || exit.killed_by_others();
        if unexpected {
            self.lost.push((rank, exit));
        } else if !self.lost.is_empty() {
            // Its peer is gone, so of course it failed.
            tracing::debug!(rank, "after the group was lost: {exit}");
        } else if !exit.status.success() {
            tracing::warn!(rank, "while stopping: {exit}");
        }
        if unexpected || rank == 0 {
            self.stop_all();
        }
    }

    fn verdict(self) -> anyhow::Result<()> {
        if let Some(rank) = self.hung {
            let seconds = self.group.silence_max.as_secs();
            return Err(anyhow!("rank {rank} of {} gave no sign of life for {seconds} s", self.group.size));
        }
        // A rank that loses a peer fails too, and may be seen first: the one that was killed is the cause.
        let killed = self.lost.iter().find(|(_, exit)| exit.killed_by_others());
        match killed.or(self.lost.first()) {
            None => Ok(()),
            Some((rank, exit)) => Err(anyhow!("rank {rank} of {} {exit}", self.group.size)),
        }
    }
}
