//! The last steps are remembered: for whoever asks, and written down when the group fails.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use engine::{Engine, Event, Request, RequestOptions, RowOutput, Step, StepOutput};
use proto::worker::{GetStepsRequest, StepRecord};
use support::{Client, Rank, config, request};
use types::{BlockSize, GenerationSpec, Micros, SeqId, TokenId};
use worker::{FlightRecorder, STEPS_KEPT};

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
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// An engine of two sub-groups with a sequence in each.
fn two_sub_groups() -> Engine {
    let config = engine::Config {
        block_size: BlockSize::new(16).unwrap(),
        blocks: [512, 512],
        window_keys: 64,
        context_tokens_max: 4096,
        vocab_size: 1000,
        eos_token_ids: vec![TokenId(7)],
        step_tokens_max: 16,
        logit_rows_max: 4,
        running_max: 4,
        data_parallel: 2,
        waiting_requests_max: 8,
        waiting_tokens_max: 8192,
    };
    let mut engine = Engine::new(config).unwrap();
    for (seq, prompt) in [(1, 5), (2, 9)] {
        let spec = GenerationSpec { max_tokens: Some(3000), ..GenerationSpec::default() };
        let request = Request {
            prompt: (0..prompt).map(|i| TokenId(100 * prompt + i)).collect(),
            generation: spec.validate(0, 1000).unwrap(),
            deadline: None,
            options: RequestOptions::default(),
        };
        engine.apply(Event::Submit { seq: SeqId(seq), request }, Micros(0), &mut Vec::new());
    }
    engine
}

#[test]
fn the_last_2048_steps_are_kept_in_order_and_without_an_allocation() {
    let mut engine = two_sub_groups();
    let flight = FlightRecorder::default();
    assert!(flight.last(STEPS_KEPT).is_empty());
    flight.begin(engine.config());
    let (mut step, mut effects) = (Step::default(), Vec::new());
    for number in 1..=2500 {
        assert!(engine.plan_into(Micros(number * 10), &mut step, &mut effects));
        let load = engine.load();
        let before = ALLOCATIONS.get();
        flight.planned(&step.plan, &load, Duration::from_micros(number), Micros(number * 10));
        if number != 2500 {
            let gap = (number > 1).then_some(Duration::from_micros(3));
            flight.ran(number, (gap, None), Duration::from_micros(40));
        }
        assert_eq!(ALLOCATIONS.get(), before, "step {number}");
        let rows = step.work.iter().map(|_| RowOutput::Sampled { token: TokenId(50), logprob: None });
        let output = StepOutput { step: number, rows: rows.collect() };
        engine.apply(Event::StepDone(output), Micros(0), &mut effects);
        effects.clear();
        if number == 1 {
            let first = &flight.last(STEPS_KEPT)[0];
            assert_eq!((first.prefill_rows, first.decode_rows, first.logit_rows), (14, 0, 2));
            assert_eq!(
                (first.sub_group_rows.as_slice(), first.running, first.gap_us),
                ([5, 9].as_slice(), 2, None)
            );
            assert_eq!((first.kv_free_full, first.kv_free_sliding), (1022, 1022), "a block of each is taken");
        }
    }
    let kept = flight.last(usize::MAX);
    assert!(kept.iter().map(|one| one.step).eq(2500 - STEPS_KEPT as u64 + 1..=2500));
    let [before, last] = &kept[STEPS_KEPT - 2..] else { panic!("two") };
    assert_eq!(
        (before.plan_us, before.planned_us, before.gap_us, before.step_us),
        (2499, 24_990, Some(3), Some(40))
    );
    assert_eq!((last.gap_us, last.step_us), (None, None), "it has not ended");
    assert_eq!(
        (last.prefill_rows, last.decode_rows, last.sub_group_rows.as_slice()),
        (0, 2, [1, 1].as_slice())
    );
    assert!(flight.last(3).iter().map(|one| one.step).eq(2498..=2500));
}

fn steps(client: &Client, last: u32) -> Vec<StepRecord> {
    let mut worker = client.client.clone();
    client.runtime.block_on(worker.get_steps(GetStepsRequest { last })).unwrap().into_inner().steps
}

#[test]
fn a_leader_tells_its_last_steps_in_any_phase() {
    let rank = Rank::start(config(0, 1));
    let client = Client::connect(rank.listening());
    // Nothing yet, or the steps of the warm-up.
    assert!(steps(&client, 0).len() <= 2);
    rank.ready();
    let warm_up = steps(&client, 0).len();
    client.generate(request((20..320).collect(), 8)).unwrap();
    let all = steps(&client, 0);
    // 300 tokens in steps of 256, and a token of each step from the second on; the last is no input.
    let own = &all[warm_up..];
    let rows: Vec<_> = own.iter().map(|step| (step.prefill_rows, step.decode_rows)).collect();
    assert_eq!(rows, [vec![(256, 0), (44, 0)], vec![(0, 1); 7]].concat());
    assert!(
        own.iter().all(|step| step.step_us.is_some() && step.running == 1 && step.sub_group_rows.len() == 1)
    );
    assert!(own[1..].iter().all(|step| step.gap_us.is_some()), "{own:?}");
    assert_eq!(steps(&client, 2), all[all.len() - 2..]);
    rank.shutdown.cancel();
    rank.end().unwrap();
}

#[test]
fn a_group_that_fails_writes_its_last_steps_down() {
    let place = tempfile::tempdir().unwrap();
    let fault_dir = Some(place.path().to_owned());
    for old in 0..9 {
        std::fs::write(place.path().join(format!("cohort-steps-100{old}-1.jsonl")), "old").unwrap();
    }
    let leader = Rank::start(worker::Config { fault_dir: fault_dir.clone(), ..config(0, 2) });
    let rendezvous = leader.wait(|report| match report {
        worker::Report::Rendezvous(address) => Some(*address),
        _ => None,
    });
    let follower = Rank::start(worker::Config { rendezvous, drain_grace: Duration::ZERO, ..config(1, 2) });
    leader.ready();
    // A follower that is told to stop while its leader goes on leaves after its grace.
    follower.shutdown.cancel();
    let left = follower.end().unwrap_err().to_string();
    assert!(left.contains("rank 1"), "{left}");
    let error = leader.end().unwrap_err().to_string();
    let mut names: Vec<_> =
        std::fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort_unstable();
    assert_eq!(names.len(), 8, "the oldest make room: {names:?}");
    let text = std::fs::read_to_string(names.last().unwrap()).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        (lines[0]["fault"].as_str(), lines[0]["model"].as_str()),
        (Some(error.as_str()), Some("demo"))
    );
    assert_eq!(lines[0]["steps"], lines.len() - 1);
    assert!(lines.len() > 1, "the steps of the warm-up");
    let keys =
        ["step", "prefill_rows", "decode_rows", "running", "waiting", "kv_free_full", "plan_us", "step_us"];
    assert!(keys.iter().all(|key| lines[1][key].is_u64()), "{}", lines[1]);
    assert_eq!(lines[1]["step"], 1);
}

#[test]
fn a_group_that_ends_in_good_order_writes_nothing() {
    let place = tempfile::tempdir().unwrap();
    let rank = Rank::start(worker::Config { fault_dir: Some(place.path().to_owned()), ..config(0, 1) });
    let client = Client::connect(rank.listening());
    rank.ready();
    client.generate(request(vec![5, 6], 2)).unwrap();
    rank.shutdown.cancel();
    rank.end().unwrap();
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
}
