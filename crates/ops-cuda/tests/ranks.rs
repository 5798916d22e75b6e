//! Groups of several ranks that share one card: every way to share a model out gives the reference's log-probabilities
//! and tokens. What they say to each other goes through the hosts; NCCL wants a card for each rank, so it is tried with
//! one rank, inside recorded steps.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

#[path = "../../model/tests/golden/mod.rs"]
mod golden;
mod support;

use std::thread;
use std::time::Duration;

use collectives::InProcess;
use golden::{CASES, Golden, distance, load, log_probabilities};
use model::{Checkpoint, Files, KvBudget, Model, ModelConfig, Parts, ShardPlan, Sharing};
use ops::{Batch, BatchSequence, BlockTable};
use ops_cuda::{CardLine, CudaBackend, Patience};
use support::{backend, skipped};
use types::{BlockId, BlockSize, DType, Dispatch, ExpertSharding, Position, TokenId, TpRank, TpSize};

const BLOCK_TOKENS: u32 = 4;
const BLOCKS: u32 = 300;
/// Largest |Δ log-probability| allowed in f32, as on the CPU.
const LOGPROB_TOLERANCE: f64 = 2e-4;
const PATIENCE: Patience = Patience { boot: Duration::from_secs(60), step: Duration::from_secs(60) };

/// How a model is shared out over ranks.
#[derive(Debug, Clone, Copy)]
struct Way {
    tensor: u32,
    data: u32,
    experts: ExpertSharding,
    dispatch: Dispatch,
}

const WAYS: [Way; 4] = [
    Way { tensor: 2, data: 1, experts: ExpertSharding::Tensor, dispatch: Dispatch::Replicated },
    Way { tensor: 2, data: 1, experts: ExpertSharding::Expert, dispatch: Dispatch::Replicated },
    Way { tensor: 2, data: 1, experts: ExpertSharding::Expert, dispatch: Dispatch::AllToAll },
    Way { tensor: 1, data: 2, experts: ExpertSharding::Expert, dispatch: Dispatch::AllToAll },
];

struct Rank {
    model: Model<CudaBackend, CardLine>,
    subgroup: usize,
}

impl Rank {
    fn new(golden: &Golden, way: Way, rank: TpRank, line: InProcess) -> Self {
        let checkpoint = Checkpoint::open(Files::Directory(golden.directory.clone())).unwrap();
        let config = ModelConfig::from_files(checkpoint.files()).unwrap();
        let tensor = TpSize::new(way.tensor).unwrap();
        let sharing = Sharing { tensor, experts: way.experts, placement: None };
        let plan = ShardPlan::shared(&config, rank, &sharing).unwrap();
        let mut backend = backend(DType::F32).unwrap();
        let (weights, _) = model::load(&checkpoint, &config, &plan, &mut backend, &()).unwrap();
        let own = (way.data > 1).then(|| line.split(tensor).unwrap());
        let subgroup = own.map(|own| ops_cuda::connect(&backend, own, PATIENCE).unwrap());
        let comm = ops_cuda::connect(&backend, line, PATIENCE).unwrap();
        let number = plan.subgroup();
        let parts = Parts { config, plan, backend, comm, subgroup, weights, dispatch: way.dispatch };
        let budget = KvBudget { block_size: BlockSize::new(BLOCK_TOKENS).unwrap(), blocks: [BLOCKS; 2] };
        Self { model: Model::new(parts, budget).unwrap(), subgroup: number }
    }

    /// Logits of all rows of a step in which the sub-groups bring `tokens`, or the others nothing.
    fn step(&mut self, tokens: &[u32], start: usize, rows: &[usize]) -> Vec<f32> {
        let mut logits = Vec::new();
        let sink = |_: usize, rows: &[f32]| {
            logits.extend_from_slice(rows);
            Ok(())
        };
        let batch = match rows[self.subgroup] {
            0 => Batch::default(),
            _ => batch(tokens, start as u32),
        };
        self.model.step_among(&batch, rows, sink).unwrap();
        logits
    }
}

fn batch(tokens: &[u32], start: u32) -> Batch {
    let last = (start + tokens.len() as u32 - 1) / BLOCK_TOKENS;
    let table = BlockTable { first: 0, blocks: (0..=last).map(BlockId).collect() };
    Batch {
        tokens: tokens.iter().map(|&id| TokenId(id)).collect(),
        sequences: vec![BatchSequence {
            rows: 0..tokens.len(),
            start: Position(start),
            tables: [table.clone(), table],
        }],
        logit_rows: (0..tokens.len() as u32).collect(),
    }
}

/// The logits each rank has of every prompt, its last token by itself; in the second half of the prompts, only the
/// first sub-group has rows.
fn run(golden: &Golden, way: Way) -> Vec<Vec<Vec<f32>>> {
    let size = TpSize::new(way.tensor * way.data).unwrap();
    let ranks: Vec<_> = size.ranks().zip(InProcess::group(size, PATIENCE.step)).collect();
    thread::scope(|scope| {
        let start = |(rank, line)| {
            scope.spawn(move || {
                let mut rank = Rank::new(golden, way, rank, line);
                let half = golden.prompts.len() / 2;
                let prompts = golden.prompts.iter().enumerate().map(|(i, prompt)| {
                    let of_others = |rows: usize| if i < half { rows } else { 0 };
                    let rows = |n: usize| {
                        let mut rows = vec![of_others(n); way.data as usize];
                        rows[0] = n;
                        rows
                    };
                    let (first, last) = prompt.ids.split_at(prompt.ids.len() - 1);
                    let mut logits = rank.step(first, 0, &rows(first.len()));
                    logits.extend(rank.step(last, first.len(), &rows(1)));
                    logits
                });
                let logits = prompts.collect();
                // Counters are told to all, which is one more thing that cards must carry.
                assert_eq!(rank.model.gather_activity().unwrap().len(), size.as_usize());
                logits
            })
        };
        let running: Vec<_> = ranks.into_iter().map(start).collect();
        running.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn ranks_that_share_a_card_agree_with_the_reference_in_every_plan() {
    if skipped() {
        return;
    }
    for name in CASES {
        let golden = load(name);
        let vocab = golden.config.vocab_size;
        for way in WAYS {
            if ShardPlan::shared(
                &golden.config,
                TpSize::new(2).unwrap().ranks().next().unwrap(),
                &sharing(way),
            )
            .is_err()
            {
                println!("{name}: {way:?} is not legal");
                continue;
            }
            let mut most = 0.0_f64;
            for (rank, prompts) in run(&golden, way).iter().enumerate() {
                for (i, (logits, prompt)) in prompts.iter().zip(&golden.prompts).enumerate() {
                    if logits.is_empty() {
                        continue;
                    }
                    let off = distance(
                        &log_probabilities(logits, vocab),
                        &log_probabilities(&prompt.logits, vocab),
                    );
                    most = most.max(off);
                    assert!(
                        off <= LOGPROB_TOLERANCE,
                        "{name}, {way:?}, rank {rank}, prompt {i}: a log-probability is off by {off:e}"
                    );
                }
            }
            println!("{name}, {way:?}: log-probabilities within {most:.1e}");
        }
    }
}

fn sharing(way: Way) -> Sharing {
    Sharing { tensor: TpSize::new(way.tensor).unwrap(), experts: way.experts, placement: None }
}
