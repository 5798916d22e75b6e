//! One full-duplex exchange: a frame to every peer and a frame from every peer, all at once.
//!
//! Every pass tries each connection in both directions without blocking, so no order of sends and receives can
//! deadlock, whatever the sizes. When nothing moves, a short spin catches peers that are about to answer (waking from
//! `poll` costs more than most small operations); then the thread sleeps in `poll`.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::ops::Range;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use types::limits::RANKS_MAX;

use super::frame::{HEADER_BYTES, Header, Phase};
use super::peer::{Link, Links, Notice, ended_here};
use crate::socket::{self, Stop};
use crate::{Error, Op};

/// What goes to and comes from one peer in one exchange. Kept between operations, so nothing is allocated.
#[derive(Debug)]
pub(super) struct Lane {
    head_out: [u8; HEADER_BYTES],
    /// Bytes of the outgoing buffer.
    send: Range<usize>,
    sent: usize,
    expected: Header,
    head_in: [u8; HEADER_BYTES],
    /// Bytes of the incoming buffer.
    recv: Range<usize>,
    got: usize,
    /// Operations begun with the peer.
    sequence: u64,
    /// What became of the peer's control connection.
    end: End,
}

/// What a peer's control connection has told so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Nothing.
    Open,
    /// The peer closed it without a word: it left after doing its part, or the data connection tells.
    Left,
    /// The peer gave up.
    Notice(Notice),
}

impl Lane {
    pub(super) const fn new() -> Self {
        Self {
            head_out: [0; HEADER_BYTES],
            send: 0..0,
            sent: HEADER_BYTES,
            expected: Header::EMPTY,
            head_in: [0; HEADER_BYTES],
            recv: 0..0,
            got: HEADER_BYTES,
            sequence: 0,
            end: End::Open,
        }
    }

    /// Both ranks begin another operation.
    pub(super) const fn begin(&mut self) {
        self.sequence += 1;
    }

    /// The number of the operation last begun.
    pub(super) const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Elements of the incoming buffer that came.
    pub(super) fn received(&self) -> Range<usize> {
        self.recv.start / size_of::<f32>()..self.recv.end / size_of::<f32>()
    }

    /// Prepares the lane: `send` and `recv` are ranges of elements of the two buffers. In an open exchange less than
    /// `recv` may come.
    pub(super) fn load(&mut self, head: Header, send: Range<usize>, recv: Range<usize>) {
        let head = Header { sequence: self.sequence, ..head };
        self.head_out = Header { count: send.len() as u64, ..head }.encode();
        self.expected = Header { count: recv.len() as u64, ..head };
        self.send = bytes(send);
        self.recv = bytes(recv);
        self.sent = 0;
        self.got = 0;
    }

    const fn all_sent(&self) -> bool {
        self.sent == HEADER_BYTES + (self.send.end - self.send.start)
    }

    const fn all_received(&self) -> bool {
        self.got == HEADER_BYTES + (self.recv.end - self.recv.start)
    }
}

fn bytes(elements: Range<usize>) -> Range<usize> {
    elements.start * size_of::<f32>()..elements.end * size_of::<f32>()
}

/// How long an operation may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    pub(super) until: Instant,
    pub(super) after: Duration,
    pub(super) spin: Duration,
}

/// Whether a try moved bytes.
#[derive(PartialEq, Eq)]
enum Moved {
    Some,
    None,
}

/// One exchange in progress; lanes are indexed by rank.
pub(super) struct Exchange<'a> {
    pub(super) rank: u32,
    pub(super) links: &'a Links,
    pub(super) lanes: &'a mut [Lane],
    pub(super) out: &'a [u8],
    pub(super) into: &'a mut [u8],
    pub(super) op: Op,
    pub(super) limit: Limit,
}

