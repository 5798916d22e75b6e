//! Groups with a card for each rank: NCCL, and sums through the cards' own memory. Skipped where there are fewer than two
//! cards.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

#[path = "../../model/tests/golden/mod.rs"]
mod golden;
mod group;
mod support;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use collectives::{Collective, Op};
use golden::{CASES, distance, load, log_probabilities};
use group::{On, PATIENCE, Rank, WAYS, Way, check, ranks};
use model::Pending;
use ops::conformance::Random;
use ops::sample::{Ask, Choice};
use ops::{Backend, Batch, Fed, HostTensor, Norm};
use ops_cuda::{CardLine, CudaBackend, ONE_SHOT_DEFAULT, Patience};
use support::{backend_on, skipped_without_two};
use types::{Bytes, DType, Dispatch, ExpertSharding, TokenId, TpSize};

const SEED: u64 = 41;
/// More calls than come before the flags of the cards' own line begin anew, and more than its two slots.
const ROUNDS: usize = 80;
const TENSOR: Way =
    Way { tensor: 2, data: 1, experts: ExpertSharding::Tensor, dispatch: Dispatch::Replicated };

fn two() -> TpSize {
    TpSize::new(2).unwrap()
}

/// Sums that went through the cards' memory: NCCL does not tell its messages.
fn one_shots(line: &CardLine) -> u64 {
    line.counters().of(Op::AllReduce).messages_sent
}

#[test]
fn every_plan_agrees_with_the_reference_over_nccl_and_over_the_cards_memory() {
    if skipped_without_two() {
        return;
    }
    for name in CASES {
        let golden = load(name);
        for way in WAYS {
            if !way.is_legal(&golden.config) {
                println!("{name}: {way:?} is not legal");
                continue;
            }
            for dtype in [DType::F32, DType::BF16] {
                for one_shot in [Bytes(0), ONE_SHOT_DEFAULT] {
                    let on = On { cards: true, dtype, one_shot, patience: PATIENCE };
                    let most = check(&golden, way, on);
                    println!(
                        "{name}, {way:?}, {dtype}, sums of up to {one_shot} by memory: within {most:.1e}"
                    );
                }
            }
        }
    }
}

/// Seeded numbers of one rank.
fn numbers(rank: usize, round: usize, count: usize) -> Vec<f32> {
    let mut random = Random::new(SEED + (rank * 1000 + round) as u64);
    (0..count).map(|_| random.below(2000) as f32 / 500.0 - 2.0).collect()
}

/// What ranks make of the same numbers by one line: plain sums of many sizes, then sums that end in a norm.
fn sums(rank: usize, backend: &mut CudaBackend, line: &mut CardLine) -> Vec<Vec<f32>> {
    let mut results = Vec::new();
    backend.begin_step(&Batch::default()).unwrap();
    for round in 0..ROUNDS {
        // Some too large for a slot, some of an odd length: NCCL takes those.
        let count = [2, 64, 6000, 8194, 100_000, 3, 300_000][round % 7];
        let mut data = backend.upload(count, &numbers(rank, round, count)).unwrap();
        line.all_reduce_sum(&mut data).unwrap();
        results.push(backend.read(&data).unwrap());
    }
    for round in 0..ROUNDS {
        let width = [64, 2048, 4096, 6144, 8192][round % 5];
        let rows = [1, 3, 16][round % 3];
        let norm = if round % 2 == 0 { Norm::Rms { eps: 1e-6 } } else { Norm::Layer { eps: 1e-5 } };
        let weight = HostTensor::F32 { data: numbers(9, round, width), shape: vec![width] };
        let weight = backend.weight(weight).unwrap();
        // The residual stream is the same on all ranks.
        let x = backend.upload(width, &numbers(8, round, rows * width)).unwrap();
        let x = backend.round(x).unwrap();
        let mut sum = backend.upload(width, &numbers(rank, 100 + round, rows * width)).unwrap();
        let more = backend.upload(width, &numbers(rank, 200 + round, rows * width)).unwrap();
        let (sum, more) = if line.begin_all_reduce_sum(&sum).unwrap() {
            (sum, Some((&more, 0.5)))
        } else {
            sum = backend.add_scaled(sum, &more, 0.5).unwrap();
            line.all_reduce_sum(&mut sum).unwrap();
            (sum, None)
        };
        let (x, n) = backend.residual_norm(x, (sum, more), (&weight, norm)).unwrap();
        results.push(backend.read(&x).unwrap());
        results.push(backend.read(&n).unwrap());
    }
    results
}

