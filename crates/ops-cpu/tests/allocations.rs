//! Rows on their way to their experts and back: once a layer has done it, the next finds its buffers there.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::thread;
use std::time::Duration;

use collectives::{Collective, InProcess};
use ops::conformance::Random;
use ops::{Backend, Batch, BatchSequence, BlockTable, ExpertOwners, ExpertSlots, Routing, Scoring};
use ops_cpu::{CpuBackend, HostCollective, Tensor};
use types::{DType, Position, TokenId, TpRank, TpSize};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const HIDDEN: usize = 48;
const EXPERTS: usize = 16;
const ROWS: usize = 24;
const TOP_K: usize = 4;
const WIDTH: usize = HIDDEN + 2 * TOP_K;

/// One rank of four.
struct Rank {
    rank: TpRank,
    backend: CpuBackend,
    comm: HostCollective<InProcess>,
    slots: ExpertSlots,
    counts: [Vec<usize>; 3],
}

impl Rank {
    /// What a layer does around its experts, which hand rows on as they came.
    fn layer(&mut self, x: &Tensor, logits: &Tensor) {
        let Self { rank, backend, comm, slots, counts: [sent, room, came] } = self;
        let ranks = rank.size().as_usize();
        let owners = ExpertOwners { ranks, experts_each: EXPERTS / ranks };
        let each = ROWS / ranks;
        let own_rows = rank.as_usize() * each..(rank.as_usize() + 1) * each;
        let own = backend.slice_rows(x, own_rows.clone()).unwrap();
        let logits = backend.slice_rows(logits, own_rows.clone()).unwrap();
        let routing = Routing { top_k: TOP_K, scoring: Scoring::Sigmoid { renormalize: true } };
        let routed = backend.route(&logits, routing).unwrap();
        let routed = backend.place(routed, slots, own_rows.start).unwrap();
        let rows = backend.pack(&own, &routed, owners, sent).unwrap();
        let sent_rows: usize = sent.iter().sum();
        sent.iter_mut().for_each(|count| *count *= WIDTH);
        let mut received = backend.buffer(ranks * each, WIDTH).unwrap();
        comm.all_to_all_open(&rows, sent, &mut received, room, came).unwrap();
        let came_rows = came.iter().sum::<usize>() / WIDTH;
        let received = backend.slice_rows(&received, 0..came_rows).unwrap();
        let (done, _here) = backend.unpack(&received, HIDDEN).unwrap();
        sent.iter_mut().chain(came.iter_mut()).for_each(|count| *count = *count / WIDTH * HIDDEN);
        let mut returned = backend.buffer(sent_rows, HIDDEN).unwrap();
        comm.all_to_all_v(&done, came, &mut returned, sent).unwrap();
        let sum = backend.combine(&returned, &routed, owners).unwrap();
        let whole = backend.buffer(ROWS, HIDDEN).unwrap();
        backend.add_rows(whole, own_rows.start, &sum, 1.0).unwrap();
    }
}

#[test]
fn a_layers_exchange_allocates_nothing() {
    let size = TpSize::new(4).unwrap();
    let mut random = Random::new(5);
    let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| random.normal()).collect() };
    let (values, logits) = (&draw(ROWS * HIDDEN), &draw(ROWS * EXPERTS));
    let counted = thread::scope(|scope| {
        let threads: Vec<_> = size
            .ranks()
            .zip(InProcess::group(size, Duration::from_secs(60)))
            .map(|(rank, comm)| {
                scope.spawn(move || {
                    let held: Vec<u32> = (0..EXPERTS as u32).rev().collect();
                    let room = vec![ROWS / 4 * WIDTH; 4];
                    let mut rank = Rank {
                        rank,
                        backend: CpuBackend::new(DType::F32, 1).unwrap(),
                        comm: HostCollective(comm),
                        slots: ExpertSlots::new(EXPERTS, &held).unwrap(),
                        counts: [Vec::with_capacity(4), room, vec![0; 4]],
                    };
                    let tables = [BlockTable::default(), BlockTable::default()];
                    let batch = Batch {
                        tokens: (0..ROWS as u32).map(TokenId).collect(),
                        sequences: vec![BatchSequence { rows: 0..ROWS, start: Position(0), tables }],
                        ..Batch::default()
                    };
                    rank.backend.begin_step(&batch).unwrap();
                    let x = rank.backend.upload(HIDDEN, values).unwrap();
                    let logits = rank.backend.upload(EXPERTS, logits).unwrap();
                    (0..3).for_each(|_| rank.layer(&x, &logits));
                    let before = ALLOCATIONS.get();
                    (0..10).for_each(|_| rank.layer(&x, &logits));
                    ALLOCATIONS.get() - before
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(counted, [0; 4]);
}
