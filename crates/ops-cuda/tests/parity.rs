//! The model on a card: golden checkpoints against the reference (transformers, float32), and the demo model against
//! the CPU.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

#[path = "../../model/tests/golden/mod.rs"]
mod golden;
mod support;

use std::path::Path;

use collectives::{Collective, Solo};
use golden::{CASES, distance, load, log_probabilities};
use model::{Checkpoint, Files, KvBudget, Model, ModelConfig, Parts, ShardPlan};
use ops::conformance::Random;
use ops::{Backend, Batch, BatchSequence, BlockTable};
use ops_cpu::{CpuBackend, HostCollective};
use ops_cuda::SoloDevice;
use support::{backend, skipped};
use types::{BlockId, BlockSize, DType, Dispatch, Position, TokenId, TpRank};

const BLOCK_TOKENS: u32 = 4;
const BLOCKS: usize = 300;
/// Largest |Δ log-probability| allowed in f32, as on the CPU.
const LOGPROB_TOLERANCE: f64 = 2e-4;

struct Runner<B: Backend, C> {
    model: Model<B, C>,
    order: Vec<usize>,
}

impl<B: Backend, C: Collective<B::Tensor>> Runner<B, C> {
    fn new(directory: &Path, mut backend: B, comm: C) -> Self {
        let checkpoint = Checkpoint::open(Files::Directory(directory.to_owned())).unwrap();
        let config = ModelConfig::from_files(checkpoint.files()).unwrap();
        let plan = ShardPlan::new(&config, TpRank::SOLO).unwrap();
        let (weights, _) = model::load(&checkpoint, &config, &plan, &mut backend, &()).unwrap();
        let parts =
            Parts { config, plan, backend, comm, subgroup: None, weights, dispatch: Dispatch::Replicated };
        let budget =
            KvBudget { block_size: BlockSize::new(BLOCK_TOKENS).unwrap(), blocks: [BLOCKS as u32; 2] };
        // Blocks in a shuffled order: a table that is not followed reads the wrong keys.
        Self { model: Model::new(parts, budget).unwrap(), order: Random::new(7).shuffled(BLOCKS) }
    }

    /// Logits of all rows: [tokens, vocabulary].
    fn step(&mut self, tokens: &[u32], start: usize) -> Vec<f32> {
        let start = start as u32;
        let last = (start + tokens.len() as u32 - 1) / BLOCK_TOKENS;
        let table = |first: u32| BlockTable {
            first,
            blocks: (first..=last).map(|logical| BlockId(self.order[logical as usize] as u32)).collect(),
        };
        let window_keys = self.model.config().window_keys;
        let tables = [table(0), table((start + 1).saturating_sub(window_keys) / BLOCK_TOKENS)];
        let batch = Batch {
            tokens: tokens.iter().map(|&id| TokenId(id)).collect(),
            sequences: vec![BatchSequence { rows: 0..tokens.len(), start: Position(start), tables }],
            logit_rows: (0..tokens.len() as u32).collect(),
            ..Batch::default()
        };
        let mut logits = Vec::new();
        let sink = |_: usize, rows: &[f32]| {
            logits.extend_from_slice(rows);
            Ok(())
        };
        self.model.step(&batch, sink).unwrap();
        logits
    }

    /// The prompt's logits, fed `chunk` tokens at a time, and the greedy continuation.
    fn run(&mut self, prompt: &[u32], chunk: usize, continued: usize) -> (Vec<f32>, Vec<u32>) {
        let vocab = self.model.config().vocab_size;
        let mut logits = Vec::new();
        for (i, tokens) in prompt.chunks(chunk).enumerate() {
            logits.extend(self.step(tokens, i * chunk));
        }
        let mut row = logits[logits.len() - vocab..].to_vec();
        let mut greedy = Vec::new();
        while greedy.len() < continued {
            let best = best(&row);
            row = self.step(&[best], prompt.len() + greedy.len());
            greedy.push(best);
        }
        (logits, greedy)
    }
}

fn best(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap() as u32
}

