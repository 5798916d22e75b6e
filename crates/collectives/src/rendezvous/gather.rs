//! The first half: rank 0 gathers the others and sends away those that must not join.

use std::fs::File;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::lobby::{Event, Lobby};
use super::mesh::Book;
use super::secret::{GroupSecret, answer_to};
use super::wire::{
    Decoded, Hello, Message, PREFIX_BYTES, PROTOCOL_VERSION, Refusal, Token, body_length, decode, encode,
};
use super::{Member, NAME};
use crate::socket::{self, Stop};
use crate::{Error, Field};

/// How long to try to tell a rank that it is sent away; the message is small, so this matters only if it is stuck.
const FAREWELL: Duration = Duration::from_millis(500);

/// A rank that has come.
pub(super) struct Seat {
    stream: TcpStream,
    mesh: SocketAddr,
}

/// Rank 0 waiting for the others.
pub(super) struct Gathering<'a> {
    lobby: Lobby<'a>,
    member: &'a Member,
    /// Ranks 1, 2, ….
    seats: Vec<Option<Seat>>,
    within: Duration,
}

impl<'a> Gathering<'a> {
    pub(super) fn new(listener: &'a TcpListener, member: &'a Member, within: Duration) -> Self {
        let seats = (1..member.rank.size().get()).map(|_| None).collect();
        Self { lobby: Lobby::new(listener), member, seats, within }
    }

    /// Waits for every rank; on a failure tells those that had come.
    pub(super) fn run(mut self, until: Instant) -> Result<Vec<Seat>, Error> {
        while self.seats.iter().any(Option::is_none) {
            if let Err(error) = self.step(until) {
                for seat in self.seats.iter().flatten() {
                    farewell(&seat.stream, Refusal::GaveUp { reason: error.to_string() });
                }
                return Err(error);
            }
        }
        Ok(self.seats.into_iter().flatten().collect())
    }

    fn step(&mut self, until: Instant) -> Result<(), Error> {
        let seated: Vec<&TcpStream> = self.seats.iter().flatten().map(|seat| &seat.stream).collect();
        let event = self.lobby.next(&seated, until);
        match event.map_err(|error| Error::io("waiting for ranks", &error))? {
            // A rank that has come has nothing to say until it is welcomed, so this is its end.
            Event::Stirred(at) => Err(Error::PeerLost { rank: self.seated_rank(at), collective: NAME }),
            Event::Late => Err(Error::Absent { ranks: self.missing(), after: self.within }),
            Event::Arrived(stream, from, decoded) => self.admit(stream, from, decoded),
        }
    }

    fn admit(&mut self, stream: TcpStream, from: SocketAddr, decoded: Decoded) -> Result<(), Error> {
        let outcome = match decoded {
            Decoded::OtherVersion { rank, version } => {
                Err(differs(rank, Field::ProtocolVersion, PROTOCOL_VERSION.to_string(), version.to_string()))
            }
            Decoded::Message(Message::Hello(hello)) => self.check(&hello).map(|seat| (seat, hello.mesh)),
            Decoded::Message(Message::Welcome { .. } | Message::Refused(_) | Message::Connect { .. }) => {
                tracing::warn!(%from, "dropped a connection that does not want to join");
                return Ok(());
            }
        };
        match outcome {
            Ok((seat, mesh)) => {
                self.seats[seat] = Some(Seat { stream, mesh });
                Ok(())
            }
            Err(error) => {
                if let Some(refusal) = refusal(&error) {
                    farewell(&stream, refusal);
                }
                Err(error)
            }
        }
    }

    /// The place in `seats` of a rank that may join.
    fn check(&self, hello: &Hello) -> Result<usize, Error> {
        let (ours, rank) = (self.member, hello.rank);
        let size = ours.rank.size().get();
        if hello.size != size {
            return Err(differs(rank, Field::GroupSize, size.to_string(), hello.size.to_string()));
        }
        if hello.plan != ours.plan {
            return Err(differs(rank, Field::Plan, ours.plan.clone(), hello.plan.clone()));
        }
        if hello.config_hash != ours.config_hash {
            return Err(differs(rank, Field::ConfigHash, hex(&ours.config_hash), hex(&hello.config_hash)));
        }
        let place = rank.checked_sub(1).map(|place| place as usize);
        match place.and_then(|place| Some((place, self.seats.get(place)?))) {
            None => Err(Error::RankOutOfRange { rank, size }),
            Some((_, Some(_))) => Err(Error::DuplicateRank { rank }),
            Some((place, None)) => Ok(place),
        }
    }

