//! `cohort bench kernels`: the operations of one layer by themselves, each over enough copies of its weights that no
//! cache holds them.

use std::time::Instant;

use anyhow::bail;
use collectives::Collective;
use model::{Attention, Mlp};
use ops::{Batch, BatchSequence, BlockTable, KvGroup, KvLayerSpec, Window, chosen};
use serde::Serialize;
use serde_json::json;
use types::{BlockId, BlockSize, DType, Position, TokenId};
use worker::StepBounds;

use super::machine::{self, Machine, Measurement, Settled, Target, TargetArgs, weight};
use super::steps::median;
use crate::out::say;
use crate::table::{Align, Table};

/// Weights of all copies together: more than any cache.
const ROTATED_BYTES: usize = 256 << 20;
const COPIES_MAX: usize = 64;
const WARM_UP: u32 = 3;
/// Tokens of a block of the caches measured here.
const BLOCK: u32 = 16;

/// Flags of `cohort bench kernels`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct KernelsArgs {
    /// Rows of the step; several separated by commas
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8, 64], value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub rows: Vec<u32>,
    /// Keys each row of attention sees
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub context: u32,
    /// Measured rounds; the median counts
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub repeats: u32,
    /// Whose operations.
    #[command(flatten)]
    pub target: TargetArgs,
}

/// One operation at one number of rows.
#[derive(Debug, Clone, Serialize)]
struct Op {
    op: &'static str,
    rows: u32,
    us: f64,
    bytes: f64,
    flop: f64,
    floor_us: f64,
    share_of_floor: f64,
}

pub(super) fn run(args: &KernelsArgs) -> anyhow::Result<()> {
    let target = Target::new(&args.target)?;
    let rows = args.rows.iter().copied().max().unwrap_or(1);
    let blocks = args.context.div_ceil(BLOCK).saturating_mul(rows);
    let bounds =
        StepBounds { rows: rows as usize, sequences: rows as usize, blocks: [blocks; 2], all_to_all: false };
    let (machine, found) = target.measure(&bounds, Ops { args })?;
    if args.target.json {
        say!("{}", json!({ "model": target.name, "machine": machine.as_json(), "kernels": found }));
        return Ok(());
    }
    say!("{} on {}", target.name, machine.line());
    let [left, right] = [Align::Left, Align::Right];
    let mut table = Table::new([left, right, right, right, right, right, right]);
    table.row(["operation", "rows", "µs", "MB", "MFLOP", "floor µs", "of floor"].map(str::to_owned));
    for op in found {
        table.row([
            op.op.to_owned(),
            op.rows.to_string(),
            format!("{:.1}", op.us),
            format!("{:.3}", op.bytes / 1e6),
            format!("{:.1}", op.flop / 1e6),
            format!("{:.1}", op.floor_us),
            format!("{:.1} %", 100.0 * op.share_of_floor),
        ]);
    }
    table.lines().for_each(|line| say!("{line}"));
    Ok(())
}

#[derive(Clone)]
struct Ops<'a> {
    args: &'a KernelsArgs,
}

/// What measuring one operation after the other needs.
pub(super) struct Bench<'a, B> {
    pub(super) backend: B,
    pub(super) target: &'a Target,
    machine: Machine,
    repeats: u32,
    found: Vec<Op>,
}

impl Measurement for Ops<'_> {
    type Found = (Machine, Vec<Op>);

    fn run<B: Settled, C: Collective<B::Tensor>>(
        self,
        target: &Target,
        machine: Machine,
        (backend, _): (B, C),
    ) -> anyhow::Result<Self::Found> {
        let mut bench = Bench { backend, target, machine, repeats: self.args.repeats, found: Vec::new() };
        let (config, plan) = (&target.config, &target.plan);
        let (hidden, d) = (config.hidden_size, config.head_dim);
        let heads = plan.query_heads.len() * d;
        let qkv = heads + 2 * plan.kv_heads.len() * d;
        let rows = &self.args.rows;
        bench.norm(rows)?;
        bench.linear("qkv", rows, (qkv, hidden))?;
        bench.linear("attention out", rows, (hidden, heads))?;
        for (attention, name) in
            [(Attention::Full, "attention, full"), (Attention::Sliding, "attention, sliding")]
        {
            if config.layers.iter().any(|layer| layer.attention == attention) {
                bench.attention((name, attention), rows, self.args.context)?;
            }
        }
        if let Some(dense) = plan.dense.as_ref().map(ExactSizeIterator::len) {
            bench.linear("dense gate_up", rows, (2 * dense, hidden))?;
        }
        if config.layers.iter().any(|layer| layer.mlp == Mlp::Sparse) {
            bench.experts(rows)?;
        }
        bench.linear("head", rows, (plan.vocab_rows, hidden))?;
        bench.draws(rows)?;
        Ok((bench.machine, bench.found))
    }
}

