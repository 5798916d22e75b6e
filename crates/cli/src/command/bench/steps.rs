//! `cohort bench decode` and `cohort bench prefill`: whole steps of one rank, with no cluster around it.

use std::time::Instant;

use anyhow::bail;
use collectives::Collective;
use model::{KvBudget, Model, Pending};
use ops::sample::Ask;
use ops::{Batch, BatchSequence, BlockTable};
use serde::Serialize;
use serde_json::json;
use types::{BlockId, BlockSize, KvGroup, Position, TokenId};
use worker::StepBounds;

use super::floor::Floor;
use super::load::Random;
use super::machine::{Machine, Measurement, Settled, Target, TargetArgs};
use crate::out::say;
use crate::table::{Align, Table};

/// Steps before the measured ones.
const WARM_UP: u32 = 8;
/// Steps whose experts are counted, beside the measured ones.
const COUNTED: u32 = 3;
/// Decode steps a context may grow by: rooms for keys are made for them.
const STEPS_MAX: i64 = 10_000;

/// Flags of `cohort bench decode`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct DecodeArgs {
    /// Sequences decoded together; several separated by commas
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8], value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: Vec<u32>,
    /// Tokens before the decoded ones, whose keys and values are seeded numbers
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub context: u32,
    /// Measured steps of each batch; the median counts
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=STEPS_MAX))]
    pub steps: u32,
    /// Tokens per KV block
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub block_size: u32,
    /// Whose steps.
    #[command(flatten)]
    pub target: TargetArgs,
}

/// Flags of `cohort bench prefill`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct PrefillArgs {
    /// Tokens of a prompt; several separated by commas
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [8192], value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: Vec<u32>,
    /// Tokens of a step
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub chunk: u32,
    /// Prompts of each length; the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeats: u32,
    /// Tokens per KV block
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub block_size: u32,
    /// Whose steps.
    #[command(flatten)]
    pub target: TargetArgs,
}

/// One batch size.
#[derive(Debug, Clone, Serialize)]
struct Decoded {
    batch: u32,
    context: u32,
    step_ms: f64,
    tokens_per_s: f64,
    bytes: f64,
    floor_ms: f64,
    share_of_floor: f64,
    /// Mean of a sparse layer.
    experts_touched: f64,
    /// How long the card had nothing to do between two steps, the median; none on the CPU.
    idle_us: Option<f64>,
}

/// One prompt length.
#[derive(Debug, Clone, Serialize)]
struct Prefilled {
    prompt: u32,
    chunk: u32,
    ms: f64,
    tokens_per_s: f64,
    flop: f64,
    floor_ms: f64,
    share_of_floor: f64,
}

pub(super) fn decode(args: &DecodeArgs) -> anyhow::Result<()> {
    let target = Target::new(&args.target)?;
    let most = args.batch.iter().copied().max().unwrap_or(1);
    let room = Room::new(&target, args.block_size, (args.context.saturating_add(WARM_UP + args.steps), 1))?;
    let bounds = room.bounds(most, most);
    let (machine, rows) = target.measure(&bounds, Decode { args, room, most })?;
    if args.target.json {
        say!("{}", json!({ "model": target.name, "machine": machine.as_json(), "decode": rows }));
        return Ok(());
    }
    say!("{} on {}", target.name, machine.line());
    let mut table = Table::new([Align::Right; 9]);
    table.row(
        [
            "batch",
            "context",
            "tok/s",
            "ms a step",
            "GB",
            "floor ms",
            "of floor",
            "experts a layer",
            "idle µs",
        ]
        .map(str::to_owned),
    );
    for row in rows {
        table.row([
            row.batch.to_string(),
            row.context.to_string(),
            format!("{:.1}", row.tokens_per_s),
            format!("{:.3}", row.step_ms),
            format!("{:.3}", row.bytes / 1e9),
            format!("{:.3}", row.floor_ms),
            format!("{:.1} %", 100.0 * row.share_of_floor),
            format!("{:.1}", row.experts_touched),
            row.idle_us.map_or_else(|| "-".to_owned(), |idle| format!("{idle:.1}")),
        ]);
    }
    table.lines().for_each(|line| say!("{line}"));
    Ok(())
}

