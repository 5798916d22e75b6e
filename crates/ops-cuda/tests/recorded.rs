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
use ops::sample::{Ask, Choice, Penalties, Plain, Recipe};
use ops::{Backend, Batch, BatchSequence, BlockTable, Fed};
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
            self.add(&mut batch, *sequence, tokens);
        }
        let chosen: Vec<TokenId> =
            self.model.most_likely(&batch).unwrap().into_iter().map(Option::unwrap).collect();
        for ((sequence, _), &token) in parts.iter().zip(&chosen) {
            self.next[*sequence] = token;
        }
        chosen
    }

    /// Adds a sequence's next rows to a step, with logits for the last of them.
    fn add(&mut self, batch: &mut Batch, sequence: usize, tokens: &[TokenId]) {
        let start = self.lengths[sequence];
        let rows = batch.tokens.len()..batch.tokens.len() + tokens.len();
        batch.tokens.extend(tokens);
        batch.logit_rows.push(rows.end as u32 - 1);
        // Blocks of a sequence in falling order: a table that is not followed reads other keys.
        let first = sequence as u32 * BLOCKS_EACH;
        let blocks = (0..BLOCKS_EACH).rev().map(|block| BlockId(first + block)).collect();
        let table = BlockTable { first: 0, blocks };
        let tables = [table.clone(), table];
        batch.sequences.push(BatchSequence { rows, start: Position(start), tables });
        self.lengths[sequence] += tokens.len() as u32;
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

/// Seeded prompts for some sequences, then decode steps in which every token is drawn, most of them at random: each step
/// queued before the one before it is collected, its tokens fed on the device; or one after the other, fed by the host.
fn drawn_run<B: Backend, C: Collective<B::Tensor>>(
    runner: &mut Runner<B, C>,
    (sequences, ahead): (usize, bool),
) -> Vec<Vec<Choice>> {
    const STEPS: u32 = 24;
    let mut random = Random::new(SEED + sequences as u64);
    let mut draws = |first: u32| -> Vec<Ask<'static>> {
        let at = |row: usize| (row as u64 + u64::from(first)).is_multiple_of(5);
        let mut own = |row: usize| Plain {
            temperature: if at(row) { 0.0 } else { 1.5 },
            top_k: (row % 3 == 1).then_some(40),
            top_p: if row % 3 == 2 { 0.9 } else { 1.0 },
            min_p: 0.0,
            at: random.unit(),
        };
        (0..sequences).map(|row| Ask::Token(Recipe::plain(own(row)))).collect()
    };
    let mut said = Vec::new();
    let mut prompt = Batch::default();
    let mut tokens = Random::new(SEED);
    for sequence in 0..sequences {
        let tokens: Vec<TokenId> = (0..3 + sequence).map(|_| TokenId(tokens.below(4000) as u32)).collect();
        runner.add(&mut prompt, sequence, &tokens);
    }
    let model = &mut runner.model;
    let forward = model.begin(&prompt, &[prompt.tokens.len()]).unwrap();
    let mut under_way = Some(model.draw(forward, &draws(0)).unwrap());
    for at in 1..STEPS {
        let mut batch = Batch::default();
        let before = if ahead { None } else { under_way.take() };
        let before = before.map(|pending| runner.model.collect(pending).unwrap());
        for sequence in 0..sequences {
            let token = match before.as_ref().map(|choices| &choices[sequence]) {
                Some(&Choice::Token { token, .. }) => token,
                Some(other) => panic!("{other:?} in step {at}"),
                // What the host does not know says nothing, and must not be read.
                None => TokenId(3999),
            };
            if ahead {
                let row = sequence as u32;
                batch.fed.push(Fed { row, from: row });
            }
            runner.add(&mut batch, sequence, &[token]);
        }
        said.extend(before);
        let forward = runner.model.begin(&batch, &[sequences]).unwrap();
        said.extend(under_way.take().map(|pending| runner.model.collect(pending).unwrap()));
        under_way = Some(runner.model.draw(forward, &draws(at)).unwrap());
    }
    said.extend(under_way.map(|pending| runner.model.collect(pending).unwrap()));
    said
}

/// The forms of 1, 3 and 20 sequences: run once, recorded at the second step, repeated from then on.
#[test]
fn tokens_fed_on_the_card_are_those_fed_by_the_host() {
    if skipped() {
        return;
    }
    for dtype in [DType::F32, DType::BF16] {
        for sequences in [1, 3, SEQUENCES] {
            let run = |ahead| {
                let comm = SoloDevice::new(Solo::new()).unwrap();
                let mut runner = Runner::new(backend(dtype).unwrap(), comm);
                let said = drawn_run(&mut runner, (sequences, ahead));
                (said, runner.model.backend().idle())
            };
            let ((fed, ahead), (expected, waited)) = (run(true), run(false));
            println!(
                "{dtype}, {sequences} sequences: the card idle {ahead:?} between steps, {waited:?} in turn"
            );
            assert_eq!(fed, expected, "seed {SEED}, {dtype}, {sequences} sequences");
            let tokens = fed.iter().flatten().filter(|choice| matches!(choice, Choice::Token { .. })).count();
            assert_eq!(tokens, 24 * sequences);
        }
    }
}

/// On the CPU nothing waits, and tokens are fed all the same.
#[test]
fn tokens_fed_on_the_cpu_are_those_fed_by_the_host() {
    let run = |ahead| {
        let backend = CpuBackend::new(DType::F32, 2).unwrap();
        drawn_run(&mut Runner::new(backend, HostCollective(Solo::new())), (5, ahead))
    };
    assert_eq!(run(true), run(false), "seed {SEED}");
}

/// A row that is left to the host is drawn there, and what comes of it is fed like all others.
#[test]
fn a_row_left_to_the_host_is_fed_as_what_the_host_drew() {
    if skipped() {
        return;
    }
    let comm = SoloDevice::new(Solo::new()).unwrap();
    let mut runner = Runner::new(backend(DType::F32).unwrap(), comm);
    let mut steps = |host: bool| {
        runner.lengths.fill(0);
        let mut said = Vec::new();
        for at in 0..6_u32 {
            let mut batch = Batch::default();
            for sequence in 0..3 {
                let prompt = TokenId(100 + sequence as u32);
                batch.fed.extend((at > 0).then_some(Fed { row: sequence as u32, from: sequence as u32 }));
                runner.add(&mut batch, sequence, &[prompt]);
            }
            let mut asks = vec![Ask::GREEDY; 3];
            if host {
                // A history of more tokens than the card takes, which changes nothing.
                let seen = (0..1 << 16).map(|token| (TokenId(token), 1)).collect();
                let penalties = Penalties { repetition: 1.0, frequency: 0.0, presence: 0.0, seen };
                asks[1] = Ask::Token(Recipe { penalties: Some(penalties), ..Recipe::plain(Plain::GREEDY) });
            }
            assert_eq!(runner.model.backend().left_to_host(&asks, 4000), if host { vec![1] } else { vec![] });
            let choices = runner.model.choose((&batch, &[3]), &asks).unwrap();
            said.push(choices);
        }
        said
    };
    assert_eq!(steps(true), steps(false));
}

#[test]
fn recorded_steps_in_bf16_repeat_themselves() {
    if skipped() {
        return;
    }
    let run = || Runner::new(backend(DType::BF16).unwrap(), SoloDevice::new(Solo::new()).unwrap()).run();
    assert_eq!(run(), run(), "seed {SEED}");
}
