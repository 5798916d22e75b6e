//! An hour of load, simulated: memory does not grow with the requests that have come and gone.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::VecDeque;

use engine::{Config, Engine, Event, RequestOptions, RowOutput, RowPurpose, Step, StepOutput};
use support::random::Random;
use support::{config, request, spec, valid};
use types::{BlockSize, GenerationSpec, Micros, Priority, SeqId, TokenId};

thread_local! {
    /// Bytes this thread holds.
    static HELD: Cell<i64> = const { Cell::new(0) };
}

struct Weighing;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Weighing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.set(HELD.get() + layout.size() as i64);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as i64);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Weighing = Weighing;

const STEP: Micros = Micros(50_000);
const HOUR: u64 = 3_600_000_000;

/// Requests of all kinds, as many as the engine can take, with cancels and deadlines among them.
struct Load {
    engine: Engine,
    random: Random,
    now: Micros,
    next: u64,
    refused: u64,
    finished: u64,
    effects: Vec<engine::Effect>,
    flying: VecDeque<Step>,
    spare: Vec<Step>,
}

impl Load {
    fn arrive(&mut self) {
        let random = &mut self.random;
        let n = random.one_in(10).then_some(3);
        let generation = valid(GenerationSpec {
            n,
            frequency_penalty: random.one_in(4).then_some(0.5),
            ..spec(random.range(1, 60))
        });
        let deadline = random.one_in(10).then(|| self.now.after(Micros(random.range(1, 3_000_000).into())));
        let options = RequestOptions {
            priority: Priority::new(random.signed(3)).unwrap(),
            ..RequestOptions::default()
        };
        let tag = random.range(0, 30);
        let len = random.range(1, 100);
        let request = engine::Request { generation, deadline, options, ..request(tag, len, 1) };
        self.engine.apply(Event::Submit { seq: SeqId(self.next), request }, self.now, &mut self.effects);
        self.next += 3;
        if self.random.one_in(15) {
            let back = u64::from(self.random.range(0, 12));
            self.engine.apply(
                Event::Cancel(SeqId(self.next.saturating_sub(back))),
                self.now,
                &mut self.effects,
            );
        }
    }

    fn step(&mut self) {
        while self.flying.len() < 2 {
            let mut step = self.spare.pop().unwrap_or_default();
            if !self.engine.plan_into(self.now, &mut step, &mut self.effects) {
                self.spare.push(step);
                break;
            }
            self.flying.push_back(step);
        }
        self.now = self.now.after(STEP);
        let Some(step) = self.flying.pop_front() else { return };
        let rows = step.work.iter().map(|work| {
            let RowPurpose::Sample { history, .. } = &work.purpose else { unreachable!("nobody asked") };
            let token = TokenId(100 + self.random.range(0, 500));
            let token = history.as_ref().map_or(token, |history| history.draw(|_| token));
            RowOutput::Sampled { token, logprob: None }
        });
        let output = StepOutput { step: step.plan.step(), rows: rows.collect() };
        self.spare.push(step);
        self.engine.apply(Event::StepDone(output), self.now, &mut self.effects);
        for effect in self.effects.drain(..) {
            self.finished += u64::from(matches!(effect, engine::Effect::Finished { .. }));
            self.refused += u64::from(matches!(effect, engine::Effect::Refused { .. }));
        }
    }
}

#[test]
fn an_hour_of_load_leaves_memory_where_it_was() {
    let seed = 5;
    println!("seed {seed}");
    let config = Config {
        block_size: BlockSize::new(8).unwrap(),
        blocks: [160, 90],
        window_keys: 32,
        context_tokens_max: 256,
        step_tokens_max: 64,
        logit_rows_max: 32,
        running_max: 12,
        waiting_requests_max: 40,
        waiting_tokens_max: 4096,
        ..config()
    };
    let mut load = Load {
        engine: Engine::new(config).unwrap(),
        random: Random::new(seed),
        now: Micros(0),
        next: 1,
        refused: 0,
        finished: 0,
        effects: Vec::new(),
        flying: VecDeque::new(),
        spare: Vec::new(),
    };
    // What is held at the end of each ten minutes, at its highest.
    let mut highest = [0; 6];
    while load.now.0 < HOUR {
        if load.random.one_in(3) {
            load.arrive();
        }
        load.step();
        let part = &mut highest[(load.now.0.min(HOUR - 1) / (HOUR / 6)) as usize];
        *part = HELD.get().max(*part);
    }
    println!("{} finished, {} refused, bytes {highest:?}", load.finished, load.refused);
    assert!(load.finished > 20_000, "{} finished", load.finished);
    let (first, last) = (highest[0], highest[5]);
    assert!(last <= first + first / 20, "the last ten minutes held {last} bytes, the first {first}");
}
