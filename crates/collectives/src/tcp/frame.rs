//! The header in front of every message between two ranks: what operation this is and how much follows. All numbers
//! are little endian, and so are the `f32` of the payload.

use crate::{Error, Op};

/// "CHRT": bytes that do not start with it are not a frame of this crate.
const MAGIC: u32 = 0x5452_4843;
/// Version of the frame format; the rendezvous has compared it before, so a difference here is a bug.
const VERSION: u16 = 2;
/// Size of a header on the wire.
pub(super) const HEADER_BYTES: usize = 40;

// Payloads are sent as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"), "the wire format is little endian");

/// Which step of an operation a frame belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The only exchange of the operation, or the first of two.
    First,
    /// The first exchange of a two-step all-reduce: parts travel to the rank that sums them.
    Scatter,
    /// Its second: the sums travel back.
    Gather,
    /// The only exchange of an operation whose receivers learn the counts from the headers.
    Open,
}

/// What a frame says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) op: Op,
    pub(super) phase: Phase,
    /// The root of a broadcast, else 0.
    pub(super) root: u32,
    /// Number of the operation among those of these two ranks, from 1.
    pub(super) sequence: u64,
    /// Elements in the whole operation; 0 where ranks may differ.
    pub(super) total: u64,
    /// Elements that follow this header; at most so many when they are expected in [`Phase::Open`].
    pub(super) count: u64,
}

impl Header {
    pub(super) const EMPTY: Self =
        Self { op: Op::Barrier, phase: Phase::First, root: 0, sequence: 0, total: 0, count: 0 };

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.op.code();
        bytes[7] = self.phase as u8;
        bytes[8..12].copy_from_slice(&self.root.to_le_bytes());
        // Bytes 12..16 are zero, so the 64-bit fields are aligned.
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.total.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.count.to_le_bytes());
        bytes
    }

    /// Compares what came from `rank` with what was expected, the most telling difference first. Returns the elements
    /// that follow.
    pub(super) fn check(&self, rank: u32, bytes: &[u8; HEADER_BYTES]) -> Result<usize, Error> {
        if self.phase == Phase::Open {
            let count = u64::from_le_bytes(std::array::from_fn(|at| bytes[32 + at]));
            return match (Self { count, ..*self }).compare(rank, bytes)? {
                told if told <= self.count => Ok(told as usize),
                told => Err(Error::Mismatch {
                    rank,
                    collective: self.op.name(),
                    what: "count",
                    ours: format!("at most {}", self.count),
                    theirs: told.to_string(),
                }),
            };
        }
        self.compare(rank, bytes).map(|count| count as usize)
    }

    fn compare(&self, rank: u32, bytes: &[u8; HEADER_BYTES]) -> Result<u64, Error> {
        if *bytes == self.encode() {
            return Ok(self.count);
        }
        let differs = |what, ours: String, theirs: String| Error::Mismatch {
            rank,
            collective: self.op.name(),
            what,
            ours,
            theirs,
        };
        let ours = self.encode();
        let number = |bytes: &[u8; HEADER_BYTES], from: usize, to: usize| {
            let mut wide = [0; 8];
            wide[..to - from].copy_from_slice(&bytes[from..to]);
            u64::from_le_bytes(wide)
        };
        let fields = [
            ("frame magic", 0, 4),
            ("frame version", 4, 6),
            ("operation", 6, 7),
            ("sequence number", 16, 24),
            ("root", 8, 12),
            ("total count", 24, 32),
            ("phase", 7, 8),
            ("count", 32, 40),
            ("reserved field", 12, 16),
        ];
        for (what, from, to) in fields {
            let (mine, other) = (number(&ours, from, to), number(bytes, from, to));
            if mine != other {
                let name = |code: u64| match what {
                    "operation" => Op::ALL.get(code as usize).map_or(format!("code {code}"), Op::to_string),
                    "frame magic" => format!("{code:#010x}"),
                    _ => code.to_string(),
                };
                return Err(differs(what, name(mine), name(other)));
            }
        }
        Ok(self.count)
    }
}
