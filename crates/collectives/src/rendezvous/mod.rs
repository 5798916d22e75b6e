//! How the ranks of a group find each other.
//!
//! Rank 0 listens ([`Rendezvous`]); the others come to it ([`join`]) and say who they are. Rank 0 compares protocol
//! version, group size, plan and config hash with its own, and when all have come tells everyone where the others
//! listen, with a random token. Then each rank dials the lower ones: a data and a control connection for every pair,
//! and a plan connection to rank 0. A barrier ends it, so a group that was returned has working connections.

mod gather;
mod lobby;
mod mesh;
mod secret;
mod wire;

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use types::TpRank;

use self::gather::{Gathering, refused, welcome};
use self::mesh::Mesh;
use self::wire::{Hello, Message};
use crate::{Error, PlanChannel, PlanSender, Tcp, TcpOptions, socket};

pub use self::secret::GroupSecret;
pub use self::wire::PROTOCOL_VERSION;

/// The name errors give this stage.
const NAME: &str = "rendezvous";
/// Pauses between tries to reach rank 0, which may start later: short at first, then easy on the network.
const RETRY_FIRST: Duration = Duration::from_millis(10);
const RETRY_LONGEST: Duration = Duration::from_millis(200);
/// A joining rank waits this much longer than rank 0, which knows who is missing and tells it.
const GRACE: Duration = Duration::from_secs(2);

/// What a rank claims to be. All but the rank must be the same on every rank of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// This rank and the size of its group.
    pub rank: TpRank,
    /// The parallel plan in words, for example `tensor=2`; at most 1024 bytes.
    pub plan: String,
    /// Hash over everything else the ranks must agree on: configuration, checkpoint, dtype.
    pub config_hash: [u8; 32],
}

/// How long to wait for each other, and how the group then behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RendezvousOptions {
    /// How long all ranks together may take to come.
    pub within: Duration,
    /// Deadlines of the group's operations.
    pub tcp: TcpOptions,
    /// What all ranks of the group know and others do not; without it whoever reaches the ports may join.
    pub secret: Option<GroupSecret>,
}

impl Default for RendezvousOptions {
    fn default() -> Self {
        Self { within: Duration::from_secs(60), tcp: TcpOptions::default(), secret: None }
    }
}

/// A rank's place in a complete group.
#[derive(Debug)]
pub struct Joined {
    /// Collectives over host buffers.
    pub collective: Tcp,
    /// Step plans.
    pub plan: PlanChannel,
}

/// Rank 0's side: a bound listener.
#[derive(Debug)]
pub struct Rendezvous {
    listener: TcpListener,
    address: SocketAddr,
}

impl Rendezvous {
    /// Listens at `address`; port 0 lets the system choose one.
    ///
    /// # Errors
    /// [`Error::Io`] naming the address, for example when the port is in use.
    pub fn bind(address: SocketAddr) -> Result<Self, Error> {
        let bound = listen(address).and_then(|listener| Ok((listener.local_addr()?, listener)));
        let (address, listener) =
            bound.map_err(|error| Error::io(format!("listening for ranks at {address}"), &error))?;
        Ok(Self { listener, address })
    }

    /// Where the other ranks find this one.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Waits for all ranks and connects the group. A group of one returns at once.
    ///
    /// # Errors
    /// [`Error::Absent`] listing the ranks that did not come, [`Error::Disagreement`], [`Error::DuplicateRank`] or
    /// [`Error::RankOutOfRange`] when one must not join, [`Error::PeerLost`] when one goes away meanwhile. The ranks
    /// that had come are told.
    pub fn lead(self, member: &Member, options: &RendezvousOptions) -> Result<Joined, Error> {
        if !member.rank.is_leader() {
            return Err(Error::RankOutOfRange { rank: member.rank.index(), size: 1 });
        }
        check_plan(member)?;
        let until = socket::from_now(options.within);
        let member = &as_shown(member, options);
        let seats = Gathering::new(&self.listener, member, options.within).run(until)?;
        let mesh = Mesh::new(member.rank, welcome(&seats, options.secret, until)?);
        finish(mesh, &self.listener, options, until)
    }
}

