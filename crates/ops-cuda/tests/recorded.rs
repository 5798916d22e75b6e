//! Recorded steps: a form's first step runs its ops, its second is recorded, later ones are launched as one piece and
//! padded. All give the same tokens as the CPU, whatever other forms and prompts come between.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

mod support;

use std::path::Path;
use std::time::Duration;

use collectives::{Collective, Op, Solo};
use model::{Checkpoint, Files, KvBudget, Model, ModelConfig, Parts, ShardPlan};
use ops::conformance::Random;
use ops::{Backend, Batch, BatchSequence, BlockTable};
use ops_cpu::{CpuBackend, HostCollective};
use ops_cuda::{Error, Patience, SoloDevice};
use support::{backend, skipped};
use types::{BlockId, BlockSize, Bytes, DType, Dispatch, Position, TokenId, TpRank};

const BLOCK_TOKENS: u32 = 16;
const BLOCKS_EACH: u32 = 8;
const SEQUENCES: usize = 20;
const SEED: u64 = 31;

struct Runner<B: Backend, C> {
    model: Model<B, C>,
    /// Tokens in the cache, by sequence, and the next one.
    lengths: Vec<u32>,
    next: Vec<TokenId>,
}

impl<B: Backend, C: Collective<B::Tensor>> Runner<B, C> {
    fn new(mut backend: B, comm: C) -> Self {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/assets/demo");
        let checkpoint = Checkpoint::open(Files::Directory(directory)).unwrap();
        let config = ModelConfig::from_files(checkpoint.files()).unwrap();
        let plan = ShardPlan::new(&config, TpRank::SOLO).unwrap();
        let (weights, _) = model::load(&checkpoint, &config, &plan, &mut backend, &()).unwrap();
        let parts =
            Parts { config, plan, backend, comm, subgroup: None, weights, dispatch: Dispatch::Replicated };
        let pool = BLOCKS_EACH * SEQUENCES as u32;
        let budget = KvBudget { block_size: BlockSize::new(BLOCK_TOKENS).unwrap(), blocks: [pool; 2] };
        let model = Model::new(parts, budget).unwrap();
        Self { model, lengths: vec![0; SEQUENCES], next: vec![TokenId(0); SEQUENCES] }
    }

    /// One step of (sequence, tokens) parts; each sequence's most likely token becomes its next.
    fn step(&mut self, parts: &[(usize, Vec<TokenId>)]) -> Vec<TokenId> {
        let mut batch = Batch::default();
        for (sequence, tokens) in parts {
            let start = self.lengths[*sequence];
            let rows = batch.tokens.len()..batch.tokens.len() + tokens.len();
            batch.tokens.extend(tokens);
            batch.logit_rows.push(rows.end as u32 - 1);
            // Blocks of a sequence in falling order: a table that is not followed reads other keys.
            let first = *sequence as u32 * BLOCKS_EACH;
            let blocks = (0..BLOCKS_EACH).rev().map(|block| BlockId(first + block)).collect();
            let table = BlockTable { first: 0, blocks };
            let tables = [table.clone(), table];
            batch.sequences.push(BatchSequence { rows, start: Position(start), tables });
            self.lengths[*sequence] += tokens.len() as u32;
        }
        let chosen: Vec<TokenId> =
            self.model.most_likely(&batch).unwrap().into_iter().map(Option::unwrap).collect();
        for ((sequence, _), &token) in parts.iter().zip(&chosen) {
            self.next[*sequence] = token;
        }
        chosen
    }

    /// Prompts for all sequences, then decode steps of many sizes and orders with a prompt's chunk between.
    fn run(&mut self) -> Vec<Vec<TokenId>> {
        let mut random = Random::new(SEED);
        let mut said = Vec::new();
        for sequence in 0..SEQUENCES {
            let tokens = (0..10 + sequence).map(|_| TokenId(random.below(4000) as u32)).collect();
            said.push(self.step(&[(sequence, tokens)]));
        }
        for (round, count) in
            [3, 3, 3, 4, 1, 1, 1, 5, 5, 20, 20, 7, 20, 3, 2, 2, 2, 9, 9, 9].into_iter().enumerate()
        {
            let chosen = random.shuffled(SEQUENCES);
            let parts: Vec<_> = chosen[..count].iter().map(|&s| (s, vec![self.next[s]])).collect();
            said.push(self.step(&parts));
            if round % 4 == 3 {
                let (long, short) = (chosen[0], chosen[1]);
                let tokens = (0..9).map(|_| TokenId(random.below(4000) as u32)).collect();
                said.push(self.step(&[(long, tokens), (short, vec![self.next[short]])]));
            }
        }
        said
    }
}

#[test]
fn recorded_steps_say_what_the_cpu_says() {
    if skipped() {
        return;
    }
    let expected = Runner::new(CpuBackend::new(DType::F32, 4).unwrap(), HostCollective(Solo::new())).run();
    let mut card = Runner::new(backend(DType::F32).unwrap(), SoloDevice::new(Solo::new()).unwrap());
    let said = card.run();
    println!("{} steps, the last of the card idle {:?} before", said.len(), card.model.backend().idle());
    assert_eq!(said, expected, "seed {SEED}");
}

/// NCCL's operations are recorded with the kernels around them. A group of one is what a machine with one card has.
#[test]
fn steps_recorded_with_nccl_say_what_the_cpu_says() {
    if skipped() {
        return;
    }
    let patience = Patience { boot: Duration::from_secs(60), step: Duration::from_secs(60) };
    let backend = backend(DType::F32).unwrap();
    let line = match ops_cuda::connect_cards(&backend, Solo::new(), patience, Bytes(0)) {
        Ok(line) => line,
        Err(error @ Error::LibraryMissing { .. }) => return println!("no NCCL: skipped ({error})"),
        Err(error) => panic!("{error}"),
    };
    let expected = Runner::new(CpuBackend::new(DType::F32, 4).unwrap(), HostCollective(Solo::new())).run();
    let mut card = Runner::new(backend, line);
    assert_eq!(card.run(), expected, "seed {SEED}");
    let told = card.model.comm_mut().counters();
    println!("NCCL: {} all-reduces queued, the rest repeated", told.of(Op::AllReduce).ops);
    assert!(told.of(Op::AllReduce).ops > 0);
}

#[test]
fn recorded_steps_in_bf16_repeat_themselves() {
    if skipped() {
        return;
    }
    let run = || Runner::new(backend(DType::BF16).unwrap(), SoloDevice::new(Solo::new()).unwrap()).run();
    assert_eq!(run(), run(), "seed {SEED}");
}
