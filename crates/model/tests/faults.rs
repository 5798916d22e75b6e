//! Ranks that fail in the middle of a layer: the others name the rank, the collective and the layer, and nobody waits
//! longer than the deadline.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod golden;

use std::thread;
use std::time::{Duration, Instant};

use collectives::{Collective, Fault, Faulty, InProcess};
use golden::{Golden, load};
use model::{Checkpoint, Error, Files, KvBudget, Mlp, Model, Parts, ShardPlan};
use ops::{Batch, BatchSequence, BlockTable};
use ops_cpu::{CpuBackend, HostCollective};
use types::{BlockId, BlockSize, DType, Dispatch, ExpertSharding, Position, TokenId, TpRank, TpSize};

const RANKS: u32 = 4;
/// The rank that fails.
const CULPRIT: u32 = 1;
/// Longer than any test takes unless something hangs.
const PATIENT: Duration = Duration::from_secs(60);
/// Short, for a rank that must be given up.
const DEADLINE: Duration = Duration::from_millis(300);

/// Which operation of the first sparse layer goes wrong.
#[derive(Debug, Clone, Copy)]
enum At {
    /// Rows to their experts.
    There,
    /// Results back.
    Back,
    /// The layer's all-reduce.
    Reduce,
}

fn first_sparse(golden: &Golden) -> usize {
    golden.config.layers.iter().position(|layer| layer.mlp == Mlp::Sparse).unwrap()
}

/// The operation's number in the step: one for the embedding and one for each dense layer come before.
fn number(golden: &Golden, at: At) -> u64 {
    let before = 1 + first_sparse(golden) as u64;
    before
        + match at {
            At::There => 1,
            At::Back => 2,
            At::Reduce => 3,
        }
}

fn batch() -> Batch {
    let rows = 13;
    let table = || BlockTable { first: 0, blocks: (0..4).map(BlockId).collect() };
    Batch {
        tokens: (0..rows).map(|at| TokenId(3 + at)).collect(),
        sequences: vec![BatchSequence {
            rows: 0..rows as usize,
            start: Position(0),
            tables: [table(), table()],
        }],
        logit_rows: vec![rows - 1],
        ..Batch::default()
    }
}

fn rank<C: Collective<[f32]>>(
    golden: &Golden,
    rank: TpRank,
    comm: C,
) -> Model<CpuBackend, HostCollective<C>> {
    let plan = ShardPlan::sharded(&golden.config, rank, ExpertSharding::Expert).unwrap();
    let mut backend = CpuBackend::new(DType::F32, 1).unwrap();
    let checkpoint = Checkpoint::open(Files::Directory(golden.directory.clone())).unwrap();
    let (weights, _) = model::load(&checkpoint, &golden.config, &plan, &mut backend, &()).unwrap();
    let parts = Parts {
        config: golden.config.clone(),
        plan,
        backend,
        comm: HostCollective(comm),
        subgroup: None,
        weights,
        dispatch: Dispatch::AllToAll,
    };
    Model::new(parts, KvBudget { block_size: BlockSize::new(4).unwrap(), blocks: [8; 2] }).unwrap()
}

/// One step in which `fault` happens to [`CULPRIT`]; what every rank says of it.
fn step(golden: &Golden, fault: Fault, at: At, deadline: Duration) -> Vec<Result<(), Error>> {
    let size = TpSize::new(RANKS).unwrap();
    let number = number(golden, at);
    thread::scope(|scope| {
        let threads: Vec<_> = size
            .ranks()
            .zip(InProcess::group(size, deadline))
            .map(|(of, comm)| {
                scope.spawn(move || {
                    // A rank that never fails counts to an operation that never comes.
                    let at = if of.index() == CULPRIT { number } else { u64::MAX };
                    rank(golden, of, Faulty::new(comm, fault, at)).step(&batch(), |_, _| Ok(()))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The layer and the words of an error of a step.
#[track_caller]
fn in_layer(result: &Result<(), Error>) -> (usize, String) {
    match result {
        Err(error @ Error::Layer { layer, .. }) => (*layer, error.to_string()),
        other => panic!("an error in a layer was expected, not {other:?}"),
    }
}

#[test]
fn a_rank_that_sends_wrong_counts_is_named_with_the_layer_and_the_group_stops() {
    for name in golden::CASES {
        let golden = load(name);
        for at in [At::There, At::Back, At::Reduce] {
            let started = Instant::now();
            let results = step(&golden, Fault::CorruptCount, at, PATIENT);
            assert!(started.elapsed() < PATIENT, "{name}, {at:?}: waited for a deadline");
            let names_it = results.iter().filter(|result| {
                let (layer, text) = in_layer(result);
                assert_eq!(layer, first_sparse(&golden), "{name}, {at:?}: {text}");
                text.contains(&format!("rank {CULPRIT}"))
            });
            assert!(names_it.count() > 0, "{name}, {at:?}: nobody names rank {CULPRIT}: {results:?}");
        }
    }
}

#[test]
fn a_rank_that_is_gone_is_named_with_the_collective_and_the_layer() {
    let golden = load("north");
    for (at, collective) in
        [(At::There, "all_to_all_v"), (At::Back, "all_to_all_v"), (At::Reduce, "all_reduce_sum")]
    {
        for (rank, result) in step(&golden, Fault::Leave, at, PATIENT).iter().enumerate() {
            let (layer, text) = in_layer(result);
            assert_eq!(layer, first_sparse(&golden), "rank {rank}, {at:?}");
            let expected = format!("rank {CULPRIT} was lost during {collective}");
            assert!(text.contains(&expected), "rank {rank}, {at:?}: {text}");
        }
    }
}

#[test]
fn a_rank_that_hangs_is_named_with_the_collective_and_the_layer_after_the_deadline() {
    let golden = load("north");
    for (at, collective) in [(At::There, "all_to_all_v"), (At::Reduce, "all_reduce_sum")] {
        let results = step(&golden, Fault::Hang(10 * DEADLINE), at, DEADLINE);
        let waited: Vec<String> = results
            .iter()
            .enumerate()
            .filter(|(rank, _)| *rank as u32 != CULPRIT)
            .map(|(_, result)| {
                let (layer, text) = in_layer(result);
                assert_eq!(layer, first_sparse(&golden), "{at:?}: {text}");
                text
            })
            .collect();
        let expected = format!("rank {CULPRIT} did not come to {collective} number {}", number(&golden, at));
        assert!(waited.iter().any(|text| text.contains(&expected)), "{at:?}: {waited:?}");
        // Those who were told by another before their own deadline name the rank as well.
        assert!(waited.iter().all(|text| text.contains(&format!("rank {CULPRIT}"))), "{waited:?}");
    }
}
