//! The ordered channel on which the leader sends step plans to every follower: framed bytes on connections of their
//! own, so plans never wait behind tensors.

use std::io::{self, ErrorKind};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use crate::socket::{self, Stop};
use crate::{Error, TcpOptions};

/// Most bytes of one plan: every token of a full-context prefill (4 bytes each, 16M tokens) would fit, and a corrupt
/// length is found before memory is asked for.
pub const PLAN_BYTES_MAX: usize = 64 << 20;
/// "PLAN": the first bytes of a frame.
const MAGIC: u32 = 0x4e41_4c50;
const HEADER_BYTES: usize = 16;
/// The name errors give this channel.
const NAME: &str = "step plan";
const LEADER: u32 = 0;

/// This rank's end of the plan channel.
#[derive(Debug)]
pub enum PlanChannel {
    /// Rank 0 sends.
    Leader(PlanSender),
    /// Every other rank receives.
    Follower(PlanReceiver),
}

/// The leader's end. Dropping it ends the channel: followers get [`Error::PeerLost`].
#[derive(Debug)]
pub struct PlanSender {
    /// Ranks 1, 2, … in order.
    followers: Vec<TcpStream>,
    sequence: u64,
    deadline: Duration,
    failed: Option<Error>,
}

/// A follower's end.
#[derive(Debug)]
pub struct PlanReceiver {
    leader: TcpStream,
    sequence: u64,
    deadline: Duration,
    failed: Option<Error>,
}

/// Ends a follower's part in the channel from another thread, also while it waits for a plan.
#[derive(Debug)]
pub struct HangUp(TcpStream);

