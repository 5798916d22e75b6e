//! Sizes beyond the conformance suite, against the CPU: many rows through the tensor cores, experts grouped by tile,
//! long contexts in ranges, many sequences at once.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

mod support;

use ops::conformance::Random;
use ops::sample::{Ask, Choice};
use ops::{
    Backend, Batch, BatchSequence, BlockTable, Error, HostTensor, KvGroup, KvLayerSpec, Norm, Rope, Routing,
    Scoring, Window,
};
use ops_cpu::CpuBackend;
use support::{backend, skipped};
use types::{BlockId, BlockSize, DType, Position, TokenId};

const SEED: u64 = 20_261_123;

/// An op's result by name.
type Results = Vec<(String, Vec<f32>)>;

fn values(random: &mut Random, count: usize, scale: f32) -> Vec<f32> {
    (0..count).map(|_| half::bf16::from_f32(random.normal() * scale).to_f32()).collect()
}

fn host(shape: &[usize], data: Vec<f32>) -> HostTensor {
    HostTensor::F32 { shape: shape.to_vec(), data }
}

/// `rows` rows of one sequence, whose table is never read.
fn rows_of<B: Backend>(b: &mut B, width: usize, data: Vec<f32>) -> Result<B::Tensor, Error> {
    let rows = data.len() / width;
    let tables = [BlockTable::default(), BlockTable::default()];
    let sequences = vec![BatchSequence { rows: 0..rows, start: Position(0), tables }];
    embedded(b, Batch { sequences, ..Batch::default() }, width, data)
}

fn embedded<B: Backend>(b: &mut B, batch: Batch, width: usize, data: Vec<f32>) -> Result<B::Tensor, Error> {
    let rows = data.len() / width;
    let table = b.weight(host(&[rows, width], data))?;
    b.begin_step(&Batch { tokens: (0..rows as u32).map(TokenId).collect(), ..batch })?;
    let x = b.embed(&table, TokenId(0))?;
    b.round(x)
}

/// As [`rows_of`], in fp32 as a partial sum.
fn partial<B: Backend>(b: &mut B, width: usize, data: Vec<f32>) -> Result<B::Tensor, Error> {
    let table = b.weight(host(&[data.len() / width, width], data))?;
    b.embed(&table, TokenId(0))
}

fn products<B: Backend>(b: &mut B, results: &mut Results) -> Result<(), Error> {
    let mut random = Random::new(SEED);
    for (rows, inner, outs) in [
        (1, 2048, 515),
        (2, 2048, 515),
        (8, 4096, 64),
        (16, 768, 200),
        (30, 2048, 72),
        (64, 328, 520),
        (65, 320, 130),
        (100, 1024, 260),
        (200, 4096, 512),
        (600, 328, 257),
        (1100, 200, 4008),
    ] {
        let x = values(&mut random, rows * inner, 1.0);
        let w = values(&mut random, outs * inner, 1.0 / (inner as f32).sqrt());
        let (x, w) = (rows_of(b, inner, x)?, b.weight(host(&[outs, inner], w))?);
        let y = b.linear(&x, &w)?;
        results.push((format!("linear {rows}x{inner} to {outs}"), b.read(&y)?));
        let y = b.linear_partial(&x, &w)?;
        results.push((format!("linear_partial {rows}x{inner} to {outs}"), b.read(&y)?));
    }
    Ok(())
}

fn norms<B: Backend>(b: &mut B, results: &mut Results) -> Result<(), Error> {
    let mut random = Random::new(SEED + 1);
    for norm in [Norm::Rms { eps: 1e-6 }, Norm::Layer { eps: 1e-5 }] {
        let x = values(&mut random, 3 * 4096, 3.0);
        let w = values(&mut random, 4096, 1.0);
        let (x, w) = (rows_of(b, 4096, x)?, b.weight(host(&[4096], w))?);
        let y = b.norm(&x, &w, norm)?;
        results.push((format!("{norm:?} of 4096"), b.read(&y)?));
    }
    Ok(())
}

fn experts<B: Backend>(b: &mut B, results: &mut Results) -> Result<(), Error> {
    let (hidden, inter, count) = (128, 96, 32);
    let mut random = Random::new(SEED + 2);
    let gate_up = values(&mut random, count * 2 * inter * hidden, 0.08);
    let down = values(&mut random, count * hidden * inter, 0.1);
    let gate_up = b.experts(host(&[count, 2 * inter, hidden], gate_up))?;
    let down = b.experts(host(&[count, hidden, inter], down))?;
    for (rows, top_k) in
        [(1, 8), (2, 8), (8, 8), (9, 8), (30, 8), (70, 8), (200, 8), (256, 8), (257, 2), (300, 8), (64, 1)]
    {
        // Distinct logits: on a tie of rounded values both choices would be right.
        let logits: Vec<f32> =
            (0..rows).flat_map(|_| random.shuffled(count)).map(|rank| rank as f32 / 8.0 - 2.0).collect();
        let x = values(&mut random, rows * hidden, 1.0);
        let logits = rows_of(b, count, logits)?;
        let routed = b.route(&logits, Routing { top_k, scoring: Scoring::Sigmoid { renormalize: true } })?;
        let x = rows_of(b, hidden, x)?;
        let y = b.routed_experts(&x, &routed, &gate_up, &down, 0)?;
        results.push((format!("{top_k} experts of {rows} rows"), b.read(&y)?));
    }
    Ok(())
}

