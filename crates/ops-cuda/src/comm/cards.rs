//! The collective of ranks that have a card each: NCCL, and the cards' own line for small sums, queued in order with the
//! rest of a rank's work.

use std::cell::RefMut;
use std::ffi::c_int;
use std::rc::Rc;

use collectives::{Collective, Counters, Error, Op, Traffic};
use types::TpRank;

use super::peer::{OpenSum, Peer};
use super::watch::{Queued, Watch};
use crate::Tensor;
use crate::nccl::{Lane, Transfer};

/// Counts of numbers travel between hosts in two halves: fp32 holds whole numbers up to 2^24.
const HALF: usize = 1 << 16;

/// A group whose ranks have a card each. Operations return when they are queued; what became of them shows when the
/// card is next waited for ([`Watch::check`]).
///
/// Small sums are taken in rank order, as the hosts take them. NCCL sums in an order of its own, the same for every rank:
/// results are equal on all ranks, and may differ in the last bit from those of the host transports. Its bytes are
/// counted as a ring sends them, and it does not tell its messages; steps that are repeated from a recording are not
/// counted.
#[derive(Debug)]
pub(crate) struct Cards {
    watch: Rc<Watch>,
    counted: [Traffic; Op::ALL.len()],
}

impl Cards {
    pub(crate) fn new(watch: Rc<Watch>) -> Self {
        Self { watch, counted: [Traffic::default(); Op::ALL.len()] }
    }

    fn line(&self) -> RefMut<'_, Box<dyn Collective<[f32]>>> {
        self.watch.line()
    }

    fn ranks(&self) -> usize {
        self.line().rank().size().as_usize()
    }

    /// Queues transfers of `tensor`'s dtype behind all work so far.
    fn queue(&mut self, op: Op, transfers: &[Transfer], tensor: &Tensor) -> Result<(), Error> {
        self.queue_as(Queued::Other(op), transfers, tensor)
    }

    fn queue_as(&mut self, queued: Queued, transfers: &[Transfer], tensor: &Tensor) -> Result<(), Error> {
        let device = tensor.device();
        let lane = Lane { stream: device.stream(), dtype: tensor.dtype(), within: self.watch.step() };
        self.alive()?;
        let announced = self.watch.announce(queued, device);
        device.unchain();
        let transferred = announced.and_then(|()| self.watch.communicator().queue(transfers, &lane));
        let marked = transferred.and_then(|()| self.watch.queued(queued, lane.stream));
        marked.map_err(|error| self.watch.refused(queued, error.to_string()))
    }

    /// Refuses to go on after an abort.
    fn alive(&self) -> Result<(), Error> {
        let communicator = self.watch.communicator();
        if !communicator.is_over() {
            return Ok(());
        }
        Err(Error::Aborted { rank: communicator.rank().index(), cause: collectives::Cause::Failed })
    }

    /// The cards' own line, when it takes such sums.
    fn peer(&self, takes: impl Fn(&Peer) -> bool) -> Option<Rc<Peer>> {
        self.watch.peer().filter(|peer| takes(peer)).map(Rc::clone)
    }

    /// A sum of the cards' own line was asked for.
    fn count_one_shot(&mut self, peer: &Peer, data: &Tensor) {
        let bytes = peer.payload(data);
        self.count(Op::AllReduce, bytes, bytes);
        self.counted[Op::AllReduce as usize].messages_sent += peer.others() as u64;
    }

    fn count(&mut self, op: Op, sent: usize, received: usize) {
        let traffic = &mut self.counted[op as usize];
        traffic.ops += 1;
        traffic.bytes_sent += sent as u64;
        traffic.bytes_received += received as u64;
    }

    /// Counts and tensors must fit each other: the transfers trust them.
    fn fits(op: Op, what: &'static str, counts: &[usize], ranks: usize, got: usize) -> Result<(), Error> {
        let sum: usize = counts.iter().sum();
        if counts.len() == ranks && sum <= got {
            return Ok(());
        }
        let expected = format!("at least the {sum} of {} counts for {ranks} ranks", counts.len());
        Err(Error::Argument { collective: op.name(), what, expected, got: got as u64 })
    }

    fn same_dtype(op: Op, one: &Tensor, other: &Tensor) -> Result<(), Error> {
        if one.dtype() == other.dtype() {
            return Ok(());
        }
        let expected = format!("{} on both sides", one.dtype());
        Err(Error::Argument {
            collective: op.name(),
            what: "the dtype",
            expected,
            got: other.dtype().bytes() as u64,
        })
    }

    /// Sends and receives of an all-to-all, those with nothing in them left out.
    fn exchange(
        &mut self,
        (send, send_counts): (&Tensor, &[usize]),
        (recv, recv_counts): (&Tensor, &[usize]),
    ) -> Result<(), Error> {
        let (ranks, own, width) = (self.ranks(), self.line().rank().as_usize(), send.dtype().bytes());
        Self::same_dtype(Op::AllToAll, send, recv)?;
        Self::fits(Op::AllToAll, "numbers to send", send_counts, ranks, send.elements())?;
        Self::fits(Op::AllToAll, "room to receive", recv_counts, ranks, recv.elements())?;
        let mut transfers = Vec::with_capacity(2 * ranks);
        let (mut from, mut to) = (send.address(), recv.address());
        for (peer, (&sent, &received)) in (0..).zip(send_counts.iter().zip(recv_counts)) {
            if sent > 0 {
                transfers.push(Transfer::Send { data: from, count: sent, peer });
            }
            if received > 0 {
                transfers.push(Transfer::Recv { data: to, count: received, peer });
            }
            from += (sent * width) as u64;
            to += (received * width) as u64;
        }
        if !transfers.is_empty() {
            self.queue(Op::AllToAll, &transfers, send)?;
        }
        let others = |counts: &[usize]| (counts.iter().sum::<usize>() - counts[own]) * width;
        self.count(Op::AllToAll, others(send_counts), others(recv_counts));
        Ok(())
    }
}