pub(super) fn prefill(args: &PrefillArgs) -> anyhow::Result<()> {
    let target = Target::new(&args.target)?;
    let longest = args.prompt.iter().copied().max().unwrap_or(1);
    let room = Room::new(&target, args.block_size, (longest, args.chunk))?;
    let bounds = room.bounds(1, args.chunk.min(longest));
    let (machine, rows) = target.measure(&bounds, Prefill { args, room })?;
    if args.target.json {
        say!("{}", json!({ "model": target.name, "machine": machine.as_json(), "prefill": rows }));
        return Ok(());
    }
    say!("{} on {}", target.name, machine.line());
    let mut table = Table::new([Align::Right; 7]);
    table.row(["prompt", "chunk", "tok/s", "ms", "GFLOP", "floor ms", "of floor"].map(str::to_owned));
    for row in rows {
        table.row([
            row.prompt.to_string(),
            row.chunk.to_string(),
            format!("{:.0}", row.tokens_per_s),
            format!("{:.1}", row.ms),
            format!("{:.1}", row.flop / 1e9),
            format!("{:.1}", row.floor_ms),
            format!("{:.1} %", 100.0 * row.share_of_floor),
        ]);
    }
    table.lines().for_each(|line| say!("{line}"));
    Ok(())
}

/// Where the keys of sequences lie: every sequence has blocks of its own; a sliding layer's go round in a ring.
#[derive(Debug, Clone, Copy)]
struct Room {
    block_size: BlockSize,
    window: u32,
    /// Blocks of one sequence by [`KvGroup::index`].
    each: [u32; 2],
}

impl Room {
    /// For sequences of up to `tokens`, `step` of them in one step.
    fn new(target: &Target, block: u32, (tokens, step): (u32, u32)) -> anyhow::Result<Self> {
        let most = target.config.context_tokens_max;
        if tokens > most {
            bail!("{} holds sequences of up to {most} tokens, and {tokens} are needed", target.name);
        }
        let block_size = BlockSize::new(block)?;
        let window = target.config.window_keys;
        let full = block_size.blocks_for(tokens);
        let ring = block_size.blocks_for(window.saturating_add(step)).saturating_add(2);
        Ok(Self { block_size, window, each: [full, full.min(ring)] })
    }

    fn pools(&self, sequences: u32) -> [u32; 2] {
        self.each.map(|each| each.saturating_mul(sequences))
    }

    fn budget(&self, sequences: u32) -> KvBudget {
        KvBudget { block_size: self.block_size, blocks: self.pools(sequences) }
    }

    fn bounds(&self, sequences: u32, rows: u32) -> StepBounds {
        let (rows, sequences_max) = (rows as usize, sequences as usize);
        StepBounds { rows, sequences: sequences_max, blocks: self.pools(sequences), all_to_all: false }
    }

    /// The table of a group for rows `start..end` of a sequence.
    fn table(&self, group: KvGroup, sequence: u32, (start, end): (u32, u32)) -> BlockTable {
        let (block, each) = (self.block_size.tokens(), self.each[group.index()]);
        let first = match group {
            KvGroup::Full => 0,
            KvGroup::Sliding => (start + 1).saturating_sub(self.window) / block,
        };
        let place = |logical: u32| BlockId(sequence * each + logical % each);
        BlockTable { first, blocks: (first..=(end - 1) / block).map(place).collect() }
    }

    /// Adds rows `start..end` of a sequence to a batch, random tokens.
    fn add(&self, batch: &mut Batch, sequence: u32, (start, end): (u32, u32), random: &mut Tokens) {
        let first = batch.tokens.len();
        batch.tokens.extend((start..end).map(|_| random.next()));
        let tables = KvGroup::ALL.map(|group| self.table(group, sequence, (start, end)));
        let rows = first..batch.tokens.len();
        batch.sequences.push(BatchSequence { rows, start: Position(start), tables });
    }
}

/// Seeded tokens of a vocabulary.
struct Tokens {
    random: Random,
    vocab: u32,
}

impl Tokens {
    fn new(target: &Target) -> Self {
        let vocab = u32::try_from(target.config.vocab_size).unwrap_or(u32::MAX);
        Self { random: Random::new(7), vocab }
    }

    fn next(&mut self) -> TokenId {
        TokenId(self.random.below(self.vocab))
    }
}

#[derive(Clone)]
struct Decode<'a> {
    args: &'a DecodeArgs,
    room: Room,
    most: u32,
}

impl Measurement for Decode<'_> {
    type Found = (Machine, Vec<Decoded>);

    fn run<B: Settled, C: Collective<B::Tensor>>(
        self,
        target: &Target,
        machine: Machine,
        (backend, comm): (B, C),
    ) -> anyhow::Result<Self::Found> {
        let weights = target.weight_bytes(&backend);
        let floor = Floor::new(&target.config, &target.plan, weights, target.dtype);
        let mut model = target.model((backend, comm), self.room.budget(self.most))?;
        let mut rows = Vec::new();
        for &batch in &self.args.batch {
            rows.push(self.batch(&mut model, (target, &machine, &floor), batch)?);
        }
        Ok((machine, rows))
    }
}

