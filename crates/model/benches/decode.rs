//! Decode and prefill of one rank without a cluster around it, against the floor: the bytes of weights a token needs
//! over the bandwidth this machine reads such an amount with, measured in the same run.
//!
//! `cargo bench -p model --bench decode -- [MODEL_DIR] [THREADS]`; the demo model and one thread by default.

#![allow(clippy::print_stdout, reason = "a benchmark prints what it measured")]

use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

use collectives::Solo;
use model::{Checkpoint, Files, KvBudget, Mlp, Model, ModelConfig, Parts, ShardPlan, WeightBytes};
use ops::{Batch, BatchSequence, BlockTable};
use ops_cpu::{CpuBackend, HostCollective};
use types::{BlockId, BlockSize, DType, Position, TokenId, TpRank};

const PROMPT: usize = 64;
const DECODE: usize = 256;
const PREFILL: usize = 512;
const BLOCK: u32 = 16;
const ROUNDS: usize = 7;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/assets/demo");
    let directory = PathBuf::from(arguments.next().unwrap_or_else(|| demo.to_owned()));
    let threads: usize = arguments.next().map_or(Ok(1), |n| n.parse())?;
    let files = Files::Directory(directory.clone());
    let (config, checkpoint) = (ModelConfig::from_files(&files)?, Checkpoint::open(files)?);
    let plan = ShardPlan::new(&config, TpRank::SOLO)?;
    let mut backend = CpuBackend::new(DType::F32, threads)?;
    let (weights, summary) = model::load(&checkpoint, &config, &plan, &mut backend, &())?;
    let active = active_bytes(&config, &plan);
    let parts = Parts {
        config,
        plan,
        backend,
        comm: HostCollective(Solo::new()),
        subgroup: None,
        weights,
        dispatch: types::Dispatch::Replicated,
    };
    let budget = KvBudget { block_size: BlockSize::new(BLOCK)?, blocks: [128; 2] };
    let mut model = Model::new(parts, budget)?;
    let bandwidth = read_bandwidth(summary.resident.0 as usize);
    let (mut decode, mut prefill) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        step(&mut model, 0, PROMPT)?;
        let start = Instant::now();
        for at in 0..DECODE {
            step(&mut model, PROMPT + at, 1)?;
        }
        decode = decode.min(start.elapsed().as_secs_f64() / DECODE as f64);
        let start = Instant::now();
        step(&mut model, 0, PREFILL)?;
        prefill = prefill.min(start.elapsed().as_secs_f64());
    }
    let floor = active / bandwidth;
    println!("model       {} ({} resident), {threads} thread(s), f32", directory.display(), summary.resident);
    println!("bandwidth   {:.1} GB/s reading as much as is resident, one thread", bandwidth / 1e9);
    println!(
        "decode      {:.0} tok/s, {:.0} us/token, floor {:.0} us ({:.1} MB/token): {:.0} %",
        1.0 / decode,
        decode * 1e6,
        floor * 1e6,
        active / 1e6,
        100.0 * floor / decode
    );
    println!(
        "prefill     {:.0} tok/s, {PREFILL} tokens in {:.1} ms",
        PREFILL as f64 / prefill,
        prefill * 1e3
    );
    Ok(())
}

/// Bytes of weights one token reads: everything but the experts it does not choose and the embedding rows it is not.
fn active_bytes(config: &ModelConfig, plan: &ShardPlan) -> f64 {
    let bytes = WeightBytes::new(config, plan, DType::BF16);
    let share = config.moe.map_or(0.0, |moe| moe.routing.top_k as f64 / moe.experts as f64);
    assert!(config.layers.iter().any(|l| l.mlp == Mlp::Sparse) || share == 0.0);
    bytes.total().0 as f64 - bytes.experts.0 as f64 * (1.0 - share)
}

/// Bytes a second, reading `bytes` again and again.
fn read_bandwidth(bytes: usize) -> f64 {
    let data = vec![1_u64; bytes / 8];
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let start = Instant::now();
        black_box(data.iter().fold(0_u64, |sum, &v| sum.wrapping_add(v)));
        best = best.min(start.elapsed().as_secs_f64());
    }
    bytes as f64 / best
}

fn step(
    model: &mut Model<CpuBackend, HostCollective<Solo>>,
    start: usize,
    count: usize,
) -> Result<(), Box<dyn std::error::Error>> {
    let last = (start + count - 1) / BLOCK as usize;
    let table = || BlockTable { first: 0, blocks: (0..=last).map(|b| BlockId(b as u32)).collect() };
    let batch = Batch {
        tokens: (start..start + count).map(|i| TokenId((i as u32 * 7919) % 4000)).collect(),
        sequences: vec![BatchSequence {
            rows: 0..count,
            start: Position(start as u32),
            tables: [table(), table()],
        }],
        logit_rows: vec![count as u32 - 1],
        ..Batch::default()
    };
    model.step(&batch, |_, logits| {
        black_box(logits);
        Ok(())
    })?;
    Ok(())
}