impl Exchange<'_> {
    /// Runs until every frame is sent and every expected frame has come.
    pub(super) fn run(mut self) -> Result<(), Error> {
        self.heed()?;
        let mut idle_since = None;
        loop {
            let mut moved = false;
            let mut done = true;
            for peer in 0..self.lanes.len() {
                let (any, complete) = self.advance(peer)?;
                moved |= any;
                done &= complete;
            }
            if done {
                return Ok(());
            }
            if moved {
                idle_since = None;
                continue;
            }
            let now = Instant::now();
            if now.duration_since(*idle_since.get_or_insert(now)) < self.limit.spin {
                std::hint::spin_loop();
            } else {
                self.sleep()?;
            }
        }
    }

    /// Tries both directions of one lane. Returns whether anything moved, and whether the lane is complete.
    fn advance(&mut self, peer: usize) -> Result<(bool, bool), Error> {
        let Some(link) = self.links.to(peer) else { return Ok((false, true)) };
        let mut moved = false;
        if !self.lanes[peer].all_sent() {
            match self.send(peer, link) {
                Ok(outcome) => moved |= outcome == Moved::Some,
                Err(stop) => return Err(self.verdict(peer, link, stop)),
            }
        }
        if !self.lanes[peer].all_received() {
            match self.receive(peer, link) {
                Ok(outcome) => moved |= outcome? == Moved::Some,
                Err(stop) => return Err(self.verdict(peer, link, stop)),
            }
        }
        let lane = &self.lanes[peer];
        Ok((moved, lane.all_sent() && lane.all_received()))
    }

    fn send(&mut self, peer: usize, link: &Link) -> Result<Moved, Stop> {
        let lane = &mut self.lanes[peer];
        let head = &lane.head_out[lane.sent.min(HEADER_BYTES)..];
        let body = &self.out[lane.send.clone()][lane.sent.saturating_sub(HEADER_BYTES)..];
        let mut stream = &link.data;
        let count = outcome(stream.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]))?;
        lane.sent += count;
        Ok(if count > 0 { Moved::Some } else { Moved::None })
    }

    /// The outer error is the connection's, the inner one the frame's. Reads exactly one frame, so the next
    /// operation's stays in the socket.
    fn receive(&mut self, peer: usize, link: &Link) -> Result<Result<Moved, Error>, Stop> {
        let lane = &mut self.lanes[peer];
        let headless = lane.got < HEADER_BYTES;
        let head = &mut lane.head_in[lane.got.min(HEADER_BYTES)..];
        // Of an open frame the header is read first: only it tells where the frame ends.
        let open = headless && lane.expected.phase == Phase::Open;
        let room = if open { lane.recv.start..lane.recv.start } else { lane.recv.clone() };
        let body = &mut self.into[room][lane.got.saturating_sub(HEADER_BYTES)..];
        let mut stream = &link.data;
        let count = outcome(stream.read_vectored(&mut [IoSliceMut::new(head), IoSliceMut::new(body)]))?;
        lane.got += count;
        if headless && lane.got >= HEADER_BYTES {
            match lane.expected.check(peer as u32, &lane.head_in) {
                Ok(count) => lane.recv.end = lane.recv.start + count * size_of::<f32>(),
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(if count > 0 { Moved::Some } else { Moved::None }))
    }

    /// What to report about a connection that stopped: a frame that differs says more than a notice, and a notice
    /// more than the mere end.
    fn verdict(&mut self, peer: usize, link: &Link, stop: Stop) -> Error {
        if self.links.ended() {
            return ended_here(self.rank);
        }
        self.hear(peer);
        if let Some(mismatch) = self.differing_frame(peer, link) {
            return mismatch;
        }
        let collective = self.op.name();
        match (self.lanes[peer].end, stop) {
            (End::Notice(notice), _) => Error::told(peer as u32, notice.cause, collective),
            (_, Stop::Io(error)) => Error::io(format!("{collective} with rank {peer}"), &error),
            (_, Stop::Closed | Stop::Late) => Error::PeerLost { rank: peer as u32, collective },
        }
    }

    /// Takes what the peer has said on its control connection, which is ready or about to be.
    fn hear(&mut self, peer: usize) {
        if self.lanes[peer].end == End::Open {
            self.lanes[peer].end = self.links.last_words(peer).map_or(End::Left, End::Notice);
        }
    }

    /// Reads the peer's header if it has come: a peer that gave up over a difference sent it before its notice.
    fn differing_frame(&mut self, peer: usize, link: &Link) -> Option<Error> {
        while self.lanes[peer].got < HEADER_BYTES {
            match self.receive(peer, link) {
                Ok(Ok(Moved::Some)) => {}
                Ok(Err(mismatch)) => return Some(mismatch),
                Ok(Ok(Moved::None)) | Err(_) => break,
            }
        }
        None
    }

    /// Sleeps until a connection that matters is ready: data of unfinished lanes, and notices of all peers.
    fn sleep(&mut self) -> Result<(), Error> {
        let left = self.limit.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.late());
        }
        let noticed = self.poll(left).map_err(|error| Error::io(self.op.name(), &error))?;
        let Some(peer) = noticed else { return Ok(()) };
        if self.links.ended() {
            return Err(ended_here(self.rank));
        }
        self.hear(peer);
        self.heed()
    }

    /// Fails when a peer has given up this operation. One that gave up a later one has done its part in this.
    fn heed(&mut self) -> Result<(), Error> {
        for peer in 0..self.lanes.len() {
            let End::Notice(notice) = self.lanes[peer].end else { continue };
            let Some(link) = self.links.to(peer) else { continue };
            if notice.sequence <= self.lanes[peer].sequence {
                let told = Error::told(peer as u32, notice.cause, self.op.name());
                return Err(self.differing_frame(peer, link).unwrap_or(told));
            }
        }
        Ok(())
    }

    /// One `poll`; returns a peer whose control connection has something.
    fn poll(&self, timeout: Duration) -> io::Result<Option<usize>> {
        const FDS_MAX: usize = 2 * RANKS_MAX as usize;
        let Some(any) = self.lanes.iter().enumerate().find_map(|(peer, _)| self.links.to(peer)) else {
            return Ok(None);
        };
        // On the stack: a list of borrowed descriptors cannot be kept between calls.
        let mut fds: [PollFd<'_>; FDS_MAX] =
            std::array::from_fn(|_| PollFd::new(&any.control, PollFlags::empty()));
        let mut controls = [0usize; FDS_MAX];
        let mut used = 0;
        for (peer, lane) in self.lanes.iter().enumerate() {
            let Some(link) = self.links.to(peer) else { continue };
            if lane.end == End::Open {
                fds[used] = PollFd::new(&link.control, PollFlags::IN);
                controls[used] = peer;
                used += 1;
            }
        }
        let watched = used;
        for (peer, lane) in self.lanes.iter().enumerate() {
            let Some(link) = self.links.to(peer) else { continue };
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::OUT, !lane.all_sent());
            flags.set(PollFlags::IN, !lane.all_received());
            if !flags.is_empty() {
                fds[used] = PollFd::new(&link.data, flags);
                used += 1;
            }
        }
        socket::ready(&mut fds[..used], Some(timeout))?;
        let spoke = fds[..watched].iter().position(|fd| !fd.revents().is_empty());
        Ok(spoke.map(|at| controls[at]))
    }

    /// Names the rank that did not come: one that sent nothing before one that is slow.
    fn late(&self) -> Error {
        let find = |test: fn(&Lane) -> bool| self.lanes.iter().position(test);
        let rank = find(|lane| lane.got == 0)
            .or_else(|| find(|lane| !lane.all_received()))
            .or_else(|| find(|lane| !lane.all_sent()));
        Error::Deadline {
            rank: rank.map_or(self.rank, |rank| rank as u32),
            collective: self.op.name(),
            sequence: rank.map_or(0, |rank| self.lanes[rank].sequence),
            after: self.limit.after,
        }
    }
}

/// Bytes moved; 0 when the socket is not ready. The end of the stream is an error here: a frame was expected.
fn outcome(result: io::Result<usize>) -> Result<usize, Stop> {
    match result {
        Ok(0) => Err(Stop::Closed),
        Ok(count) => Ok(count),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        Err(error) => Err(error.into()),
    }
}
