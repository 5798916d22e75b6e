//! Groups of every transport for the tests, and threads to run them.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use collectives::{
    Collective, Fault, Faulty, InProcess, Joined, Member, Rendezvous, RendezvousOptions, Solo, TcpOptions,
    join,
};
use types::{TpRank, TpSize};

/// Long enough for any machine; reached only when something hangs.
pub(crate) const PATIENT: Duration = Duration::from_secs(60);
pub(crate) const LOOPBACK: &str = "127.0.0.1:0";

pub(crate) type Rank = Box<dyn Collective<[f32]> + Send>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Solo,
    InProcess,
    Tcp,
}

/// Every transport with every size the contract is run with.
pub(crate) fn every() -> Vec<(Transport, u32)> {
    let mut all = vec![(Transport::Solo, 1)];
    for transport in [Transport::InProcess, Transport::Tcp] {
        all.extend((1..=4).map(|size| (transport, size)));
    }
    all
}

/// Those with at least `least` ranks.
pub(crate) fn with_at_least(least: u32) -> impl Iterator<Item = (Transport, u32)> {
    every().into_iter().filter(move |(_, size)| *size >= least)
}

pub(crate) fn group(transport: Transport, size: u32, deadline: Duration) -> Vec<Rank> {
    match transport {
        Transport::Solo => vec![Box::new(Solo::new())],
        Transport::InProcess => {
            InProcess::group(TpSize::new(size).unwrap(), deadline).into_iter().map(boxed).collect()
        }
        Transport::Tcp => {
            tcp_group(size, deadline).into_iter().map(|joined| boxed(joined.collective)).collect()
        }
    }
}

/// A group in which `fault` happens to `rank` at its operation number `at`.
pub(crate) fn faulty_group(
    (transport, size): (Transport, u32),
    deadline: Duration,
    rank: u32,
    (fault, at): (Fault, u64),
) -> Vec<Rank> {
    let wrap = |(index, member): (usize, Rank)| -> Rank {
        if index as u32 == rank { Box::new(Faulty::new(Boxed(member), fault, at)) } else { member }
    };
    group(transport, size, deadline).into_iter().enumerate().map(wrap).collect()
}

fn boxed<C: Collective<[f32]> + Send + 'static>(member: C) -> Rank {
    Box::new(member)
}

/// Lets a boxed collective be wrapped.
struct Boxed(Rank);

impl Collective<[f32]> for Boxed {
    fn rank(&self) -> TpRank {
        self.0.rank()
    }
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), collectives::Error> {
        self.0.all_reduce_sum(data)
    }
    fn reduce_scatter_sum(
        &mut self,
        data: &[f32],
        counts: &[usize],
        own: &mut [f32],
    ) -> Result<(), collectives::Error> {
        self.0.reduce_scatter_sum(data, counts, own)
    }
    fn all_gather(
        &mut self,
        own: &[f32],
        counts: &[usize],
        all: &mut [f32],
    ) -> Result<(), collectives::Error> {
        self.0.all_gather(own, counts, all)
    }
    fn all_to_all_v(
        &mut self,
        send: &[f32],
        send_counts: &[usize],
        recv: &mut [f32],
        recv_counts: &[usize],
    ) -> Result<(), collectives::Error> {
        self.0.all_to_all_v(send, send_counts, recv, recv_counts)
    }
    fn all_to_all_open(
        &mut self,
        send: &[f32],
        send_counts: &[usize],
        recv: &mut [f32],
        room: &[usize],
        came: &mut [usize],
    ) -> Result<(), collectives::Error> {
        self.0.all_to_all_open(send, send_counts, recv, room, came)
    }
    fn broadcast(&mut self, root: u32, data: &mut [f32]) -> Result<(), collectives::Error> {
        self.0.broadcast(root, data)
    }
    fn barrier(&mut self) -> Result<(), collectives::Error> {
        self.0.barrier()
    }
    fn counters(&self) -> collectives::Counters {
        self.0.counters()
    }
    fn abort(&mut self) {
        self.0.abort();
    }
}

pub(crate) fn member(rank: u32, size: u32) -> Member {
    let rank = TpRank::new(rank, TpSize::new(size).unwrap()).unwrap();
    Member { rank, plan: format!("tensor={size}"), config_hash: [7; 32] }
}

pub(crate) fn options(deadline: Duration) -> RendezvousOptions {
    RendezvousOptions { within: PATIENT, tcp: TcpOptions { deadline, ..TcpOptions::default() }, secret: None }
}

/// A complete group on loopback, in rank order.
pub(crate) fn tcp_group(size: u32, deadline: Duration) -> Vec<Joined> {
    tcp_group_with(size, |_| options(deadline))
}

/// As [`tcp_group`], each rank with its own options.
pub(crate) fn tcp_group_with(size: u32, options: impl Fn(u32) -> RendezvousOptions + Sync) -> Vec<Joined> {
    let door = Rendezvous::bind(LOOPBACK.parse::<SocketAddr>().unwrap()).unwrap();
    let address = door.local_addr().to_string();
    let (address, options) = (&address, &options);
    thread::scope(|scope| {
        let joiners: Vec<_> = (1..size)
            .map(|rank| scope.spawn(move || join(address, &member(rank, size), &options(rank)).unwrap()))
            .collect();
        let mut group = vec![door.lead(&member(0, size), &options(0)).unwrap()];
        group.extend(joiners.into_iter().map(|joiner| joiner.join().unwrap()));
        group
    })
}

/// Runs `work` for every rank in a thread of its own; each rank leaves when its work is done.
pub(crate) fn together<T: Send, R: Send>(members: Vec<T>, work: impl Fn(usize, T) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = members
            .into_iter()
            .enumerate()
            .map(|(rank, member)| scope.spawn(move || work(rank, member)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A small seeded generator (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Values over many magnitudes, so a sum shows the order it was taken in.
    pub(crate) fn value(&mut self) -> f32 {
        let unit = (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        unit * 10f32.powi(self.below(9) as i32 - 4)
    }

    pub(crate) fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }
}

/// What `rank` brings to case `case`: the same on every transport.
pub(crate) fn data(case: u64, rank: usize, count: usize) -> Vec<f32> {
    Random(case * 1000 + rank as u64).values(count)
}

/// The sum in rank order.
pub(crate) fn sum(parts: &[Vec<f32>]) -> Vec<f32> {
    let (first, rest) = parts.split_first().unwrap();
    let mut total = first.clone();
    for part in rest {
        for (a, b) in total.iter_mut().zip(part) {
            *a += *b;
        }
    }
    total
}

/// Equality of bits, not of numbers.
#[track_caller]
pub(crate) fn assert_same(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (at, (g, e)) in got.iter().zip(expected).enumerate() {
        assert_eq!(g.to_bits(), e.to_bits(), "{what}: element {at} is {g}, not {e}");
    }
}
