//! The second half: every pair of ranks connects, the higher one dialling the lower.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use types::TpRank;

use super::gather::stopped;
use super::lobby::{Event, Lobby};
use super::secret::same;
use super::wire::{Decoded, Message, Purpose, Refusal, Token, encode};
use crate::socket;
use crate::{Error, tcp::Link};

/// Who is where, and what opens a connection of the mesh.
pub(super) struct Book {
    pub(super) token: Token,
    /// For rank 0: of ranks 1, 2, …, which it never dials. For the others: of every rank.
    pub(super) addresses: Vec<SocketAddr>,
}

/// This rank's plan connections.
pub(super) enum PlanStreams {
    Followers(Vec<TcpStream>),
    Leader(TcpStream),
}

/// The connections of one rank, as far as they are made.
pub(super) struct Mesh {
    rank: TpRank,
    book: Book,
    /// Indexed by rank.
    corners: Vec<Corner>,
}

/// The connections to one peer.
#[derive(Default)]
struct Corner {
    data: Option<TcpStream>,
    control: Option<TcpStream>,
    plan: Option<TcpStream>,
}

impl Corner {
    const fn slot(&mut self, purpose: Purpose) -> &mut Option<TcpStream> {
        match purpose {
            Purpose::Data => &mut self.data,
            Purpose::Control => &mut self.control,
            Purpose::Plan => &mut self.plan,
        }
    }
}

impl Mesh {
    pub(super) fn new(rank: TpRank, book: Book) -> Self {
        let corners = rank.size().ranks().map(|_| Corner::default()).collect();
        Self { rank, book, corners }
    }

    /// Connects to every lower rank. A listening rank's system takes the connection before the rank itself does, so
    /// this cannot deadlock.
    pub(super) fn dial(&mut self, until: Instant) -> Result<(), Error> {
        for peer in 0..self.rank.as_usize() {
            for purpose in [Purpose::Data, Purpose::Control, Purpose::Plan] {
                if purpose == Purpose::Plan && peer != 0 {
                    continue;
                }
                let stream = self.dial_one(peer, purpose, until)?;
                *self.corners[peer].slot(purpose) = Some(stream);
            }
        }
        Ok(())
    }

    fn dial_one(&self, peer: usize, purpose: Purpose, until: Instant) -> Result<TcpStream, Error> {
        let address = self.book.addresses[peer];
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let stopped = |stop| stopped(peer as u32, stop, left);
        let connect = || {
            let stream = TcpStream::connect_timeout(&address, left)?;
            socket::prepare(&stream)?;
            Ok(stream)
        };
        let stream = connect()
            .map_err(|error| Error::io(format!("connecting to rank {peer} at {address}"), &error))?;
        let hello = Message::Connect { token: self.book.token, rank: self.rank.index(), purpose };
        socket::write_full(&stream, &encode(&hello), &[], until).map_err(stopped)?;
        Ok(stream)
    }

    /// Takes the connections of every higher rank; drops those of anyone else.
    pub(super) fn accept(
        &mut self,
        listener: &TcpListener,
        until: Instant,
        within: Duration,
    ) -> Result<(), Error> {
        let mut lobby = Lobby::new(listener);
        loop {
            let missing = self.missing();
            if missing.is_empty() {
                return Ok(());
            }
            let event = lobby.next(&[], until);
            match event.map_err(|error| Error::io("waiting for ranks", &error))? {
                Event::Arrived(stream, from, Decoded::Message(Message::Connect { token, rank, purpose })) => {
                    if !self.seat(stream, &token, rank, purpose) {
                        tracing::warn!(%from, rank, "dropped a connection that is no rank of this group");
                    }
                }
                Event::Arrived(stream, from, _) => {
                    tracing::warn!(%from, "sent away a process that came after the group was complete");
                    let reason = "the group is complete already".to_owned();
                    let refusal = encode(&Message::Refused(Refusal::GaveUp { reason }));
                    // A new connection has room for it; if not, the process sees the end, which says enough.
                    let _ = socket::write_full(&stream, &refusal, &[], Instant::now());
                }
                Event::Stirred(_) => {}
                Event::Late => return Err(Error::Absent { ranks: missing, after: within }),
            }
        }
    }

    /// Keeps a connection a higher rank made; `false` when it is not one.
    fn seat(&mut self, stream: TcpStream, token: &Token, rank: u32, purpose: Purpose) -> bool {
        let wanted = rank > self.rank.index() && (purpose != Purpose::Plan || self.rank.is_leader());
        if !same(token, &self.book.token) || !wanted {
            return false;
        }
        let Some(corner) = self.corners.get_mut(rank as usize) else { return false };
        let slot = corner.slot(purpose);
        if slot.is_some() {
            return false;
        }
        *slot = Some(stream);
        true
    }

    /// Higher ranks with a connection still to come.
    fn missing(&self) -> Vec<u32> {
        let leads = self.rank.is_leader();
        let incomplete = |corner: &Corner| {
            corner.data.is_none() || corner.control.is_none() || (leads && corner.plan.is_none())
        };
        let higher = (0u32..).zip(&self.corners).skip(self.rank.as_usize() + 1);
        higher.filter(|(_, corner)| incomplete(corner)).map(|(rank, _)| rank).collect()
    }

    /// The links by rank and the plan connections of a complete mesh.
    pub(super) fn into_parts(self) -> (Vec<Option<Link>>, PlanStreams, TpRank) {
        let mut links = Vec::new();
        let mut plans = Vec::new();
        for corner in self.corners {
            links.push(corner.data.zip(corner.control).map(|(data, control)| Link { data, control }));
            plans.extend(corner.plan);
        }
        let plan = if self.rank.is_leader() {
            PlanStreams::Followers(plans)
        } else {
            PlanStreams::Leader(plans.remove(0))
        };
        (links, plan, self.rank)
    }
}