#[test]
fn sums_through_the_cards_memory_are_those_of_nccl_and_equal_on_all_ranks() {
    if skipped_without_two() {
        return;
    }
    for dtype in [DType::F32, DType::BF16] {
        let of = |one_shot| {
            ranks(two(), PATIENCE.step, |rank, line| {
                let mut backend = backend_on(rank.as_usize(), dtype).unwrap();
                let mut line = ops_cuda::connect(&backend, line, PATIENCE, one_shot).unwrap();
                let results = sums(rank.as_usize(), &mut backend, &mut line);
                (results, one_shots(&line))
            })
        };
        let (nccl, memory) = (of(Bytes(0)), of(ONE_SHOT_DEFAULT));
        assert_eq!(nccl[0].1, 0, "no sum went through the cards' memory");
        assert!(memory[0].1 > ROUNDS as u64, "{} sums went through the cards' memory", memory[0].1);
        assert_eq!(memory[0].0, memory[1].0, "all ranks have the same bits, seed {SEED}");
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 2e-2 };
        for (i, (ours, theirs)) in memory[0].0.iter().zip(&nccl[0].0).enumerate() {
            for (a, b) in ours.iter().zip(theirs) {
                // Two numbers have one sum in any order; norms add up a row in orders of their own.
                let most = if i < ROUNDS { 0.0 } else { tolerance * b.abs().max(1.0) };
                assert!((a - b).abs() <= most, "{dtype}, result {i}: {a} and {b}, seed {SEED}");
            }
        }
        println!("{dtype}: {} sums by memory agree with NCCL's", memory[0].1);
    }
}

#[test]
fn recorded_steps_say_what_steps_that_are_not_recorded_say() {
    if skipped_without_two() {
        return;
    }
    for one_shot in [Bytes(0), ONE_SHOT_DEFAULT] {
        let golden = load(CASES[0]);
        let on = On { cards: true, dtype: DType::F32, one_shot, patience: PATIENCE };
        let said = ranks(two(), PATIENCE.step, |rank, line| {
            let mut rank = Rank::new(&golden, TENSOR, on, rank, line);
            let ids = &golden.prompts[0].ids;
            let mut recorded = Vec::new();
            let mut observed = Vec::new();
            for again in [true, false] {
                let logits = if again { &mut recorded } else { &mut observed };
                for (i, token) in ids.iter().enumerate() {
                    if again {
                        logits.push(rank.step(&[*token], i, &[1]).unwrap());
                        continue;
                    }
                    // A step that is looked at runs its ops.
                    let mut row = Vec::new();
                    let sink = |_: usize, rows: &[f32]| {
                        row.extend_from_slice(rows);
                        Ok(())
                    };
                    let batch = group::batch(&[*token], i as u32);
                    rank.model.step_observed(&batch, &[1], sink, |_, _, _| Ok(())).unwrap();
                    logits.push(row);
                }
            }
            (recorded, observed)
        });
        for (rank, (recorded, observed)) in said.iter().enumerate() {
            for (recorded, observed) in recorded.iter().zip(observed) {
                let vocab = golden.config.vocab_size;
                let off = distance(&log_probabilities(recorded, vocab), &log_probabilities(observed, vocab));
                // Recorded attention is cut into ranges in another way.
                assert!(off <= 2e-4, "rank {rank}, sums of up to {one_shot} by memory: off by {off:e}");
            }
        }
        assert_eq!(said[0], said[1]);
    }
}

/// A prompt's greedy continuation with every token drawn on the first card and fed on both, each step queued before the
/// one before it is collected; what a rank knows of it.
fn continued(rank: &mut Rank, ids: &[u32], steps: usize) -> Vec<Choice> {
    let mut said = Vec::new();
    let mut under_way: Option<Pending<CudaBackend>> = None;
    for at in 0..steps {
        let (tokens, start) = if at == 0 { (ids, 0) } else { (&ids[..1], ids.len() + at - 1) };
        let logit_rows = vec![tokens.len() as u32 - 1];
        let fed = if at == 0 { Vec::new() } else { vec![Fed { row: 0, from: 0 }] };
        let batch = Batch { logit_rows, fed, ..group::batch(tokens, start as u32) };
        let forward = rank.model.begin(&batch, &[tokens.len()]).unwrap();
        said.extend(under_way.take().map(|step| rank.model.collect(step).unwrap()));
        under_way = Some(rank.model.draw(forward, &[Ask::GREEDY]).unwrap());
    }
    said.extend(under_way.map(|step| rank.model.collect(step).unwrap()));
    said.concat()
}

