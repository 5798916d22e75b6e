//! Prefill and decode of North-Mini-Code's shape on one card, with seeded weights made on the card, against the floor:
//! the bytes a step must read over the bandwidth at which this card copies, measured in the same run.
//!
//! `cargo run --release -p ops-cuda --example decode -- [CONTEXT[/CHUNK]] [BATCH ...]`; 8192 tokens in chunks of 2048
//! and batches 1 and 8 by default. Needs about 75 GB on the card.

#![allow(clippy::print_stdout, reason = "a benchmark prints what it measured")]

use std::time::Instant;

use collectives::Solo;
use model::{
    GatedMlp, KvBudget, LayerWeights, Mlp, MlpWeights, Model, ModelConfig, Parts, ShardPlan, WeightBytes,
    Weights, kv_bytes_per_token,
};
use ops::{Batch, BatchSequence, BlockTable, KvGroup};
use ops_cuda::{Activations, CudaBackend, KernelCache, Options, SoloDevice, Weight};
use types::{BlockId, BlockSize, DType, Dispatch, Position, TokenId, TpRank};

type Failure = Box<dyn std::error::Error>;
type CudaModel = Model<CudaBackend, SoloDevice<Solo>>;

const CONFIG: &str = r#"{
    "model_type": "cohere2_moe", "hidden_size": 2048, "num_hidden_layers": 49, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 768, "first_k_dense_replace": 1,
    "prefix_dense_intermediate_size": 3072, "prefix_dense_sliding_window_pattern": 1, "num_experts": 128,
    "num_experts_per_tok": 8, "num_shared_experts": 0, "expert_selection_fn": "sigmoid", "norm_topk_prob": false,
    "rms_norm_eps": 1e-6, "layer_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4,
    "rope_theta": 50000.0, "position_embedding_type": "rope_gptj", "logit_scale": 1.0, "vocab_size": 262144,
    "max_position_embeddings": 500000, "tie_word_embeddings": null, "use_parallel_block": true,
    "use_gated_activation": true, "use_qk_norm": false, "attention_bias": false, "hidden_act": "silu",
    "eos_token_id": 255001, "layer_types": LAYER_TYPES
}"#;
const BLOCK: u32 = 16;
const WARM_UP: usize = 8;
const STEPS: usize = 64;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let first = arguments.next().unwrap_or_else(|| "8192".to_owned());
    let (context, chunk) = first.split_once('/').unwrap_or((&first, "2048"));
    let (context, chunk): (usize, usize) = (context.parse()?, chunk.parse()?);
    let mut batches = arguments.map(|a| a.parse()).collect::<Result<Vec<usize>, _>>()?;
    if batches.is_empty() {
        batches = vec![1, 8];
    }
    let most = batches.iter().copied().max().unwrap_or(1);
    let layer_types: Vec<&str> =
        (0..49).map(|i| if i % 4 == 0 { "\"full_attention\"" } else { "\"sliding_attention\"" }).collect();
    let json = CONFIG.replace("LAYER_TYPES", &format!("[{}]", layer_types.join(",")));
    let config = ModelConfig::from_json(json.as_bytes(), "config.json", None)?;
    let plan = ShardPlan::new(&config, TpRank::SOLO)?;
    let blocks = (context + STEPS + WARM_UP).div_ceil(BLOCK as usize) + 1;
    let mut backend = CudaBackend::new(&options(&config, chunk.max(most), 2 * most * blocks))?;
    let copy = backend.copy_bandwidth()?;
    println!("card        {}, copies {:.0} GB/s (read and written)", ops_cuda::probe()?, copy / 1e9);
    let started = Instant::now();
    let weights = random_weights(&config, &plan, &mut backend)?;
    backend.synchronize()?;
    println!(
        "weights     {} bf16, made in {:.1} s",
        WeightBytes::new(&config, &plan, DType::BF16).total(),
        started.elapsed().as_secs_f64()
    );
    let parts = Parts {
        config: config.clone(),
        plan: plan.clone(),
        backend,
        comm: SoloDevice::new(Solo::new())?,
        subgroup: None,
        weights,
        dispatch: Dispatch::Replicated,
    };
    let pool = u32::try_from(most * blocks)?;
    let budget = KvBudget { block_size: BlockSize::new(BLOCK)?, blocks: [pool; 2] };
    let mut run = Run { model: Model::new(parts, budget)?, blocks };
    run.prefill(most, context, chunk)?;
    for batch in batches {
        run.decode(&config, &plan, (batch, context), copy)?;
    }
    Ok(())
}

fn options(config: &ModelConfig, rows: usize, table_words: usize) -> Options {
    let moe = config.moe.as_ref();
    let activations = Activations {
        rows,
        logit_rows: 256,
        hidden: config.hidden_size,
        qkv: (config.query_heads + 2 * config.kv_heads) * config.head_dim,
        intermediate: config.dense_intermediate_size.unwrap_or(0),
        experts: moe.map_or(0, |m| m.experts),
        top_k: moe.map_or(0, |m| m.routing.top_k),
        expert_intermediate: moe.map_or(0, |m| m.intermediate_size),
        vocab: config.vocab_size,
        ranks: 1,
        exchanged_rows: 0,
        table_words,
    };
    let activations = activations.bytes();
    Options { ordinal: 0, dtype: DType::BF16, activations, cache: KernelCache::user(), heads: None }
}

