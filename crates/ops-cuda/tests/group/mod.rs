//! Groups of ranks as threads of the test, each with a model on a card.

#![allow(dead_code, reason = "each test file uses the part it needs")]

use std::thread;
use std::time::Duration;

use collectives::InProcess;
use model::{Checkpoint, Files, KvBudget, Model, ModelConfig, Parts, ShardPlan, Sharing};
use ops::{Batch, BatchSequence, BlockTable};
use ops_cuda::{CardLine, CudaBackend, Patience};
use types::{BlockId, BlockSize, Bytes, DType, Dispatch, ExpertSharding, Position, TokenId, TpRank, TpSize};

use crate::golden::{Golden, distance, log_probabilities};
use crate::support::backend_on;

const BLOCK_TOKENS: u32 = 4;
const BLOCKS: u32 = 300;
/// Largest |Δ log-probability| allowed in f32, as on the CPU.
const LOGPROB_TOLERANCE: f64 = 2e-4;
/// Root mean square of the same allowed in bf16, as on one card.
const BF16_TOLERANCE: f64 = 0.15;
pub(crate) const PATIENCE: Patience =
    Patience { boot: Duration::from_secs(60), step: Duration::from_secs(60) };

/// How a model is shared out over ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way {
    pub(crate) tensor: u32,
    pub(crate) data: u32,
    pub(crate) experts: ExpertSharding,
    pub(crate) dispatch: Dispatch,
}

pub(crate) const WAYS: [Way; 4] = [
    Way { tensor: 2, data: 1, experts: ExpertSharding::Tensor, dispatch: Dispatch::Replicated },
    Way { tensor: 2, data: 1, experts: ExpertSharding::Expert, dispatch: Dispatch::Replicated },
    Way { tensor: 2, data: 1, experts: ExpertSharding::Expert, dispatch: Dispatch::AllToAll },
    Way { tensor: 1, data: 2, experts: ExpertSharding::Expert, dispatch: Dispatch::AllToAll },
];

impl Way {
    pub(crate) fn sharing(self) -> Sharing {
        Sharing { tensor: TpSize::new(self.tensor).unwrap(), experts: self.experts, placement: None }
    }

    pub(crate) fn size(self) -> TpSize {
        TpSize::new(self.tensor * self.data).unwrap()
    }

    /// Whether the model can be shared out so.
    pub(crate) fn is_legal(self, config: &ModelConfig) -> bool {
        ShardPlan::shared(config, self.size().ranks().next().unwrap(), &self.sharing()).is_ok()
    }
}

/// What the ranks compute on, and how they talk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct On {
    /// A card for each rank, or the first for all.
    pub(crate) cards: bool,
    pub(crate) dtype: DType,
    /// Largest sum that goes through the cards' memory; 0: none.
    pub(crate) one_shot: Bytes,
    pub(crate) patience: Patience,
}

pub(crate) struct Rank {
    pub(crate) model: Model<CudaBackend, CardLine>,
    subgroup: usize,
}

impl Rank {
    pub(crate) fn new(golden: &Golden, way: Way, on: On, rank: TpRank, line: InProcess) -> Self {
        let checkpoint = Checkpoint::open(Files::Directory(golden.directory.clone())).unwrap();
        let config = ModelConfig::from_files(checkpoint.files()).unwrap();
        let plan = ShardPlan::shared(&config, rank, &way.sharing()).unwrap();
        let mut backend = backend_on(if on.cards { rank.as_usize() } else { 0 }, on.dtype).unwrap();
        let (weights, _) = model::load(&checkpoint, &config, &plan, &mut backend, &()).unwrap();
        let own = (way.data > 1).then(|| line.split(TpSize::new(way.tensor).unwrap()).unwrap());
        let connect = |line| ops_cuda::connect(&backend, line, on.patience, on.one_shot).unwrap();
        let subgroup = own.map(connect);
        let comm = connect(line);
        let number = plan.subgroup();
        let parts = Parts { config, plan, backend, comm, subgroup, weights, dispatch: way.dispatch };
        let budget = KvBudget { block_size: BlockSize::new(BLOCK_TOKENS).unwrap(), blocks: [BLOCKS; 2] };
        Self { model: Model::new(parts, budget).unwrap(), subgroup: number }
    }

