//! In steady decode a step allocates nothing: every buffer is there from the start of the engine or the sequence.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::VecDeque;

use engine::{Config, Engine, Event, RowOutput, Step, StepOutput};
use support::{config, request};
use types::{BlockSize, Micros, SeqId, TokenId};

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

const RUNNING: u32 = 64;

/// Allocations in 600 steps of steady decode with at most `depth` steps in flight.
fn counted(depth: usize) -> u64 {
    let config = Config {
        block_size: BlockSize::new(16).unwrap(),
        blocks: [RUNNING * 80, RUNNING * 20],
        window_keys: 128,
        context_tokens_max: 1200,
        step_tokens_max: 4096,
        logit_rows_max: RUNNING,
        running_max: RUNNING,
        waiting_requests_max: RUNNING,
        waiting_tokens_max: RUNNING * 1200,
        ..config()
    };
    let mut engine = Engine::new(config).unwrap();
    let (mut effects, mut bytes) = (Vec::new(), Vec::new());
    let mut steps: VecDeque<Step> = (0..depth).map(|_| Step::default()).collect();
    for seq in 0..RUNNING {
        let event = Event::Submit { seq: SeqId(seq.into()), request: request(seq, 40, 1100) };
        engine.apply(event, Micros(0), &mut effects);
    }
    // Warm: all run, windows have moved, buffers have their size.
    let mut counted = 0;
    for number in 0..900 {
        let before = ALLOCATIONS.get();
        effects.clear();
        while engine.steps_in_flight() < depth {
            steps.rotate_left(1);
            let step = steps.back_mut().unwrap();
            assert!(engine.plan_into(Micros(number), step, &mut effects));
            bytes.clear();
            step.plan.encode(&mut bytes);
        }
        let planned = ALLOCATIONS.get() - before;
        let step = &steps[0];
        let rows =
            step.work.iter().map(|_| RowOutput::Sampled { token: TokenId(50), logprob: None }).collect();
        let output = StepOutput { step: step.plan.step(), rows };
        let before = ALLOCATIONS.get();
        engine.apply(Event::StepDone(output), Micros(number), &mut effects);
        if number >= 300 {
            assert_eq!(step.work.len(), RUNNING as usize, "everything decodes");
            counted += planned + ALLOCATIONS.get() - before;
        }
    }
    counted
}

#[test]
fn steady_decode_allocates_nothing() {
    assert_eq!(counted(1), 0, "allocations in 600 steps of {RUNNING} sequences");
}

#[test]
fn steady_decode_one_step_ahead_allocates_nothing_either() {
    assert_eq!(counted(2), 0, "allocations in 600 steps of {RUNNING} sequences");
}
