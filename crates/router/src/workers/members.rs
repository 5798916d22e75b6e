//! Groups come and go while a router serves: new ones join, and those that leave finish what they have.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::line::Line;
use super::{Group, Groups, InFlight, Link, Placement, REASONS, Seen, Standing, connect};
use crate::Error;
use crate::breaker::Breaker;
use tokio::sync::Notify;

/// Where a leader listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Address {
    /// `http://host:port` or `https://host:port`.
    pub(crate) url: String,
    /// The name its certificate must have, when that is not the host.
    pub(crate) certified: Option<String>,
    /// Its share of the requests beside those of the others; with 0 it gets none.
    pub(crate) weight: u32,
}

impl Groups {
    /// From now on these are the groups. Those that were there stay as they are; the others get no new requests and are
    /// forgotten once they have finished what they have. Inside a runtime.
    ///
    /// # Errors
    /// [`Error::WorkerAddress`] for an address that is none; nothing is changed then.
    pub(crate) fn set(self: &Arc<Self>, addresses: &[Address]) -> Result<(), Error> {
        let mut state = self.state();
        // A group that leaves and comes back is met where it is.
        let known = |address: &Address| {
            let mut here = state.groups.iter().zip(&state.seen);
            here.any(|(group, seen)| group.address == address.url && seen.standing != Standing::Gone)
        };
        let mut connected: Vec<(&Address, Line)> = Vec::new();
        for address in addresses.iter().filter(|address| !known(address)) {
            if !connected.iter().any(|(other, _)| other.url == address.url) {
                let line = connect::line(address, self.dialer.as_ref(), self.badge.clone())?;
                connected.push((address, line));
            }
        }
        let (mut joined, mut left) = (Vec::new(), Vec::new());
        for index in 0..state.groups.len() {
            let stays = addresses.iter().find(|address| address.url == state.groups[index].address);
            let Seen { standing, weight, .. } = &mut state.seen[index];
            if let (Some(address), true) = (stays, *standing != Standing::Gone) {
                *weight = address.weight;
            }
            match (*standing, stays.is_some()) {
                (Standing::Member, false) => {
                    *standing = Standing::Leaving;
                    left.push((index, Arc::clone(&state.groups[index])));
                }
                (Standing::Leaving, true) => *standing = Standing::Member,
                (Standing::Member, true) | (Standing::Leaving, false) | (Standing::Gone, _) => {}
            }
        }
        for (Address { url: address, weight, .. }, line) in connected {
            let group = Arc::new(Group {
                address: address.clone(),
                line,
                in_flight: AtomicUsize::new(0),
                idle: Notify::new(),
                gone: self.stop.child_token(),
            });
            for reason in REASONS {
                let _ = self.placements.get_or_create(&Placement { group: address.clone(), reason });
            }
            joined.push((state.seat(Arc::clone(&group), *weight), group));
        }
        state.choose_served();
        drop(state);
        self.follow(joined, left);
        self.changed.send_replace(());
        Ok(())
    }

    fn follow(self: &Arc<Self>, joined: Vec<(usize, Arc<Group>)>, left: Vec<(usize, Arc<Group>)>) {
        for (index, group) in joined {
            tracing::info!(group = %group.address, "a group joins");
            let groups = Arc::clone(self);
            tokio::spawn(group.gone.clone().run_until_cancelled_owned(async move {
                groups.keep_watching(index, &group).await;
            }));
        }
        for (index, group) in left {
            let open = group.in_flight.load(Ordering::Relaxed);
            tracing::info!(group = %group.address, open, "a group leaves: it finishes what it has");
            let groups = Arc::clone(self);
            tokio::spawn(group.gone.clone().run_until_cancelled_owned(async move {
                groups.forget_when_idle(index, &group).await;
            }));
        }
    }

    /// Waits for the end of what runs at a group that leaves, and frees its place.
    async fn forget_when_idle(&self, index: usize, group: &Arc<Group>) {
        loop {
            // What is told between the look and the wait is kept for it.
            let told = group.idle.notified();
            {
                let mut state = self.state();
                let leaves = Arc::ptr_eq(&state.groups[index], group)
                    && state.seen[index].standing == Standing::Leaving;
                if !leaves {
                    return;
                }
                if group.in_flight.load(Ordering::Relaxed) == 0 {
                    state.seen[index].standing = Standing::Gone;
                    state.affinity.forget(index);
                    break;
                }
            }
            told.await;
        }
        for reason in REASONS {
            self.placements.remove(&Placement { group: group.address.clone(), reason });
        }
        tracing::info!(group = %group.address, "a group has left");
        self.changed.send_replace(());
        group.gone.cancel();
    }
}

impl super::State {
    /// A place for a new group: one that is free, else the next.
    fn seat(&mut self, group: Arc<Group>, weight: u32) -> usize {
        let seen = Seen {
            standing: Standing::Member,
            weight,
            link: Link::Down { why: "not connected yet".to_owned() },
            facts: None,
            others: 0,
            kv_blocks: 0,
            metrics_port: 0,
        };
        match self.seen.iter().position(|seen| seen.standing == Standing::Gone) {
            Some(index) => {
                self.groups[index] = group;
                self.seen[index] = seen;
                self.breakers[index] = Breaker::default();
                index
            }
            None => {
                self.groups.push(group);
                self.seen.push(seen);
                self.breakers.push(Breaker::default());
                self.groups.len() - 1
            }
        }
    }
}

impl InFlight {
    pub(super) fn new(group: Arc<Group>, index: usize) -> Self {
        group.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { group, index }
    }
}