/// The fused ops: the residual stream with its norm, the router, the most likely token.
fn choices<B: Backend>(b: &mut B, results: &mut Results) -> Result<(), Error> {
    let (hidden, count, vocab) = (2048, 128, 5000);
    let mut random = Random::new(SEED + 4);
    for rows in [1, 5, 12] {
        let x = values(&mut random, rows * hidden, 1.0);
        let (sum, more) = (values(&mut random, rows * hidden, 1.0), values(&mut random, rows * hidden, 1.0));
        let w = values(&mut random, hidden, 1.0);
        let w = b.weight(host(&[hidden], w))?;
        let x = rows_of(b, hidden, x)?;
        let (sum, more) = (partial(b, hidden, sum)?, partial(b, hidden, more)?);
        let norm = Norm::Rms { eps: 1e-6 };
        let (x, n) = b.residual_norm(x, (sum, Some((&more, 0.5))), (&w, norm))?;
        results.push((format!("residual of {rows} rows"), b.read(&x)?));
        results.push((format!("norm of {rows} rows"), b.read(&n)?));
        let router = values(&mut random, count * hidden, 0.02);
        let router = b.weight(host(&[count, hidden], router))?;
        let gate_up = values(&mut random, count * 16 * hidden, 0.02);
        let down = values(&mut random, count * hidden * 8, 0.3);
        let (gate_up, down) =
            (b.experts(host(&[count, 16, hidden], gate_up))?, b.experts(host(&[count, hidden, 8], down))?);
        let routed = b.router(&n, &router, Routing { top_k: 8, scoring: Scoring::Softmax })?;
        let y = b.routed_experts(&n, &routed, &gate_up, &down, 0)?;
        results.push((format!("routed in one launch, {rows} rows"), b.read(&y)?));
        let mut logits: Vec<f32> = (0..rows * vocab).map(|_| random.below(200) as f32 - 100.0).collect();
        if rows > 1 {
            logits[vocab + 77] = f32::NAN;
        }
        let logits = rows_of(b, vocab, logits)?;
        let drawing = b.draw(&logits, (vocab, 0.25), (0, &vec![Ask::GREEDY; rows]))?;
        let number = |choice| match choice {
            Choice::Token { token, .. } => token.0 as f32,
            Choice::Likelihood(_) | Choice::NotANumber | Choice::Left => -1.0,
        };
        results.push((
            format!("most likely of {rows} rows"),
            b.collect(drawing)?.into_iter().map(number).collect(),
        ));
    }
    Ok(())
}

/// Sequences of very different lengths decode together over scattered blocks; then one gets a long chunk.
fn attention<B: Backend>(b: &mut B, results: &mut Results) -> Result<(), Error> {
    let (query_heads, kv_heads, head_dim, block) = (16, 2, 128, 16_u32);
    let width = (query_heads + 2 * kv_heads) * head_dim;
    for window in [Window::All, Window::Keys(700)] {
        let mut random = Random::new(SEED + 3);
        let order = random.shuffled(200);
        let table = |sequence: usize| BlockTable {
            first: 0,
            blocks: (0..100).map(|i| BlockId(order[sequence * 100 + i] as u32)).collect(),
        };
        let spec = KvLayerSpec {
            group: KvGroup::Full,
            blocks: 200,
            block_size: BlockSize::new(block).unwrap(),
            kv_heads,
            query_heads,
            head_dim,
        };
        let mut kv = b.kv_layer(&spec)?;
        let mut lengths = [0_u32; 2];
        for counts in [[1100, 3], [1, 1], [200, 1], [1, 900], [1, 1], [17, 40]] {
            let mut batch = Batch::default();
            let mut next = 0;
            for (s, &count) in counts.iter().enumerate() {
                let tables = [table(s), BlockTable::default()];
                batch.sequences.push(BatchSequence {
                    rows: next..next + count,
                    start: Position(lengths[s]),
                    tables,
                });
                next += count;
                lengths[s] += count as u32;
            }
            let qkv = values(&mut random, next * width, 1.0);
            let qkv = embedded(b, batch, width, qkv)?;
            let y = b.attention(&qkv, &mut kv, Some(Rope { theta: 50_000.0 }), window)?;
            results.push((format!("attention {window:?} {counts:?}"), b.read(&y)?));
        }
    }
    Ok(())
}

fn all<B: Backend>(mut backend: B) -> Results {
    let b = &mut backend;
    let mut results = Results::new();
    products(b, &mut results).unwrap();
    norms(b, &mut results).unwrap();
    experts(b, &mut results).unwrap();
    attention(b, &mut results).unwrap();
    choices(b, &mut results).unwrap();
    results
}

/// ‖a − b‖ / ‖b‖, and the largest single difference.
fn compare(dtype: DType, relative: f64) {
    if skipped() {
        return;
    }
    let (ours, theirs) = (all(backend(dtype).unwrap()), all(CpuBackend::new(dtype, 8).unwrap()));
    let mut wrong = Vec::new();
    for ((name, ours), (_, theirs)) in ours.iter().zip(&theirs) {
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let square = |v: f64| v * v;
        let off: f64 = ours.iter().zip(theirs).map(|(a, b)| square(f64::from(a - b))).sum();
        let size: f64 = theirs.iter().map(|&b| square(f64::from(b))).sum();
        let error = (off / size).sqrt();
        println!("{dtype} {name}: {error:.2e}");
        // Not a number is not small.
        if error.is_nan() || error > relative {
            wrong.push(format!("{name}: {error:.2e}"));
        }
    }
    assert!(wrong.is_empty(), "seed {SEED}, {dtype}: {wrong:#?}");
}

#[test]
fn f32_agrees_with_the_cpu_at_sizes_of_real_models() {
    compare(DType::F32, 1e-5);
}

#[test]
fn bf16_agrees_with_the_cpu_at_sizes_of_real_models() {
    compare(DType::BF16, 5e-3);
}