#[test]
fn f32_on_a_card_agrees_with_the_reference_however_a_prompt_is_cut() {
    if skipped() {
        return;
    }
    for name in CASES {
        let golden = load(name);
        let mut runner = Runner::new(
            &golden.directory,
            backend(DType::F32).unwrap(),
            SoloDevice::new(Solo::new()).unwrap(),
        );
        for chunk in [usize::MAX, 5, 1] {
            let mut most = 0.0_f64;
            for (i, prompt) in golden.prompts.iter().enumerate() {
                let place = format!("{name} prompt {i}, {chunk} tokens at a time");
                let (logits, greedy) =
                    runner.run(&prompt.ids, chunk.min(prompt.ids.len()), prompt.greedy.len());
                let vocab = golden.config.vocab_size;
                let off =
                    distance(&log_probabilities(&logits, vocab), &log_probabilities(&prompt.logits, vocab));
                most = most.max(off);
                assert!(off <= LOGPROB_TOLERANCE, "{place}: a log-probability is off by {off:e}");
                assert_eq!(greedy, prompt.greedy, "{place}: greedy tokens");
            }
            println!("{name}, chunk {chunk}: log-probabilities within {most:.1e}, all greedy tokens equal");
        }
    }
}

#[test]
fn bf16_on_a_card_stays_near_the_reference() {
    if skipped() {
        return;
    }
    for name in CASES {
        let golden = load(name);
        let mut runner = Runner::new(
            &golden.directory,
            backend(DType::BF16).unwrap(),
            SoloDevice::new(Solo::new()).unwrap(),
        );
        for (i, prompt) in golden.prompts.iter().enumerate() {
            let (logits, _) = runner.run(&prompt.ids, prompt.ids.len(), 0);
            let vocab = golden.config.vocab_size;
            let (ours, theirs) =
                (log_probabilities(&logits, vocab), log_probabilities(&prompt.logits, vocab));
            let squares: f64 = ours.iter().zip(&theirs).map(|(a, b)| (a - b) * (a - b)).sum();
            let off = (squares / ours.len() as f64).sqrt();
            println!("{name} prompt {i}: bf16 log-probabilities off by {off:.3} (root mean square)");
            assert!(
                off < 0.15,
                "{name} prompt {i}: bf16 log-probabilities are off by {off} (root mean square)"
            );
        }
    }
}

/// The same tokens from both devices: every one in f32, most in bf16 (a near tie turns, and the text then differs).
#[test]
fn the_demo_model_says_the_same_on_a_card_as_on_the_cpu() {
    if skipped() {
        return;
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/assets/demo");
    let mut cpu =
        Runner::new(&directory, CpuBackend::new(DType::F32, 4).unwrap(), HostCollective(Solo::new()));
    let mut wide =
        Runner::new(&directory, backend(DType::F32).unwrap(), SoloDevice::new(Solo::new()).unwrap());
    let mut narrow =
        Runner::new(&directory, backend(DType::BF16).unwrap(), SoloDevice::new(Solo::new()).unwrap());
    let mut random = Random::new(11);
    let (mut tokens, mut same, mut agreed) = (0, 0, 0);
    for prompt in 0..8 {
        let ids: Vec<u32> = (0..24 + 8 * prompt).map(|_| random.below(4000) as u32).collect();
        let (_, continued) = cpu.run(&ids, ids.len(), 256);
        let (_, ours) = wide.run(&ids, ids.len(), continued.len());
        tokens += continued.len();
        same += continued.iter().zip(&ours).filter(|(a, b)| a == b).count();
        // Teacher-forced: each position is judged by itself.
        let forced = [ids.as_slice(), &continued].concat();
        let vocab = narrow.model.config().vocab_size;
        let logits = narrow.step(&forced[..forced.len() - 1], 0);
        let choices = logits.chunks(vocab).skip(ids.len() - 1).map(best);
        agreed += choices.zip(&continued).filter(|(a, b)| a == *b).count();
    }
    println!(
        "demo model, {tokens} greedy tokens: f32 {same} equal to the CPU's; bf16, teacher-forced, {agreed} equal"
    );
    assert_eq!(same, tokens, "f32 greedy tokens");
    assert!(agreed * 100 >= tokens * 95, "bf16 agrees on {agreed} of {tokens}");
}
