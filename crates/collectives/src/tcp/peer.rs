//! The two connections to every other rank: one for data, one for last words.
//!
//! A rank that gives up may be in the middle of a frame on its data connection, so it says why on a connection of its
//! own and then closes both. That way the others report who is to blame and not merely who closed first.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::{Cause, Error, socket};

/// How long to wait for last words after a data connection has closed. A killed process closes both connections, so
/// this passes only when packets of the two overtake each other between hosts.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// "BYE!": the first bytes of a notice.
const NOTICE_MAGIC: u32 = 0x2145_5942;
const NOTICE_BYTES: usize = 20;

/// A rank's last words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Notice {
    pub(super) cause: Cause,
    /// The first operation with this peer that the rank does not complete: it has done its part in all before, so they
    /// can still end well. 0 when it may be in the middle of any.
    pub(super) sequence: u64,
}

/// The connections to one peer.
#[derive(Debug)]
pub(crate) struct Link {
    /// Frames of the operations.
    pub(crate) data: TcpStream,
    /// At most one notice in each direction.
    pub(crate) control: TcpStream,
}

/// All connections of one rank, shared with its [`AbortHandle`]s.
#[derive(Debug)]
pub(super) struct Links {
    rank: u32,
    /// Indexed by rank; `None` for this rank itself.
    peers: Vec<Option<Link>>,
    ended: AtomicBool,
}

impl Links {
    pub(super) const fn new(rank: u32, peers: Vec<Option<Link>>) -> Self {
        Self { rank, peers, ended: AtomicBool::new(false) }
    }

    pub(super) fn to(&self, peer: usize) -> Option<&Link> {
        self.peers.get(peer).and_then(Option::as_ref)
    }

    pub(super) fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Tells every peer why this rank gives up, then closes: peers blocked in an operation wake up. `sequence` is asked
    /// for each peer's [`Notice::sequence`].
    pub(super) fn end(&self, cause: Cause, sequence: impl Fn(usize) -> u64) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        for (peer, link) in self.peers.iter().enumerate() {
            let Some(link) = link else { continue };
            let notice = encode(Notice { cause, sequence: sequence(peer) });
            // The connection is empty, so so few bytes fit or the peer is gone.
            let mut control = &link.control;
            if let Err(error) = control.write_all(&notice) {
                tracing::debug!(rank = self.rank, peer, %error, "peer did not take the abort notice");
            }
        }
        self.close();
    }

    /// Closes all connections without a word: the peers see a rank that left.
    pub(super) fn close(&self) {
        for link in self.peers.iter().flatten() {
            // An error means that the connection is closed already.
            let _ = link.data.shutdown(Shutdown::Both);
            let _ = link.control.shutdown(Shutdown::Write);
        }
    }

    /// What `peer` said before it closed, if it says so soon.
    pub(super) fn last_words(&self, peer: usize) -> Option<Notice> {
        let link = self.to(peer)?;
        let mut notice = [0; NOTICE_BYTES];
        socket::read_full(&link.control, &mut notice, Some(Instant::now() + LAST_WORDS)).ok()?;
        decode(&notice)
    }
}

/// Ends a group from another thread, for example when the process is told to stop while an operation is blocked.
#[derive(Debug, Clone)]
pub struct AbortHandle {
    pub(super) links: Arc<Links>,
}

impl AbortHandle {
    /// As [`Collective::abort`](crate::Collective::abort): the operation in progress here fails, and so do those of
    /// the peers.
    pub fn abort(&self) {
        self.links.end(Cause::Asked, |_| 0);
    }
}

/// The error of this rank itself once its group was ended from outside.
pub(super) const fn ended_here(rank: u32) -> Error {
    Error::Aborted { rank, cause: Cause::Asked }
}

fn encode(notice: Notice) -> [u8; NOTICE_BYTES] {
    let (code, rank): (u32, u32) = match notice.cause {
        Cause::Asked => (0, 0),
        Cause::Lost(rank) => (1, rank),
        Cause::Late(rank) => (2, rank),
        Cause::Mismatch(rank) => (3, rank),
        Cause::Failed => (4, 0),
    };
    let mut bytes = [0; NOTICE_BYTES];
    bytes[0..4].copy_from_slice(&NOTICE_MAGIC.to_le_bytes());
    bytes[4..8].copy_from_slice(&code.to_le_bytes());
    bytes[8..12].copy_from_slice(&rank.to_le_bytes());
    bytes[12..20].copy_from_slice(&notice.sequence.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; NOTICE_BYTES]) -> Option<Notice> {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let rank = word(8);
    let cause = match (word(0), word(4)) {
        (NOTICE_MAGIC, 0) => Cause::Asked,
        (NOTICE_MAGIC, 1) => Cause::Lost(rank),
        (NOTICE_MAGIC, 2) => Cause::Late(rank),
        (NOTICE_MAGIC, 3) => Cause::Mismatch(rank),
        (NOTICE_MAGIC, 4) => Cause::Failed,
        _ => return None,
    };
    Some(Notice { cause, sequence: u64::from(word(12)) | u64::from(word(16)) << 32 })
}
