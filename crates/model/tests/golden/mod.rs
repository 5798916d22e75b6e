//! Runs the golden checkpoints: loads them for a number of ranks, feeds prompts in any cut, returns what came out.

#![allow(dead_code, reason = "each test file uses the part it needs")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use collectives::{InProcess, Op};
use model::{
    Activity, Checkpoint, Files, KvBudget, Model, ModelConfig, Parts, Placement, ShardPlan, Sharing,
};
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
    /// All-to-alls meanwhile, and the messages they took.
    pub(crate) all_to_alls: u64,
    pub(crate) all_to_all_messages: u64,
}

impl Output {
    fn new(layers: usize) -> Self {
        let hidden = vec![vec![]; layers + 1];
        Self {
            logits: vec![],
            hidden,
            greedy: vec![],
            steps: 0,
            all_reduces: 0,
            all_to_alls: 0,
            all_to_all_messages: 0,
        }
    }
}

/// How to run prompts.
#[derive(Clone)]
pub(crate) struct Run {
    /// All ranks of the group.
    pub(crate) ranks: u32,
    /// Sub-groups, which take turns in the prompts.
    pub(crate) data: u32,
    pub(crate) placement: Option<Arc<Placement>>,
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
            data: 1,
            placement: None,
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
        self.run_counted(run, config, prompts, wrap).0
    }

    /// As [`Golden::run_with`], with what each rank has counted in the end.
    pub(crate) fn run_counted<B>(
        &self,
        run: &Run,
        config: &ModelConfig,
        prompts: &[Vec<u32>],
        wrap: impl Fn(CpuBackend) -> B + Sync,
    ) -> (Vec<Output>, Vec<Activity>)
    where
        B: Backend<Tensor = Tensor>,
    {
        let size = TpSize::new(run.ranks).unwrap();
        let ranks: Vec<_> = size.ranks().zip(InProcess::group(size, Duration::from_secs(60))).collect();
        let data = run.data as usize;
        thread::scope(|scope| {
            let wrap = &wrap;
            let start = |(rank, comm)| {
                scope.spawn(move || {
                    let mut rank = self.rank(run, config, (rank, comm), wrap);
                    rank.steps = lockstep(run, prompts);
                    let own = prompts.iter().skip(rank.subgroup).step_by(data);
                    let outputs = own.map(|ids| rank.run(ids, run)).collect::<Vec<Output>>();
                    rank.idle();
                    (outputs, rank.model.gather_activity().unwrap())
                })
            };
            let running: Vec<_> = ranks.into_iter().map(start).collect();
            let results: Vec<_> = running.into_iter().map(|rank| rank.join().unwrap()).collect();
            let activity = results[0].1.clone();
            assert!(results.iter().all(|(_, told)| *told == activity), "all ranks are told the same");
            let first_of_each = results.into_iter().step_by(run.ranks as usize / data);
            let mut by_subgroup: Vec<_> = first_of_each.map(|(outputs, _)| outputs.into_iter()).collect();
            let outputs = (0..prompts.len()).map(|at| by_subgroup[at % data].next().unwrap()).collect();
            (outputs, activity)
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
        let tensor = TpSize::new(run.ranks / run.data).unwrap();
        let sharing = Sharing { tensor, experts: run.experts, placement: run.placement.clone() };
        let plan = ShardPlan::shared(config, rank, &sharing).unwrap();
        let subgroup = plan.subgroup();
        let mut backend = wrap(CpuBackend::new(run.dtype, 1).unwrap());
        let (weights, _) = model::load(&checkpoint, config, &plan, &mut backend, &()).unwrap();
        let own = (run.data > 1).then(|| HostCollective(comm.split(tensor).unwrap()));
        let parts = Parts {
            config: config.clone(),
            plan,
            backend,
            comm: HostCollective(comm),
            subgroup: own,
            weights,
            dispatch: run.dispatch,
        };
        let block_size = BlockSize::new(BLOCK_TOKENS).unwrap();
        let model = Model::new(parts, KvBudget { block_size, blocks: [BLOCKS; 2] }).unwrap();
        let (window_keys, vocab) = (config.window_keys, config.vocab_size);
        Rank { model, window_keys, vocab, subgroup, steps: Vec::new(), done: 0 }
    }
}

/// Rows of each sub-group in each step, as the leader of a group would plan them: all sub-groups work through their
/// prompts, and those that are done have no rows.
fn lockstep(run: &Run, prompts: &[Vec<u32>]) -> Vec<Vec<usize>> {
    let data = run.data as usize;
    let of_prompt = |ids: &Vec<u32>| {
        let (mut steps, mut done) = (Vec::new(), 0);
        while done < ids.len() {
            let chunk = run.chunks[steps.len().min(run.chunks.len() - 1)].min(ids.len() - done);
            steps.push(chunk);
            done += chunk;
        }
        steps.extend(vec![1; run.continued]);
        steps
    };
    let of_subgroup = |at| prompts.iter().skip(at).step_by(data).flat_map(of_prompt).collect::<Vec<_>>();
    let by_subgroup: Vec<Vec<usize>> = (0..data).map(of_subgroup).collect();
    let steps = by_subgroup.iter().map(Vec::len).max().unwrap_or(0);
    let rows = |step: usize| by_subgroup.iter().map(|own| own.get(step).copied().unwrap_or(0)).collect();
    (0..steps).map(rows).collect()
}

struct Rank<B: Backend> {
    model: Model<B, HostCollective<InProcess>>,
    window_keys: u32,
    vocab: usize,
    subgroup: usize,
    /// Rows of each sub-group, by step.
    steps: Vec<Vec<usize>>,
    /// Steps taken.
    done: usize,
}

impl<B: Backend<Tensor = Tensor>> Rank<B> {
    fn run(&mut self, ids: &[u32], run: &Run) -> Output {
        let layers = self.model.config().layers.len();
        let mut output = Output::new(layers);
        let before = self.model.activity();
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
        let done = self.model.activity().collectives.since(&before.collectives);
        output.all_reduces = done.of(Op::AllReduce).ops;
        output.all_to_alls = done.of(Op::AllToAll).ops;
        output.all_to_all_messages = done.of(Op::AllToAll).messages_sent;
        output.logits.truncate(ids.len() * self.vocab);
        output
    }

    /// Takes the steps that other sub-groups still have rows in.
    fn idle(&mut self) {
        while let Some(rows) = self.steps.get(self.done) {
            let nothing = |_: usize, _: &[f32]| unreachable!("no row has logits");
            self.model.step_among(&Batch::default(), rows, nothing).unwrap();
            self.done += 1;
        }
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
            ..Batch::default()
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
        self.model.step_observed(&batch, &self.steps[self.done], sink, observe).unwrap();
        self.done += 1;
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
