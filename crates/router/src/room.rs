//! The waiting room: who is served at once, who waits for it, and who is turned away.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::{Failure, Pace};
use tokio::sync::{Notify, oneshot};

use crate::config::Limits;
use crate::fair::{Full, Queue, Ticket, Waiter};

/// Places among the admitted requests, and a queue for them when all are taken.
#[derive(Debug)]
pub(crate) struct Room {
    inside: Mutex<Inside>,
    /// Told whenever nobody is in any more.
    empty: Notify,
}

#[derive(Debug)]
struct Inside {
    limits: Limits,
    taken: u32,
    /// Whoever waits is told here that its places are counted as taken.
    queue: Queue<oneshot::Sender<()>>,
    pace: Pace,
}

/// Some places, given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Places {
    room: Arc<Room>,
    count: u32,
}

/// How full a room is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Occupancy {
    pub(crate) taken: u32,
    pub(crate) taken_max: u32,
    pub(crate) waiting: u32,
    pub(crate) waiting_max: u32,
    pub(crate) waiting_tokens: u64,
}

/// Why one was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turned {
    /// Nobody waits here: all places are taken.
    NoRoom,
    /// The waiting room is full.
    Full(Full),
    /// It waited as long as one may.
    TooLong,
}

impl Turned {
    /// A label for whoever counts.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::NoRoom => "requests",
            Self::Full(Full::Requests) => "waiting_requests",
            Self::Full(Full::Tokens) => "waiting_tokens",
            Self::Full(Full::Bytes) => "waiting_bytes",
            Self::Full(Full::KeyRequests) => "waiting_key_requests",
            Self::TooLong => "wait",
        }
    }

    /// All of them, so that each is counted from the start.
    pub(crate) const ALL: [Self; 6] = [
        Self::NoRoom,
        Self::Full(Full::Requests),
        Self::Full(Full::Tokens),
        Self::Full(Full::Bytes),
        Self::Full(Full::KeyRequests),
        Self::TooLong,
    ];

    /// The refusal its caller gets.
    pub(crate) fn refusal(self, limits: &Limits, retry_after: Duration) -> Failure {
        let queue = &limits.queue;
        let (what, max) = match self {
            Self::NoRoom | Self::TooLong => ("requests", limits.requests_max.into()),
            Self::Full(Full::Requests) => ("waiting requests", queue.requests_max.into()),
            Self::Full(Full::Tokens) => ("waiting tokens", queue.tokens_max),
            Self::Full(Full::Bytes) => ("bytes of waiting prompts", queue.bytes_max as u64),
            Self::Full(Full::KeyRequests) => ("waiting requests of one key", queue.key_requests_max.into()),
        };
        Failure::Overloaded { what: what.to_owned(), max, retry_after }
    }
}

impl Room {
    /// One with nobody in it.
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        let inside = Inside { limits, taken: 0, queue: Queue::default(), pace: Pace::default() };
        Arc::new(Self { inside: Mutex::new(inside), empty: Notify::new() })
    }

    /// Places, if they are free and nobody waits.
    pub(crate) fn try_enter(self: &Arc<Self>, count: u32) -> Option<Places> {
        let mut inside = self.inside();
        if !inside.queue.is_empty() || !inside.has_free(count) {
            inside.pace.full(Instant::now());
            return None;
        }
        inside.taken += count;
        Some(self.places(count))
    }

    /// The places that `waiter` needs, at once when they are free and nobody waits. Dropping this leaves the queue.
    ///
    /// # Errors
    /// Why it is turned away.
    pub(crate) async fn enter(self: &Arc<Self>, waiter: Waiter) -> Result<Places, Turned> {
        let count = waiter.places;
        if let Some(places) = self.try_enter(count) {
            return Ok(places);
        }
        let (tell, told) = oneshot::channel();
        let (ticket, patience) = {
            let mut inside = self.inside();
            let limits = inside.limits;
            if limits.queue.requests_max == 0 {
                return Err(Turned::NoRoom);
            }
            let ticket = inside.queue.push(waiter, tell, &limits.queue.bounds(), Instant::now());
            let ticket = ticket.map_err(Turned::Full)?;
            // It may go before all others, and some places may be free: too few for who was next until now.
            inside.let_in();
            (ticket, limits.queue.wait_max)
        };
        let mut waiting = Waiting { room: self, ticket: Some(ticket), count };
        match tokio::time::timeout(patience, told).await {
            Ok(Ok(())) => {
                waiting.ticket = None;
                Ok(self.places(count))
            }
            Ok(Err(_)) | Err(_) => Err(Turned::TooLong),
        }
    }

    /// Goes on with other bounds. Who is in stays in, and who waits goes on waiting, even when that is more than the new
    /// bounds let in.
    pub(crate) fn set(&self, limits: Limits) {
        let mut inside = self.inside();
        inside.limits = limits;
        inside.let_in();
    }

    /// When it is worth to come back for one who is turned away now.
    pub(crate) fn retry_after(&self) -> Duration {
        let inside = self.inside();
        inside.pace.wait(inside.queue.requests(), Instant::now())
    }

    /// How full it is now.
    pub(crate) fn occupancy(&self) -> Occupancy {
        let inside = self.inside();
        Occupancy {
            taken: inside.taken,
            taken_max: inside.limits.requests_max,
            waiting: inside.queue.requests(),
            waiting_max: inside.limits.queue.requests_max,
            waiting_tokens: inside.queue.tokens(),
        }
    }

    /// Returns once nobody is in and nobody waits.
    pub(crate) async fn emptied(&self) {
        loop {
            let told = self.empty.notified();
            if self.inside().is_empty() {
                return;
            }
            told.await;
        }
    }

    fn places(self: &Arc<Self>, count: u32) -> Places {
        Places { room: Arc::clone(self), count }
    }

    fn leave(&self, count: u32) {
        let now = Instant::now();
        let mut inside = self.inside();
        inside.taken -= count;
        inside.pace.left(count, now);
        inside.let_in();
        if inside.queue.is_empty() && inside.has_free(1) {
            inside.pace.eased(now);
        }
        if inside.is_empty() {
            self.empty.notify_waiters();
        }
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        // Every change is complete before its lock is given back.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside {
    /// One that needs more than there are at all is let in when it is alone.
    const fn has_free(&self, count: u32) -> bool {
        self.taken == 0 || self.taken.saturating_add(count) <= self.limits.requests_max
    }

    fn is_empty(&self) -> bool {
        self.taken == 0 && self.queue.is_empty()
    }

    /// Lets in who is next for as long as there is room for it; nobody overtakes one that needs more than is free.
    fn let_in(&mut self) {
        while self.queue.peek().is_some_and(|next| self.has_free(next.places)) {
            let Some((waiter, tell)) = self.queue.pop() else { return };
            // Who leaves at this moment gives the places back itself: its ticket is gone from the queue.
            self.taken += waiter.places;
            let _ = tell.send(());
        }
    }
}

/// One that waits; dropped early, it leaves no trace.
struct Waiting<'a> {
    room: &'a Arc<Room>,
    /// Until its places are its own.
    ticket: Option<Ticket>,
    count: u32,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket.take() else { return };
        let removed = self.room.inside().queue.remove(&ticket);
        match removed {
            // The next one may need less.
            Some(_) => self.room.leave(0),
            // It was let in and had not heard of it yet.
            None => self.room.leave(self.count),
        }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        self.room.leave(self.count);
    }
}