    /// Logits of all rows of a step in which the sub-groups bring `tokens`, or the others nothing.
    pub(crate) fn step(
        &mut self,
        tokens: &[u32],
        start: usize,
        rows: &[usize],
    ) -> Result<Vec<f32>, model::Error> {
        let mut logits = Vec::new();
        let sink = |_: usize, rows: &[f32]| {
            logits.extend_from_slice(rows);
            Ok(())
        };
        let batch = match rows[self.subgroup] {
            0 => Batch::default(),
            _ => batch(tokens, start as u32),
        };
        self.model.step_among(&batch, rows, sink)?;
        Ok(logits)
    }
}

pub(crate) fn batch(tokens: &[u32], start: u32) -> Batch {
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
        ..Batch::default()
    }
}

/// Runs `work` on every rank of a group, a thread each; the results in rank order.
pub(crate) fn ranks<R: Send>(
    size: TpSize,
    deadline: Duration,
    work: impl Fn(TpRank, InProcess) -> R + Sync,
) -> Vec<R> {
    thread::scope(|scope| {
        let work = &work;
        let each = size.ranks().zip(InProcess::group(size, deadline));
        let running: Vec<_> = each.map(|(rank, line)| scope.spawn(move || work(rank, line))).collect();
        running.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The logits each rank has of every prompt, the last tokens one by one, so that steps of one row are run, recorded and
/// repeated; in the second half of the prompts, only the first sub-group has rows.
pub(crate) fn run(golden: &Golden, way: Way, on: On) -> Vec<Vec<Vec<f32>>> {
    const SINGLE: usize = 4;
    ranks(way.size(), on.patience.step, |rank, line| {
        let mut rank = Rank::new(golden, way, on, rank, line);
        let half = golden.prompts.len() / 2;
        let prompts = golden.prompts.iter().enumerate().map(|(i, prompt)| {
            let of_others = |rows: usize| if i < half { rows } else { 0 };
            let rows = |n: usize| {
                let mut rows = vec![of_others(n); way.data as usize];
                rows[0] = n;
                rows
            };
            let cut = prompt.ids.len() - SINGLE.min(prompt.ids.len() - 1);
            let (first, last) = prompt.ids.split_at(cut);
            let mut logits = rank.step(first, 0, &rows(first.len())).unwrap();
            for (i, token) in last.iter().enumerate() {
                logits.extend(rank.step(&[*token], first.len() + i, &rows(1)).unwrap());
            }
            logits
        });
        let logits = prompts.collect();
        // Counters are told to all, which is one more thing that cards must carry.
        assert_eq!(rank.model.gather_activity().unwrap().len(), way.size().as_usize());
        logits
    })
}

/// Holds what [`run`] gives against the reference; returns how far off it is at most.
pub(crate) fn check(golden: &Golden, way: Way, on: On) -> f64 {
    let vocab = golden.config.vocab_size;
    let mut most = 0.0_f64;
    for (rank, prompts) in run(golden, way, on).iter().enumerate() {
        for (i, (logits, prompt)) in prompts.iter().zip(&golden.prompts).enumerate() {
            if logits.is_empty() {
                continue;
            }
            let (ours, theirs) = (log_probabilities(logits, vocab), log_probabilities(&prompt.logits, vocab));
            let (off, allowed) = match on.dtype {
                DType::F32 => (distance(&ours, &theirs), LOGPROB_TOLERANCE),
                DType::BF16 => {
                    let squares: f64 = ours.iter().zip(&theirs).map(|(a, b)| (a - b) * (a - b)).sum();
                    ((squares / ours.len() as f64).sqrt(), BF16_TOLERANCE)
                }
            };
            most = most.max(off);
            assert!(
                off <= allowed,
                "{}, {way:?}, {on:?}, rank {rank}, prompt {i}: log-probabilities are off by {off:e}",
                golden.name
            );
        }
    }
    most
}