impl HangUp {
    /// The next plan is never read: [`PlanReceiver::recv`] fails, and the leader finds this follower gone.
    pub fn hang_up(&self) {
        // An error means that the connection is closed already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Watches the followers' connections from another thread, for leaders that sleep between steps.
#[derive(Debug)]
pub struct PlanWatch {
    followers: Vec<TcpStream>,
}

impl PlanSender {
    /// `followers` holds the connections to ranks 1, 2, … in order.
    pub(crate) const fn new(followers: Vec<TcpStream>, options: TcpOptions) -> Self {
        Self { followers, sequence: 0, deadline: options.deadline, failed: None }
    }

    /// Sends `plan` to every follower, one write each. Returns when the system has taken it, before it is read.
    ///
    /// # Errors
    /// [`Error::TooLarge`] above [`PLAN_BYTES_MAX`] (the channel stays usable); [`Error::PeerLost`] when a follower
    /// is gone and [`Error::Deadline`] when one does not read: then every later call fails alike.
    pub fn send(&mut self, plan: &[u8]) -> Result<(), Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if plan.len() > PLAN_BYTES_MAX {
            return Err(too_large(LEADER, plan.len() as u64));
        }
        self.sequence += 1;
        let head = header(plan.len(), self.sequence);
        let until = socket::from_now(self.deadline);
        for (rank, stream) in (1..).zip(&self.followers) {
            let written = socket::write_full(stream, &head, plan, until);
            if let Err(stop) = written {
                let error = stopped(rank, stop, self.sequence, self.deadline);
                self.failed = Some(error.clone());
                return Err(error);
            }
        }
        Ok(())
    }

    /// The first follower that is gone, without waiting. Costs one system call a follower.
    pub fn lost(&mut self) -> Option<u32> {
        (1..).zip(&self.followers).find(|(_, stream)| is_gone(stream)).map(|(rank, _)| rank)
    }

    /// A watch another thread can wait on.
    ///
    /// # Errors
    /// [`Error::Io`] when the system has no descriptors left.
    pub fn watch(&self) -> Result<PlanWatch, Error> {
        let copies: io::Result<Vec<TcpStream>> = self.followers.iter().map(TcpStream::try_clone).collect();
        let followers =
            copies.map_err(|error| Error::io("copying the plan channel's descriptors", &error))?;
        Ok(PlanWatch { followers })
    }
}

impl Drop for PlanSender {
    fn drop(&mut self) {
        // A watch may hold copies of the connections; followers must see the end all the same.
        for stream in &self.followers {
            // An error means that the connection is closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl PlanWatch {
    /// Waits until a follower is gone and returns its rank, or `None` after `timeout`. Once the [`PlanSender`] is
    /// dropped all followers count as gone.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses to poll.
    pub fn wait(&self, timeout: Duration) -> Result<Option<u32>, Error> {
        // Followers never write, so anything to read is the end.
        let flags = PollFlags::IN | PollFlags::RDHUP;
        let mut fds: Vec<PollFd<'_>> =
            self.followers.iter().map(|stream| PollFd::new(stream, flags)).collect();
        socket::ready(&mut fds, Some(timeout))
            .map_err(|error| Error::io("watching the followers", &error))?;
        Ok((1..).zip(&fds).find(|(_, fd)| !fd.revents().is_empty()).map(|(rank, _)| rank))
    }
}

impl PlanReceiver {
    pub(crate) const fn new(leader: TcpStream, options: TcpOptions) -> Self {
        Self { leader, sequence: 0, deadline: options.deadline, failed: None }
    }

    /// What ends this from another thread.
    ///
    /// # Errors
    /// [`Error::Io`] when the system has no descriptors left.
    pub fn hang_up(&self) -> Result<HangUp, Error> {
        let copy = self.leader.try_clone();
        copy.map(HangUp).map_err(|error| Error::io("copying the plan channel's descriptor", &error))
    }

    /// Waits for the next plan, however long that takes, and puts it into `buf` in place of what was there; `buf`
    /// keeps its memory between calls.
    ///
    /// # Errors
    /// [`Error::PeerLost`] as soon as the leader's end closes, [`Error::Deadline`] when a plan starts but does not
    /// end, [`Error::Mismatch`] and [`Error::TooLarge`] for bytes that are not the next plan. Every later call then
    /// fails alike.
    pub fn recv(&mut self, buf: &mut Vec<u8>) -> Result<(), Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let outcome = self.next(buf);
        if let Err(error) = &outcome {
            self.failed = Some(error.clone());
        }
        outcome
    }

    fn next(&mut self, buf: &mut Vec<u8>) -> Result<(), Error> {
        self.sequence += 1;
        let (sequence, deadline) = (self.sequence, self.deadline);
        let stopped = |stop| stopped(LEADER, stop, sequence, deadline);
        let mut head = [0; HEADER_BYTES];
        socket::read_full(&self.leader, &mut head[..1], None).map_err(stopped)?;
        let until = Some(socket::from_now(deadline));
        socket::read_full(&self.leader, &mut head[1..], until).map_err(stopped)?;
        let len = parse(&head, sequence)?;
        buf.clear();
        buf.resize(len, 0);
        socket::read_full(&self.leader, buf, until).map_err(stopped)
    }
}

/// Magic, length and sequence number, little endian.
fn header(len: usize, sequence: u64) -> [u8; HEADER_BYTES] {
    const { assert!(PLAN_BYTES_MAX <= u32::MAX as usize) };
    let mut head = [0; HEADER_BYTES];
    head[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    head[4..8].copy_from_slice(&(len as u32).to_le_bytes());
    head[8..16].copy_from_slice(&sequence.to_le_bytes());
    head
}

/// The length of the plan that follows, after everything else was compared.
fn parse(head: &[u8; HEADER_BYTES], sequence: u64) -> Result<usize, Error> {
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let differs = |what, ours: String, theirs: String| {
        Err(Error::Mismatch { rank: LEADER, collective: NAME, what, ours, theirs })
    };
    if word(0) != MAGIC {
        return differs("frame magic", format!("{MAGIC:#010x}"), format!("{:#010x}", word(0)));
    }
    let theirs = u64::from(word(8)) | u64::from(word(12)) << 32;
    if theirs != sequence {
        return differs("sequence number", sequence.to_string(), theirs.to_string());
    }
    let len = word(4) as usize;
    if len > PLAN_BYTES_MAX {
        return Err(too_large(LEADER, len as u64));
    }
    Ok(len)
}

const fn too_large(rank: u32, bytes: u64) -> Error {
    Error::TooLarge { what: NAME, rank, bytes, max: PLAN_BYTES_MAX as u64 }
}

fn stopped(rank: u32, stop: Stop, sequence: u64, after: Duration) -> Error {
    match stop {
        Stop::Closed => Error::PeerLost { rank, collective: NAME },
        Stop::Late => Error::Deadline { rank, collective: NAME, sequence, after },
        Stop::Io(error) => Error::io(format!("{NAME} with rank {rank}"), &error),
    }
}

fn is_gone(stream: &TcpStream) -> bool {
    loop {
        match stream.peek(&mut [0]) {
            // Followers never write: bytes are as wrong as the end.
            Ok(_) => return true,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return error.kind() != ErrorKind::WouldBlock,
        }
    }
}