/// Uniform numbers whose products keep the size of their input.
fn random_weights(
    config: &ModelConfig,
    plan: &ShardPlan,
    backend: &mut CudaBackend,
) -> Result<Weights<CudaBackend>, Failure> {
    let (h, mut seed) = (config.hidden_size, 0);
    let mut random = |dims: &[usize]| -> Result<Weight, Failure> {
        seed += 1;
        let inner = dims[dims.len() - 1] as f32;
        Ok(backend.random_weight(dims, seed, if dims.len() == 1 { 1.0 } else { (3.0 / inner).sqrt() })?)
    };
    let heads = plan.query_heads.len() * config.head_dim;
    let qkv = heads + 2 * plan.kv_heads.len() * config.head_dim;
    let mut layers = Vec::new();
    for layer in &config.layers {
        let (norm, qkv, o) = (random(&[h])?, random(&[qkv, h])?, random(&[h, heads])?);
        let mlp = match (layer.mlp, &config.moe) {
            (Mlp::Sparse, Some(moe)) => {
                let (e, i) = (moe.experts, moe.intermediate_size);
                MlpWeights::Sparse {
                    router: random(&[e, h])?,
                    gate_up: random(&[e, 2 * i, h])?,
                    down: random(&[e, h, i])?,
                    shared: None,
                }
            }
            _ => {
                let i = config.dense_intermediate_size.ok_or("a dense layer has a width")?;
                MlpWeights::Dense(GatedMlp { gate_up: random(&[2 * i, h])?, down: random(&[h, i])? })
            }
        };
        layers.push(LayerWeights { norm, qkv, o, mlp });
    }
    Ok(Weights { embed: random(&[config.vocab_size, h])?, head: None, final_norm: random(&[h])?, layers })
}

struct Run {
    model: CudaModel,
    /// Blocks of one sequence.
    blocks: usize,
}

impl Run {
    /// Runs (sequence, start, tokens) parts up to each sequence's choice of the next token.
    fn step(&mut self, parts: &[(usize, usize, usize)]) -> Result<(), Failure> {
        let mut batch = Batch::default();
        for &(sequence, start, count) in parts {
            let rows = batch.tokens.len()..batch.tokens.len() + count;
            batch.tokens.extend(
                (start..start + count).map(|i| TokenId((i as u32 * 7919 + sequence as u32) % 262_144)),
            );
            let used = (start + count).div_ceil(BLOCK as usize);
            let table = || BlockTable {
                first: 0,
                blocks: (0..used).map(|b| BlockId((sequence * self.blocks + b) as u32)).collect(),
            };
            batch.logit_rows.push(rows.end as u32 - 1);
            let start = Position(u32::try_from(start)?);
            batch.sequences.push(BatchSequence { rows, start, tables: [table(), table()] });
        }
        let chosen = self.model.most_likely(&batch)?;
        if chosen.iter().any(Option::is_none) {
            return Err("a logit is not a number".into());
        }
        Ok(())
    }

    fn prefill(&mut self, prompts: usize, context: usize, chunk: usize) -> Result<(), Failure> {
        let mut times = Vec::new();
        for sequence in 0..prompts {
            let started = Instant::now();
            for start in (0..context).step_by(chunk) {
                self.step(&[(sequence, start, chunk.min(context - start))])?;
            }
            times.push(started.elapsed().as_secs_f64());
        }
        // The first prompt also warms up.
        times.sort_by(f64::total_cmp);
        let time = times[times.len() / 2];
        println!(
            "prefill     {:.0} tok/s: a prompt of {context} in chunks of {chunk} in {:.1} ms (median of {prompts})",
            context as f64 / time,
            time * 1e3
        );
        Ok(())
    }

    fn decode(
        &mut self,
        config: &ModelConfig,
        plan: &ShardPlan,
        (batch, context): (usize, usize),
        bandwidth: f64,
    ) -> Result<(), Failure> {
        let (mut times, mut idle) = (Vec::new(), Vec::new());
        for step in 0..WARM_UP + STEPS {
            let parts: Vec<_> = (0..batch).map(|s| (s, context + step, 1)).collect();
            let started = Instant::now();
            self.step(&parts)?;
            if step >= WARM_UP {
                times.push(started.elapsed().as_secs_f64());
                idle.extend(self.model.backend().idle().map(|idle| idle.as_secs_f64()));
            }
        }
        times.sort_by(f64::total_cmp);
        idle.sort_by(f64::total_cmp);
        let (time, idle) = (times[STEPS / 2], idle.get(idle.len() / 2).copied().unwrap_or(f64::NAN));
        let bytes = step_bytes(config, plan, batch, context);
        let floor = bytes / bandwidth;
        println!(
            "decode      batch {batch}, context {context}: {:.0} tok/s, {:.2} ms a step (median of {STEPS}); floor {:.2} ms \
             ({:.2} GB): {:.0} %; card idle {:.0} us between steps",
            batch as f64 / time,
            time * 1e3,
            floor * 1e3,
            bytes / 1e9,
            100.0 * floor / time,
            idle * 1e6
        );
        Ok(())
    }
}

/// What a step must read: all weights but the experts that uniform routing leaves out, and the visible keys and values.
fn step_bytes(config: &ModelConfig, plan: &ShardPlan, batch: usize, context: usize) -> f64 {
    let bytes = WeightBytes::new(config, plan, DType::BF16);
    let untouched = config.moe.as_ref().map_or(1.0, |moe| {
        (1.0 - moe.routing.top_k as f64 / moe.experts as f64).powi(i32::try_from(batch).unwrap_or(i32::MAX))
    });
    let seen = |group: KvGroup| match group {
        KvGroup::Full => context as f64,
        KvGroup::Sliding => context.min(config.window_keys as usize) as f64,
    };
    let kv: f64 = KvGroup::ALL
        .iter()
        .map(|&group| kv_bytes_per_token(config, plan, DType::BF16, group).0 as f64 * seen(group))
        .sum();
    bytes.total().0 as f64 - bytes.experts.0 as f64 * untouched + batch as f64 * kv
}
