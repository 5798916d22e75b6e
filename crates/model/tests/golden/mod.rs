//! Runs the golden checkpoints: loads them for a number of ranks, feeds prompts in any cut, returns what came out.

#![allow(dead_code, reason = "each test file uses the part it needs")]

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use collectives::{InProcess, Op};
use model::{Checkpoint, Files, KvBudget, Model, ModelConfig, Parts, ShardPlan};
use ops::conformance::Random;
use ops::{Backend, Batch, BatchSequence, BlockTable};
use ops_cpu::{CpuBackend, HostCollective, Tensor};
use safetensors::SafeTensors;
use types::{BlockId, BlockSize, DType, Dispatch, ExpertSharding, Position, TokenId, TpRank, TpSize};

/// The four variants of `tests/golden`.
pub(crate) const CASES: [&str; 4] = ["north", "command-a-plus", "softmax-sum", "sigmoid-raw"];

const BLOCK_TOKENS: u32 = 4;
const BLOCKS: u32 = 64;
const PROMPTS: usize = 4;

/// One golden checkpoint and what the reference computed with it.
pub(crate) struct Golden {
    pub(crate) name: &'static str,
    pub(crate) directory: PathBuf,
    pub(crate) config: ModelConfig,
    pub(crate) prompts: Vec<Prompt>,
}

/// One prompt.
pub(crate) struct Prompt {
    /// [T]
    pub(crate) ids: Vec<u32>,
    /// [T, vocabulary]
    pub(crate) logits: Vec<f32>,
    /// [layers + 1, T, hidden]
    pub(crate) hidden: Vec<f32>,
    /// The greedy continuation.
    pub(crate) greedy: Vec<u32>,
}

/// What our model computed for one prompt.
pub(crate) struct Output {
    /// [T, vocabulary]
    pub(crate) logits: Vec<f32>,
    /// Residual stream after the embedding and after each layer, each [T, hidden].
    pub(crate) hidden: Vec<Vec<f32>>,
    /// The greedy continuation.
    pub(crate) greedy: Vec<u32>,
    /// Steps taken, and all-reduces this rank took part in meanwhile.
    pub(crate) steps: u64,
    pub(crate) all_reduces: u64,
    /// All-to-alls meanwhile.
    pub(crate) all_to_alls: u64,
}

impl Output {
    fn new(layers: usize) -> Self {
        let hidden = vec![vec![]; layers + 1];
        Self { logits: vec![], hidden, greedy: vec![], steps: 0, all_reduces: 0, all_to_alls: 0 }
    }
}

/// How to run a prompt.
#[derive(Clone)]
pub(crate) struct Run {
    pub(crate) ranks: u32,
    pub(crate) experts: ExpertSharding,
    pub(crate) dispatch: Dispatch,
    pub(crate) dtype: DType,
    /// Tokens in each prefill step; the last is repeated.
    pub(crate) chunks: Vec<usize>,
    /// Tokens to continue.
    pub(crate) continued: usize,
}

impl Run {
    pub(crate) fn whole(ranks: u32) -> Self {
        Self {
            ranks,
            experts: ExpertSharding::Tensor,
            dispatch: Dispatch::Replicated,
            dtype: DType::F32,
            chunks: vec![usize::MAX],
            continued: 24,
        }
    }
}