const fn root(rank: usize) -> c_int {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "groups have at most 1,024 ranks"
    )]
    {
        rank as c_int
    }
}

impl Collective<Tensor> for Cards {
    fn rank(&self) -> TpRank {
        self.line().rank()
    }

    fn all_reduce_sum(&mut self, data: &mut Tensor) -> Result<(), Error> {
        if let Some(peer) = self.peer(|peer| peer.takes(data)) {
            self.alive()?;
            let number = data.device().next_sum();
            let queued = peer.all_reduce(data, number).map_err(|error| error.to_string());
            let marked = queued.and_then(|()| {
                let marked = self.watch.queued(Queued::Sum(number), data.device().stream());
                marked.map_err(|error| error.to_string())
            });
            marked.map_err(|expected| Error::Argument {
                collective: Op::AllReduce.name(),
                what: "the cards' own line",
                expected,
                got: data.bytes() as u64,
            })?;
            self.count_one_shot(&peer, data);
            return Ok(());
        }
        let (count, ranks) = (data.elements(), self.ranks());
        let queued = Queued::Sum(data.device().next_sum());
        self.queue_as(queued, &[Transfer::AllReduce { data: data.address(), count }], data)?;
        // A ring sends every part twice on its way, but for one's own.
        let bytes = 2 * data.bytes() * (ranks - 1) / ranks;
        self.count(Op::AllReduce, bytes, bytes);
        Ok(())
    }

    fn begin_all_reduce_sum(&mut self, data: &Tensor) -> Result<bool, Error> {
        let Some(peer) = self.peer(|peer| peer.takes_rows(data)) else { return Ok(false) };
        self.alive()?;
        self.count_one_shot(&peer, data);
        let watch = Rc::clone(&self.watch);
        data.device().leave_open(OpenSum { address: data.address(), peer, watch });
        Ok(true)
    }

    fn reduce_scatter_sum(&mut self, data: &Tensor, counts: &[usize], own: &mut Tensor) -> Result<(), Error> {
        let (ranks, rank) = (self.ranks(), self.rank().as_usize());
        Self::same_dtype(Op::ReduceScatter, data, own)?;
        Self::fits(Op::ReduceScatter, "numbers to sum", counts, ranks, data.elements())?;
        Self::fits(Op::ReduceScatter, "room for the sums", &[counts[rank]], 1, own.elements())?;
        let width = data.dtype().bytes();
        let mut from = data.address();
        let mut transfers = Vec::with_capacity(ranks);
        for (rank, &count) in counts.iter().enumerate() {
            transfers.push(Transfer::Reduce { data: from, own: own.address(), count, root: root(rank) });
            from += (count * width) as u64;
        }
        self.queue(Op::ReduceScatter, &transfers, data)?;
        let bytes = |numbers: usize| numbers * width * (ranks - 1) / ranks;
        self.count(Op::ReduceScatter, bytes(counts.iter().sum()), bytes(counts.iter().sum()));
        Ok(())
    }