/// Joins the group whose rank 0 listens at `leader` (`host:port`; the name is looked up again at every try). Rank 0
/// may start later.
///
/// # Errors
/// [`Error::Absent`] when rank 0 does not come, [`Error::Disagreement`] and the other refusals of
/// [`Rendezvous::lead`], [`Error::GaveUp`] when rank 0 refused another rank or another rank did not come.
pub fn join(leader: &str, member: &Member, options: &RendezvousOptions) -> Result<Joined, Error> {
    let rank = member.rank.index();
    if member.rank.is_leader() {
        return Err(Error::RankOutOfRange { rank, size: member.rank.size().get() });
    }
    check_plan(member)?;
    let stream = dial_leader(leader, options.within)?;
    let until = socket::from_now(options.within) + GRACE;
    let ask = |what: &str| format!("{what} of the connection to rank 0 at {leader}");
    let here = stream.local_addr().map_err(|error| Error::io(ask("address"), &error))?;
    let there = stream.peer_addr().map_err(|error| Error::io(ask("peer address"), &error))?;
    let at = SocketAddr::new(here.ip(), 0);
    let bound = listen(at).and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (mesh, listener) =
        bound.map_err(|error| Error::io(format!("listening for ranks at {at}"), &error))?;
    let hello = Message::Hello(Hello {
        rank,
        size: member.rank.size().get(),
        config_hash: as_shown(member, options).config_hash,
        plan: member.plan.clone(),
        mesh,
    });
    let late = |stop| gather::stopped(0, stop, options.within + GRACE);
    socket::write_full(&stream, &wire::encode(&hello), &[], until).map_err(late)?;
    let (token, followers) = match gather::answer(&stream, until).map_err(late)? {
        Some(Message::Welcome { token, addresses }) => (token, addresses),
        Some(Message::Refused(refusal)) => return Err(refused(refusal)),
        Some(Message::Hello(_) | Message::Connect { .. }) | None => {
            return Err(gather::garbled(0, "its answer is not one"));
        }
    };
    if followers.len() + 1 != member.rank.size().as_usize() {
        return Err(gather::garbled(0, "its address table has another length than the group"));
    }
    let mut addresses = vec![there];
    addresses.extend(followers);
    let token = secret::answer_to(options.secret, token);
    finish(Mesh::new(member.rank, mesh::Book { token, addresses }), &listener, options, until)
}

/// The member as it shows itself: ranks with other secrets have other hashes.
fn as_shown(member: &Member, options: &RendezvousOptions) -> Member {
    Member { config_hash: secret::bound_hash(options.secret, member.config_hash), ..member.clone() }
}

/// Connects every pair, then checks that every connection works.
fn finish(
    mut mesh: Mesh,
    listener: &TcpListener,
    options: &RendezvousOptions,
    until: Instant,
) -> Result<Joined, Error> {
    mesh.dial(until)?;
    mesh.accept(listener, until, options.within)?;
    let (links, plan, rank) = mesh.into_parts();
    let plan = match plan {
        mesh::PlanStreams::Followers(streams) => PlanChannel::Leader(PlanSender::new(streams, options.tcp)),
        mesh::PlanStreams::Leader(stream) => {
            PlanChannel::Follower(crate::PlanReceiver::new(stream, options.tcp))
        }
    };
    let mut collective = Tcp::new(rank, links, options.tcp);
    // At least one deadline's time, so a group completed in the last moment is not thrown away.
    let left = until.saturating_duration_since(Instant::now());
    collective.settle(left.max(options.tcp.deadline))?;
    Ok(Joined { collective, plan })
}

/// The plan fits a hello.
fn check_plan(member: &Member) -> Result<(), Error> {
    let (bytes, max) = (member.plan.len() as u64, wire::TEXT_BYTES_MAX as u64);
    if bytes <= max {
        return Ok(());
    }
    Err(Error::TooLarge { what: "the plan exchanged", rank: member.rank.index(), bytes, max })
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Connects to rank 0, again and again until it is there.
fn dial_leader(leader: &str, within: Duration) -> Result<TcpStream, Error> {
    let until = socket::from_now(within);
    let mut pause = RETRY_FIRST;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Absent { ranks: vec![0], after: within });
        }
        match connect(leader, left) {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                return Err(Error::io(format!("the address of rank 0, {leader}"), &error));
            }
            Err(error) => tracing::debug!(leader, %error, "rank 0 is not there yet"),
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(RETRY_LONGEST);
    }
}

fn connect(leader: &str, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for address in leader.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            // While nobody listens on a local port the system may connect a socket to itself.
            Ok(stream) if stream.local_addr()? == address => last = ErrorKind::ConnectionRefused.into(),
            Ok(stream) => {
                socket::prepare(&stream)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