    /// The rank of the `at`-th seat that is taken.
    fn seated_rank(&self, at: usize) -> u32 {
        let taken = (1..).zip(&self.seats).filter(|(_, seat)| seat.is_some());
        taken.map(|(rank, _)| rank).nth(at).unwrap_or(self.member.rank.index())
    }

    fn missing(&self) -> Vec<u32> {
        (1..).zip(&self.seats).filter(|(_, seat)| seat.is_none()).map(|(rank, _)| rank).collect()
    }
}

/// Tells every rank where the others listen.
pub(super) fn welcome(seats: &[Seat], secret: Option<GroupSecret>, until: Instant) -> Result<Book, Error> {
    let token = token().map_err(|error| Error::io("reading /dev/urandom", &error))?;
    let addresses: Vec<SocketAddr> = seats.iter().map(|seat| seat.mesh).collect();
    let message = encode(&Message::Welcome { token, addresses: addresses.clone() });
    let patience = until.saturating_duration_since(Instant::now());
    for (rank, seat) in (1..).zip(seats) {
        let sent = socket::write_full(&seat.stream, &message, &[], until);
        sent.map_err(|stop| stopped(rank, stop, patience))?;
    }
    Ok(Book { token: answer_to(secret, token), addresses })
}

fn token() -> std::io::Result<Token> {
    let mut token = Token::default();
    File::open("/dev/urandom")?.read_exact(&mut token)?;
    Ok(token)
}

/// Rank 0's answer to a hello; `None` when it is malformed.
pub(super) fn answer(stream: &TcpStream, until: Instant) -> Result<Option<Message>, Stop> {
    let mut bytes = vec![0; PREFIX_BYTES];
    socket::read_full(stream, &mut bytes, Some(until))?;
    let Some(Ok(len)) = bytes.first_chunk::<PREFIX_BYTES>().map(body_length) else { return Ok(None) };
    bytes.resize(PREFIX_BYTES + len, 0);
    socket::read_full(stream, &mut bytes[PREFIX_BYTES..], Some(until))?;
    Ok(match decode(&bytes) {
        Some(Decoded::Message(message)) => Some(message),
        Some(Decoded::OtherVersion { .. }) | None => None,
    })
}

/// Tells a rank to go away, if it still listens.
fn farewell(stream: &TcpStream, refusal: Refusal) {
    let message = encode(&Message::Refused(refusal));
    if let Err(stop) = socket::write_full(stream, &message, &[], Instant::now() + FAREWELL) {
        tracing::debug!(?stop, "a refused rank did not listen");
    }
}

/// What a rank that causes `error` is told.
fn refusal(error: &Error) -> Option<Refusal> {
    match error {
        Error::Disagreement { field, ours, theirs, .. } => {
            Some(Refusal::Differs { field: code(*field), leader: ours.clone(), joiner: theirs.clone() })
        }
        Error::DuplicateRank { rank } => Some(Refusal::Duplicate { rank: *rank }),
        Error::RankOutOfRange { rank, size } => Some(Refusal::OutOfRange { rank: *rank, size: *size }),
        _ => None,
    }
}

/// The joining rank's error for a refusal.
pub(super) fn refused(refusal: Refusal) -> Error {
    match refusal {
        Refusal::Differs { field, leader, joiner } => {
            let field = match field {
                1 => Field::ProtocolVersion,
                2 => Field::GroupSize,
                3 => Field::Plan,
                _ => Field::ConfigHash,
            };
            differs(0, field, joiner, leader)
        }
        Refusal::Duplicate { rank } => Error::DuplicateRank { rank },
        Refusal::OutOfRange { rank, size } => Error::RankOutOfRange { rank, size },
        Refusal::GaveUp { reason } => Error::GaveUp { reason },
    }
}

const fn code(field: Field) -> u8 {
    match field {
        Field::ProtocolVersion => 1,
        Field::GroupSize => 2,
        Field::Plan => 3,
        Field::ConfigHash => 4,
    }
}

const fn differs(rank: u32, field: Field, ours: String, theirs: String) -> Error {
    Error::Disagreement { rank, field, ours, theirs }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The error for a connection that stopped before the group was complete.
pub(super) fn stopped(rank: u32, stop: Stop, after: Duration) -> Error {
    match stop {
        Stop::Closed => Error::PeerLost { rank, collective: NAME },
        Stop::Late => Error::Absent { ranks: vec![rank], after },
        Stop::Io(error) => Error::io(format!("{NAME} with rank {rank}"), &error),
    }
}

/// The error for a rank whose words make no sense.
pub(super) fn garbled(rank: u32, theirs: &str) -> Error {
    Error::Mismatch {
        rank,
        collective: NAME,
        what: "message",
        ours: format!("protocol version {PROTOCOL_VERSION}"),
        theirs: theirs.to_owned(),
    }
}