impl Decode<'_> {
    fn batch<B: Settled, C: Collective<B::Tensor>>(
        &self,
        model: &mut Model<B, C>,
        (target, machine, floor): (&Target, &Machine, &Floor),
        batch: u32,
    ) -> anyhow::Result<Decoded> {
        let context = self.args.context;
        let mut tokens = Tokens::new(target);
        let step = |at: u32, tokens: &mut Tokens| {
            let mut step = Batch { logit_rows: (0..batch).collect(), ..Batch::default() };
            (0..batch).for_each(|sequence| {
                self.room.add(&mut step, sequence, (context + at, context + at + 1), tokens);
            });
            step
        };
        let mut touched = Vec::new();
        for _ in 0..COUNTED {
            touched.extend(model.experts_touched(&step(0, &mut tokens))?);
        }
        let (mut times, mut idle) = (Vec::new(), Vec::new());
        let asks = vec![Ask::GREEDY; batch as usize];
        // Each step is queued before the one before it has ended, as a group's are. Its tokens are random, not those that were
        // drawn: what a model of random weights says soon repeats itself, and reads fewer experts.
        let mut ended = Instant::now();
        let mut under_way: Option<Pending<B>> = None;
        for at in 0..=WARM_UP + self.args.steps {
            let last = at == WARM_UP + self.args.steps;
            let forward =
                if last { None } else { Some(model.begin(&step(at, &mut tokens), &[batch as usize])?) };
            if let Some(pending) = under_way.take() {
                model.collect(pending)?;
                let now = Instant::now();
                if at > WARM_UP {
                    times.push(now.duration_since(ended).as_secs_f64());
                    idle.extend(model.backend().idle().map(|idle| idle.as_secs_f64()));
                }
                ended = now;
            }
            under_way = forward.map(|forward| model.draw(forward, &asks)).transpose()?;
        }
        let time = median(times);
        let all: usize = touched.iter().sum();
        let bytes = floor.decode_bytes(batch as usize, context as usize, all as f64 / f64::from(COUNTED));
        let floor_s = bytes / machine.copy;
        Ok(Decoded {
            batch,
            context,
            step_ms: time * 1e3,
            tokens_per_s: f64::from(batch) / time,
            bytes,
            floor_ms: floor_s * 1e3,
            share_of_floor: floor_s / time,
            experts_touched: all as f64 / touched.len().max(1) as f64,
            idle_us: (!idle.is_empty()).then(|| median(idle) * 1e6),
        })
    }
}

/// One step to its end: the most likely token of each row.
fn choose<B: Settled, C: Collective<B::Tensor>>(
    model: &mut Model<B, C>,
    step: &Batch,
) -> Result<Vec<Option<TokenId>>, model::Error> {
    model.most_likely(step)
}

#[derive(Clone)]
struct Prefill<'a> {
    args: &'a PrefillArgs,
    room: Room,
}

impl Measurement for Prefill<'_> {
    type Found = (Machine, Vec<Prefilled>);

    fn run<B: Settled, C: Collective<B::Tensor>>(
        self,
        target: &Target,
        machine: Machine,
        (backend, comm): (B, C),
    ) -> anyhow::Result<Self::Found> {
        let weights = target.weight_bytes(&backend);
        let floor = Floor::new(&target.config, &target.plan, weights, target.dtype);
        let mut model = target.model((backend, comm), self.room.budget(1))?;
        let mut tokens = Tokens::new(target);
        let mut rows = Vec::new();
        for &prompt in &self.args.prompt {
            let mut times = Vec::new();
            // The first one finds cold caches and unmade workspaces.
            for round in 0..=self.args.repeats {
                let started = Instant::now();
                self.prompt(&mut model, &mut tokens, prompt)?;
                if round > 0 {
                    times.push(started.elapsed().as_secs_f64());
                }
            }
            let (time, flop) = (median(times), floor.prefill_flops(prompt as usize));
            let bytes = floor.decode_bytes(0, 0, 0.0);
            let floor_s = (flop / machine.matmul).max(bytes / machine.copy);
            rows.push(Prefilled {
                prompt,
                chunk: self.args.chunk,
                ms: time * 1e3,
                tokens_per_s: f64::from(prompt) / time,
                flop,
                floor_ms: floor_s * 1e3,
                share_of_floor: floor_s / time,
            });
        }
        Ok((machine, rows))
    }
}

impl Prefill<'_> {
    /// Runs a prompt chunk by chunk, to the choice of its first token.
    fn prompt<B: Settled, C: Collective<B::Tensor>>(
        &self,
        model: &mut Model<B, C>,
        tokens: &mut Tokens,
        prompt: u32,
    ) -> Result<(), model::Error> {
        let mut start = 0;
        while start < prompt {
            let end = prompt.min(start + self.args.chunk);
            let mut step = Batch::default();
            self.room.add(&mut step, 0, (start, end), tokens);
            if end == prompt {
                step.logit_rows.push(end - start - 1);
            }
            choose(model, &step)?;
            start = end;
        }
        Ok(())
    }
}

/// The middle value; 0 of none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