impl<B: Settled> Bench<'_, B> {
    /// Bytes of one activation.
    fn each(&self) -> f64 {
        self.target.dtype.bytes() as f64
    }

    /// Bytes of so many weights, as the backend keeps them.
    fn kept(&self, elements: usize) -> f64 {
        (elements * self.backend.weight_dtype(DType::BF16).bytes()) as f64
    }

    fn copies(&self, elements: usize) -> usize {
        (ROTATED_BYTES / (self.kept(elements) as usize).max(1)).clamp(1, COPIES_MAX)
    }

    /// Times `work` on each copy in turn, all of them in a round, and notes what one took.
    pub(super) fn note(
        &mut self,
        (op, rows): (&'static str, u32),
        (bytes, flop): (f64, f64),
        copies: usize,
        mut work: impl FnMut(&mut B, usize) -> Result<(), ops::Error>,
    ) -> anyhow::Result<()> {
        let mut times = Vec::new();
        for round in 0..WARM_UP + self.repeats {
            self.backend.settle()?;
            let started = Instant::now();
            (0..copies).try_for_each(|copy| work(&mut self.backend, copy))?;
            self.backend.settle()?;
            if round >= WARM_UP {
                times.push(started.elapsed().as_secs_f64() / copies as f64);
            }
        }
        let time = median(times);
        let floor = (bytes / self.machine.copy).max(flop / self.machine.matmul);
        let (us, floor_us) = (time * 1e6, floor * 1e6);
        self.found.push(Op { op, rows, us, bytes, flop, floor_us, share_of_floor: floor / time });
        Ok(())
    }

    fn linear(
        &mut self,
        op: &'static str,
        rows: &[u32],
        (outs, inner): (usize, usize),
    ) -> anyhow::Result<()> {
        let copies = self.copies(outs * inner);
        let made = (0..copies).map(|i| self.backend.dummy_weight(&weight(&[outs, inner], i as u64)));
        let weights = made.collect::<Result<Vec<_>, _>>()?;
        for &count in rows {
            let t = count as usize;
            let x = machine::rows(&mut self.backend, t, inner)?;
            let bytes = self.kept(outs * inner) + (t * (inner + outs)) as f64 * self.each();
            let flop = 2.0 * (t * outs * inner) as f64;
            self.note((op, count), (bytes, flop), copies, |backend, copy| {
                backend.linear(&x, &weights[copy]).map(drop)
            })?;
        }
        Ok(())
    }

    fn norm(&mut self, rows: &[u32]) -> anyhow::Result<()> {
        let (hidden, norm) = (self.target.config.hidden_size, self.target.config.norm);
        let scale = self.backend.dummy_weight(&weight(&[hidden], 1))?;
        for &count in rows {
            let t = count as usize;
            let x = machine::rows(&mut self.backend, t, hidden)?;
            let bytes = self.kept(hidden) + (2 * t * hidden) as f64 * self.each();
            self.note(("norm", count), (bytes, 0.0), 16, |backend, _| {
                backend.norm(&x, &scale, norm).map(drop)
            })?;
        }
        Ok(())
    }

    /// Router and routed experts of one layer.
    fn experts(&mut self, rows: &[u32]) -> anyhow::Result<()> {
        let (config, plan) = (&self.target.config, &self.target.plan);
        let (Some(moe), Some(shard)) = (config.moe, plan.experts.as_ref()) else {
            bail!("a sparse layer has experts");
        };
        let (hidden, count, width) = (config.hidden_size, shard.experts.len(), shard.width.len());
        let expert = 3 * width * hidden;
        let copies = self.copies(count * expert);
        let router = self.backend.dummy_weight(&weight(&[moe.experts, hidden], 1))?;
        let mut stacks = Vec::new();
        for copy in 0..copies as u64 {
            let gate_up = self.backend.dummy_experts(&weight(&[count, 2 * width, hidden], 2 * copy + 2))?;
            let down = self.backend.dummy_experts(&weight(&[count, hidden, width], 2 * copy + 3))?;
            stacks.push((gate_up, down));
        }
        for &rows in rows {
            let t = rows as usize;
            let x = machine::rows(&mut self.backend, t, hidden)?;
            let logits = self.backend.linear(&x, &router)?;
            let routed = self.backend.route(&logits, moe.routing)?;
            let touched = chosen(&self.backend.read(&logits)?, moe.experts, moe.routing.top_k).len();
            let moved = self.kept(moe.experts * hidden) + (t * (hidden + moe.experts)) as f64 * self.each();
            let flop = 2.0 * (t * moe.experts * hidden) as f64;
            self.note(("router", rows), (moved, flop), 16, |backend, _| {
                let logits = backend.linear(&x, &router)?;
                backend.route(&logits, moe.routing).map(drop)
            })?;
            // Results are fp32.
            let moved =
                self.kept(touched * expert) + (t * hidden) as f64 * self.each() + (4 * t * hidden) as f64;
            let flop = 2.0 * (t * moe.routing.top_k * expert) as f64;
            self.note(("experts", rows), (moved, flop), copies, |backend, copy| {
                let (gate_up, down) = &stacks[copy];
                backend.routed_experts(&x, &routed, gate_up, down, 0).map(drop)
            })?;
        }
        Ok(())
    }

    /// One row of each of `rows` sequences over keys and values of its own.
    fn attention(
        &mut self,
        (name, kind): (&'static str, Attention),
        rows: &[u32],
        context: u32,
    ) -> anyhow::Result<()> {
        let (config, plan) = (&self.target.config, &self.target.plan);
        let (query_heads, kv_heads, head_dim) =
            (plan.query_heads.len(), plan.kv_heads.len(), config.head_dim);
        let (window, seen) = match kind {
            Attention::Full => (Window::All, context),
            Attention::Sliding => (Window::Keys(config.window_keys), context.min(config.window_keys)),
        };
        let rope = Some(config.rope);
        let block_size = BlockSize::new(BLOCK)?;
        let each = block_size.blocks_for(context);
        let most = rows.iter().copied().max().unwrap_or(1);
        let group = KvGroup::Full;
        let blocks = (each * most) as usize;
        let spec = KvLayerSpec { group, blocks, block_size, kv_heads, query_heads, head_dim };
        let kv_bytes = 2 * kv_heads * head_dim * self.target.dtype.bytes();
        let copies = (ROTATED_BYTES / (kv_bytes * (context * most) as usize)).clamp(1, 8);
        let mut layers = (0..copies).map(|_| self.backend.kv_layer(&spec)).collect::<Result<Vec<_>, _>>()?;
        for (seed, layer) in (0..).zip(&mut layers) {
            self.backend.dummy_kv(layer, seed)?;
        }
        let width = (query_heads + 2 * kv_heads) * head_dim;
        for &rows in rows {
            let t = rows as usize;
            let qkv = machine::rows(&mut self.backend, t, width)?;
            self.backend.begin_step(&last_rows(rows, (context, each)))?;
            let moved = t as f64 * f64::from(seen) * kv_bytes as f64
                + (t * (width + query_heads * head_dim)) as f64 * self.each();
            let flop = 4.0 * (t * query_heads * head_dim) as f64 * f64::from(seen);
            self.note((name, rows), (moved, flop), copies, |backend, copy| {
                backend.attention(&qkv, &mut layers[copy], rope, window).map(drop)
            })?;
        }
        Ok(())
    }
}

/// The last row of so many sequences of `context` tokens, each with `each` blocks of its own.
fn last_rows(rows: u32, (context, each): (u32, u32)) -> Batch {
    let sequence = |row: u32| {
        let blocks = (row * each..(row + 1) * each).map(BlockId).collect();
        let tables = [BlockTable { first: 0, blocks }, BlockTable::default()];
        BatchSequence { rows: row as usize..row as usize + 1, start: Position(context - 1), tables }
    };
    let sequences = (0..rows).map(sequence).collect();
    Batch { tokens: vec![TokenId(0); rows as usize], sequences, ..Batch::default() }
}