#[test]
fn tokens_drawn_on_the_first_card_reach_the_second_from_step_to_step() {
    if skipped_without_two() {
        return;
    }
    for (name, dtype) in CASES.into_iter().flat_map(|name| [(name, DType::F32), (name, DType::BF16)]) {
        let golden = load(name);
        let on = On { cards: true, dtype, one_shot: ONE_SHOT_DEFAULT, patience: PATIENCE };
        let said = ranks(two(), PATIENCE.step, |rank, line| {
            let mut rank = Rank::new(&golden, TENSOR, on, rank, line);
            assert!(rank.model.feeds());
            let runs = golden.prompts.iter().map(|prompt| {
                let steps = prompt.greedy.len();
                [(); 2].map(|()| continued(&mut rank, &prompt.ids, steps))
            });
            (runs.collect::<Vec<_>>(), rank.model.backend().idle())
        });
        println!("{name} {dtype}: the cards idle {:?} and {:?} between steps", said[0].1, said[1].1);
        for (prompt, (first, second)) in golden.prompts.iter().zip(said[0].0.iter().zip(&said[1].0)) {
            let greedy: Vec<_> =
                prompt.greedy.iter().map(|&id| Choice::Token { token: TokenId(id), logprob: None }).collect();
            for said in first {
                // In bf16 a recorded step may choose another token than one that is not.
                assert!(dtype == DType::BF16 || *said == greedy, "{name}: {said:?}");
                assert!(said.iter().all(|choice| matches!(choice, Choice::Token { .. })), "{name} {dtype}");
            }
            assert!(second.iter().flatten().all(|choice| *choice == Choice::Left), "the second draws none");
        }
    }
}

#[test]
fn one_rank_that_refuses_its_memory_makes_all_ranks_use_nccl() {
    if skipped_without_two() {
        return;
    }
    let used = ranks(two(), PATIENCE.step, |rank, line| {
        let mut backend = backend_on(rank.as_usize(), DType::F32).unwrap();
        let one_shot = if rank.is_leader() { ONE_SHOT_DEFAULT } else { Bytes(0) };
        let mut line = ops_cuda::connect(&backend, line, PATIENCE, one_shot).unwrap();
        let results = sums(rank.as_usize(), &mut backend, &mut line);
        (results, one_shots(&line), line.counters().of(Op::AllReduce).ops)
    });
    assert_eq!(used[0], used[1]);
    assert_eq!((used[0].1, used[0].2), (0, 2 * ROUNDS as u64), "NCCL summed everything");
}

/// A rank stops coming, in the middle of recorded steps: the other one fails in time, and says who is missing.
#[test]
fn a_rank_that_stops_coming_is_named_in_time() {
    if skipped_without_two() {
        return;
    }
    const STEP: Duration = Duration::from_secs(2);
    for one_shot in [Bytes(0), ONE_SHOT_DEFAULT] {
        for steps in [0, 1, 5] {
            let golden = load(CASES[0]);
            let patience = Patience { step: STEP, ..PATIENCE };
            let on = On { cards: true, dtype: DType::F32, one_shot, patience };
            let (failed, wait) = mpsc::channel();
            let wait = std::sync::Mutex::new(wait);
            let said = ranks(two(), STEP, |rank, line| {
                let leads = rank.is_leader();
                let mut rank = Rank::new(&golden, TENSOR, on, rank, line);
                let id = |at: usize| golden.prompts[0].ids[at % golden.prompts[0].ids.len()];
                for at in 0..steps {
                    rank.step(&[id(at)], at, &[1]).unwrap();
                }
                if !leads {
                    // Comes back only when the other one has given up.
                    wait.lock().unwrap().recv_timeout(PATIENCE.boot).unwrap();
                    return None;
                }
                let started = Instant::now();
                let error = rank.step(&[id(steps)], steps, &[1]).unwrap_err();
                let took = started.elapsed();
                failed.send(()).unwrap();
                Some((Chain(&error).to_string(), took))
            });
            let (words, took) = said[0].clone().unwrap();
            println!("sums of up to {one_shot} by memory, after {steps} steps: {took:?}: {words}");
            assert!(took < STEP + Duration::from_secs(3), "{took:?}");
            assert!(words.contains("rank 1"), "{words}");
            // The others' first sum is what it does not come to, in recorded steps (from the second on) as in others.
            assert!(words.contains("all_reduce_sum of the embedding"), "{words}");
            if one_shot.0 > 0 {
                assert!(words.contains("the card of rank 1 sent nothing"), "{words}");
            }
        }
    }
}

/// An error with all its causes.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut next = Some(self.0);
        while let Some(error) = next {
            write!(f, "{error}: ")?;
            next = error.source();
        }
        Ok(())
    }
}
