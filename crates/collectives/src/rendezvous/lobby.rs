//! Where connections wait until they have said who they are. Strays that say something else, or nothing, are dropped
//! and never keep the others waiting.

use std::io::{self, ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::wire::{Decoded, PREFIX_BYTES, body_length, decode};
use crate::socket;

/// Connections that may be waiting at once; beyond that the oldest goes, so strays cannot use up descriptors.
const VISITORS_MAX: usize = 512;
/// How long a connection may stay silent. A rank says who it is in its first packet.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) struct Lobby<'a> {
    listener: &'a TcpListener,
    visitors: Vec<Visitor>,
}

struct Visitor {
    stream: TcpStream,
    from: SocketAddr,
    came: Instant,
    bytes: Vec<u8>,
    /// Bytes to read before the message can be looked at again; never more, as data may follow it.
    wanted: usize,
}

/// What happened in the lobby.
pub(super) enum Event {
    /// A connection said who it is.
    Arrived(TcpStream, SocketAddr, Decoded),
    /// The watched connection at this place has something to read or has closed.
    Stirred(usize),
    /// Nothing until the deadline.
    Late,
}

enum Heard {
    Unfinished,
    Message(Decoded),
    Useless(&'static str),
}

impl<'a> Lobby<'a> {
    /// `listener` must be non-blocking.
    pub(super) const fn new(listener: &'a TcpListener) -> Self {
        Self { listener, visitors: Vec::new() }
    }

    /// Waits for the next event; connections in `watched` are looked at too.
    pub(super) fn next(&mut self, watched: &[&TcpStream], until: Instant) -> io::Result<Event> {
        loop {
            if let Some(event) = self.listen() {
                return Ok(event);
            }
            self.dismiss_silent();
            let now = Instant::now();
            if now >= until {
                return Ok(Event::Late);
            }
            let patience = self.visitors.iter().map(|visitor| visitor.came + PATIENCE).min();
            let wake = patience.map_or(until, |first| first.min(until));
            let mut fds: Vec<PollFd<'_>> =
                watched.iter().map(|stream| PollFd::new(*stream, PollFlags::IN)).collect();
            fds.push(PollFd::new(self.listener, PollFlags::IN));
            fds.extend(self.visitors.iter().map(|visitor| PollFd::new(&visitor.stream, PollFlags::IN)));
            socket::ready(&mut fds, Some(wake.saturating_duration_since(now)))?;
            if let Some(at) = fds[..watched.len()].iter().position(|fd| !fd.revents().is_empty()) {
                return Ok(Event::Stirred(at));
            }
            self.accept()?;
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            match self.listener.accept() {
                Ok((stream, from)) => {
                    if self.visitors.len() == VISITORS_MAX {
                        let oldest = self.visitors.remove(0);
                        tracing::warn!(from = %oldest.from, "dropped a connection: too many are waiting");
                    }
                    if let Err(error) = socket::prepare(&stream) {
                        tracing::warn!(%from, %error, "dropped a connection that broke at once");
                        continue;
                    }
                    let came = Instant::now();
                    let visitor = Visitor { stream, from, came, bytes: Vec::new(), wanted: PREFIX_BYTES };
                    self.visitors.push(visitor);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads from every visitor; returns the first that has said who it is.
    fn listen(&mut self) -> Option<Event> {
        let mut at = 0;
        while at < self.visitors.len() {
            match self.visitors[at].hear() {
                Heard::Unfinished => at += 1,
                Heard::Message(message) => {
                    let Visitor { stream, from, .. } = self.visitors.remove(at);
                    return Some(Event::Arrived(stream, from, message));
                }
                Heard::Useless(reason) => {
                    let from = self.visitors.remove(at).from;
                    tracing::warn!(%from, reason, "dropped a connection that is no rank of this group");
                }
            }
        }
        None
    }

    fn dismiss_silent(&mut self) {
        self.visitors.retain(|visitor| {
            let stays = visitor.came.elapsed() < PATIENCE;
            if !stays {
                tracing::warn!(from = %visitor.from, "dropped a connection that did not say who it is");
            }
            stays
        });
    }
}

impl Visitor {
    fn hear(&mut self) -> Heard {
        loop {
            let have = self.bytes.len();
            if have == self.wanted {
                let Some(prefix) = self.bytes.first_chunk::<PREFIX_BYTES>() else { return Heard::Unfinished };
                match body_length(prefix) {
                    Err(reason) => return Heard::Useless(reason),
                    Ok(len) if have < PREFIX_BYTES + len => self.wanted = PREFIX_BYTES + len,
                    Ok(_) => {
                        let message = decode(&self.bytes);
                        return message.map_or(Heard::Useless("its message is malformed"), Heard::Message);
                    }
                }
            }
            self.bytes.resize(self.wanted, 0);
            let outcome = self.stream.read(&mut self.bytes[have..]);
            self.bytes.truncate(have + *outcome.as_ref().unwrap_or(&0));
            match outcome {
                Ok(0) => return Heard::Useless("it closed before it said who it is"),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Heard::Unfinished,
                Err(_) => return Heard::Useless("its connection broke"),
            }
        }
    }
}