    fn all_gather(&mut self, own: &Tensor, counts: &[usize], all: &mut Tensor) -> Result<(), Error> {
        let (ranks, rank, width) = (self.ranks(), self.rank().as_usize(), own.dtype().bytes());
        Self::same_dtype(Op::AllGather, own, all)?;
        Self::fits(Op::AllGather, "numbers to give", &counts[rank..=rank], 1, own.elements())?;
        Self::fits(Op::AllGather, "room for all", counts, ranks, all.elements())?;
        let count = counts[rank];
        if counts.iter().all(|other| *other == count) {
            let (own_at, all_at) = (own.address(), all.address());
            self.queue(Op::AllGather, &[Transfer::AllGather { own: own_at, all: all_at, count }], own)?;
        } else {
            let before: usize = counts[..rank].iter().sum();
            let at = all.address() + (before * width) as u64;
            let copied = own.device().copy(at, own.address(), count * width);
            copied.map_err(|error| Error::Argument {
                collective: Op::AllGather.name(),
                what: "the copy on the card",
                expected: error.to_string(),
                got: count as u64,
            })?;
            let mut data = all.address();
            let mut transfers = Vec::with_capacity(ranks);
            for (rank, &count) in counts.iter().enumerate() {
                transfers.push(Transfer::Broadcast { data, count, root: root(rank) });
                data += (count * width) as u64;
            }
            self.queue(Op::AllGather, &transfers, own)?;
        }
        let all: usize = counts.iter().sum();
        self.count(Op::AllGather, count * width * (ranks - 1), (all - count) * width);
        Ok(())
    }

    fn all_to_all_v(
        &mut self,
        send: &Tensor,
        send_counts: &[usize],
        recv: &mut Tensor,
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        self.exchange((send, send_counts), (recv, recv_counts))
    }

    /// What comes is told by the hosts first: a card cannot receive what it has no number for.
    fn all_to_all_open(
        &mut self,
        send: &Tensor,
        send_counts: &[usize],
        recv: &mut Tensor,
        room: &[usize],
        came: &mut [usize],
    ) -> Result<(), Error> {
        let ranks = self.ranks();
        Self::fits(Op::AllToAll, "numbers to send", send_counts, ranks, send.elements())?;
        Self::fits(Op::AllToAll, "room for what comes", room, came.len(), recv.elements())?;
        let told: Vec<f32> = send_counts.iter().flat_map(|&count| halves(count)).collect();
        let mut heard = vec![0.0; 2 * ranks];
        self.line().all_to_all_v(&told, &vec![2; ranks], &mut heard, &vec![2; ranks])?;
        for (rank, (pair, came)) in (0..).zip(heard.chunks_exact(2).zip(came.iter_mut())) {
            *came = whole(pair[0], pair[1]);
            let room = room[rank as usize];
            if *came > room {
                let (collective, what) = (Op::AllToAll.name(), "numbers sent");
                let (ours, theirs) = (format!("at most {room}"), came.to_string());
                return Err(Error::Mismatch { rank, collective, what, ours, theirs });
            }
        }
        let came: &[usize] = came;
        self.exchange((send, send_counts), (recv, came))
    }

    fn broadcast(&mut self, from: u32, data: &mut Tensor) -> Result<(), Error> {
        let (count, rank) = (data.elements(), self.rank().index());
        let transfer = Transfer::Broadcast { data: data.address(), count, root: root(from as usize) };
        self.queue(Op::Broadcast, &[transfer], data)?;
        // A chain: all but the last send on what they got.
        let last = (from as usize + self.ranks() - 1) % self.ranks();
        let sent = if rank as usize == last { 0 } else { data.bytes() };
        self.count(Op::Broadcast, sent, if rank == from { 0 } else { data.bytes() });
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.line().barrier()
    }

    fn queues(&self) -> bool {
        true
    }

    fn counters(&self) -> Counters {
        Counters::new(self.counted).plus(&self.line().counters())
    }

    fn abort(&mut self) {
        self.watch.abort();
        self.line().abort();
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "both halves are far below 2^24 for any count of a tensor in memory"
)]
const fn halves(count: usize) -> [f32; 2] {
    [(count / HALF) as f32, (count % HALF) as f32]
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "made of a count by `halves`")]
const fn whole(high: f32, low: f32) -> usize {
    high as usize * HALF + low as usize
}