pub(crate) fn load(name: &'static str) -> Golden {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    let checkpoint = Checkpoint::open(Files::Directory(directory.clone())).unwrap();
    let config = ModelConfig::from_files(checkpoint.files()).unwrap();
    let bytes = std::fs::read(directory.join("cases.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let f32s = |name: String| -> Vec<f32> {
        let data = tensors.tensor(&name).unwrap().data();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let ids = |name: String| -> Vec<u32> {
        let data = tensors.tensor(&name).unwrap().data();
        data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    };
    let prompt = |i| Prompt {
        ids: ids(format!("ids.{i}")),
        logits: f32s(format!("logits.{i}")),
        hidden: f32s(format!("hidden.{i}")),
        greedy: ids(format!("greedy.{i}")),
    };
    Golden { name, directory, config, prompts: (0..PROMPTS).map(prompt).collect() }
}

impl Golden {
    /// Runs every prompt on the CPU.
    pub(crate) fn run(&self, run: &Run) -> Vec<Output> {
        let prompts: Vec<Vec<u32>> = self.prompts.iter().map(|p| p.ids.clone()).collect();
        self.run_with(run, &self.config, &prompts, |backend| backend)
    }

    /// Runs `prompts` under another configuration and backend, as the mutations do.
    pub(crate) fn run_with<B>(
        &self,
        run: &Run,
        config: &ModelConfig,
        prompts: &[Vec<u32>],
        wrap: impl Fn(CpuBackend) -> B + Sync,
    ) -> Vec<Output>
    where
        B: Backend<Tensor = Tensor>,
    {
        let size = TpSize::new(run.ranks).unwrap();
        let ranks: Vec<_> = size.ranks().zip(InProcess::group(size, Duration::from_secs(60))).collect();
        thread::scope(|scope| {
            let wrap = &wrap;
            let start = |(rank, comm)| {
                scope.spawn(move || {
                    let mut rank = self.rank(run, config, (rank, comm), wrap);
                    prompts.iter().map(|ids| rank.run(ids, run)).collect::<Vec<Output>>()
                })
            };
            let running: Vec<_> = ranks.into_iter().map(start).collect();
            let mut outputs: Vec<_> = running.into_iter().map(|rank| rank.join().unwrap()).collect();
            outputs.swap_remove(0)
        })
    }

    fn rank<B: Backend<Tensor = Tensor>>(
        &self,
        run: &Run,
        config: &ModelConfig,
        (rank, comm): (TpRank, InProcess),
        wrap: &impl Fn(CpuBackend) -> B,
    ) -> Rank<B> {
        let checkpoint = Checkpoint::open(Files::Directory(self.directory.clone())).unwrap();
        let plan = ShardPlan::sharded(config, rank, run.experts).unwrap();
        let mut backend = wrap(CpuBackend::new(run.dtype, 1).unwrap());
        let (weights, _) = model::load(&checkpoint, config, &plan, &mut backend, &()).unwrap();
        let parts = Parts {
            config: config.clone(),
            plan,
            backend,
            comm: HostCollective(comm),
            weights,
            dispatch: run.dispatch,
        };
        let block_size = BlockSize::new(BLOCK_TOKENS).unwrap();
        let model = Model::new(parts, KvBudget { block_size, blocks: [BLOCKS; 2] }).unwrap();
        Rank { model, window_keys: config.window_keys, vocab: config.vocab_size }
    }
}

struct Rank<B: Backend> {
    model: Model<B, HostCollective<InProcess>>,
    window_keys: u32,
    vocab: usize,
}

impl<B: Backend<Tensor = Tensor>> Rank<B> {
    fn run(&mut self, ids: &[u32], run: &Run) -> Output {
        let layers = self.model.config().layers.len();
        let mut output = Output::new(layers);
        let before = [Op::AllReduce, Op::AllToAll].map(|op| self.count(op));
        // Blocks in a shuffled order: a table that is not followed reads the wrong keys.
        let order = Random::new(7).shuffled(BLOCKS as usize);
        let (mut done, mut chunk) = (0, 0);
        while done < ids.len() {
            let count = run.chunks[chunk.min(run.chunks.len() - 1)].min(ids.len() - done);
            self.step(&ids[done..done + count], done, &order, &mut output);
            (done, chunk) = (done + count, chunk + 1);
        }
        for at in 0..run.continued {
            let row = &output.logits[output.logits.len() - self.vocab..];
            let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap();
            output.greedy.push(best as u32);
            let mut rest = Output::new(layers);
            self.step(&[best as u32], ids.len() + at, &order, &mut rest);
            let keep = output.logits.len() - self.vocab;
            // Only the prompt's logits are compared; the newest row stays at the end for the next choice.
            output.logits.truncate(if at == 0 { keep + self.vocab } else { keep });
            output.logits.extend(rest.logits);
            output.steps += rest.steps;
        }
        output.all_reduces = self.count(Op::AllReduce) - before[0];
        output.all_to_alls = self.count(Op::AllToAll) - before[1];
        output.logits.truncate(ids.len() * self.vocab);
        output
    }

    fn count(&mut self, op: Op) -> u64 {
        self.model.comm_mut().0.counters().of(op).ops
    }

    fn step(&mut self, tokens: &[u32], start: usize, order: &[usize], output: &mut Output) {
        let start = start as u32;
        let last = (start + tokens.len() as u32 - 1) / BLOCK_TOKENS;
        let table = |first: u32| BlockTable {
            first,
            blocks: (first..=last).map(|logical| BlockId(order[logical as usize] as u32)).collect(),
        };
        let sliding = table((start + 1).saturating_sub(self.window_keys) / BLOCK_TOKENS);
        let batch = Batch {
            tokens: tokens.iter().map(|&id| TokenId(id)).collect(),
            sequences: vec![BatchSequence {
                rows: 0..tokens.len(),
                start: Position(start),
                tables: [table(0), sliding],
            }],
            logit_rows: (0..tokens.len() as u32).collect(),
        };
        output.steps += 1;
        let Output { logits, hidden, .. } = output;
        let sink = |_first: usize, rows: &[f32]| {
            logits.extend_from_slice(rows);
            Ok(())
        };
        let observe = |_: &mut B, at: usize, x: &Tensor| {
            hidden[at].extend_from_slice(x.as_slice());
            Ok(())
        };
        self.model.step_observed(&batch, sink, observe).unwrap();
    }
}

/// log softmax of each row.
pub(crate) fn log_probabilities(logits: &[f32], vocab: usize) -> Vec<f64> {
    let row = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
        let log_sum = f64::from(max) + sum.ln();
        row.iter().map(|&l| f64::from(l) - log_sum).collect::<Vec<_>>()
    };
    logits.chunks(vocab).flat_map(row).collect()
}

/// The largest difference of two lists of log-probabilities; infinite when one is not a number or lengths differ.
pub(crate) fn distance(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let off = |(a, b): (&f64, &f64)| (a - b).abs();
    a.iter().zip(b).map(off).fold(0.0, |most, off| if off > most || off.is_nan() { off } else { most })
}
