//! Paged attention, for prompts and single tokens alike: every row reads its keys through the block table, scores
//! and probabilities stay in fp32.
//!
//! Cost of a row at position p with n visible keys: 2·Q·n·D multiply-adds, 2·K·n·D cache elements read.

use std::ops::Range;

use ops::{BatchSequence, Error, KvLayerSpec, Rope, Window};

use crate::element::{Element, round_all_bf16};
use crate::kv::{KvLayer, Planes, Store, block_offset};
use crate::lanes::{Kernel, LANES, Lanes, Loadable, dispatch, eight};
use crate::math::exp;
use crate::matmul::dot;
use crate::rope::RopeTable;
use crate::tensor::Tensor;
use crate::threads::Threads;

/// What attention needs to know of the running step.
pub(crate) struct Step<'a> {
    pub(crate) threads: &'a Threads,
    pub(crate) sequences: &'a [BatchSequence],
    /// [T] index into `sequences`.
    pub(crate) sequence_of_row: &'a [usize],
    /// [T]
    pub(crate) positions: &'a [u32],
    pub(crate) turns: &'a RopeTable,
    pub(crate) rounds: bool,
}

/// Splits and turns `qkv`, appends to the cache, attends: [T, Q·D].
pub(crate) fn attention(
    step: &Step<'_>,
    qkv: &Tensor,
    kv: &mut KvLayer,
    rope: Option<Rope>,
    window: Window,
) -> Result<Tensor, Error> {
    let spec = *kv.spec();
    qkv.expect_width("attention", (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim)?;
    check_tables(step, &spec, window)?;
    let turns = rope.map(|_| step.turns);
    let query = match &mut kv.store {
        Store::F32(planes) => append(step, qkv, planes, &spec, turns),
        Store::BF16(planes) => append(step, qkv, planes, &spec, turns),
    };
    let mut out = Tensor::zeros(qkv.rows(), spec.query_heads * spec.head_dim);
    match &kv.store {
        Store::F32(planes) => attend(step, &query, planes, &spec, window, &mut out),
        Store::BF16(planes) => attend(step, &query, planes, &spec, window, &mut out),
    }
    if step.rounds {
        round_all_bf16(out.as_mut_slice());
    }
    Ok(out)
}

/// Positions a row may attend to.
fn visible(position: u32, window: Window) -> Range<u32> {
    let end = position + 1;
    match window {
        Window::All => 0..end,
        Window::Keys(keys) => end.saturating_sub(keys)..end,
    }
}

/// A table that misses a block would read another sequence's keys; that is refused before anything is written.
fn check_tables(step: &Step<'_>, spec: &KvLayerSpec, window: Window) -> Result<(), Error> {
    let block = spec.block_size.tokens();
    for sequence in step.sequences {
        let table = &sequence.tables[spec.group.index()];
        let first_needed = visible(sequence.start.0, window).start / block;
        let last_needed = (sequence.start.0 + sequence.rows.len() as u32 - 1) / block;
        let covered = u64::from(table.first) + table.blocks.len() as u64;
        let in_pool = table.blocks.iter().all(|b| (b.0 as usize) < spec.blocks);
        if first_needed < table.first || u64::from(last_needed) >= covered || !in_pool {
            let detail = format!(
                "blocks {first_needed}..={last_needed} are needed, the table has {}..{covered} of a pool of {}",
                table.first, spec.blocks
            );
            return Err(Error::Shape { op: "attention", detail });
        }
    }
    Ok(())
}

/// Writes this step's keys and values, and returns the turned queries [T, Q·D].
fn append<E: Element>(
    step: &Step<'_>,
    qkv: &Tensor,
    planes: &mut Planes<E>,
    spec: &KvLayerSpec,
    turns: Option<&RopeTable>,
) -> Tensor {
    let (d, block_tokens) = (spec.head_dim, spec.block_size.tokens());
    let (q_width, kv_width) = (spec.query_heads * d, spec.kv_heads * d);
    let mut query = Tensor::zeros(qkv.rows(), q_width);
    let mut key = vec![0.0; kv_width];
    for row in 0..qkv.rows() {
        let (q, rest) = qkv.row(row).split_at(q_width);
        let (k, v) = rest.split_at(kv_width);
        let q_out = &mut query.as_mut_slice()[row * q_width..(row + 1) * q_width];
        q_out.copy_from_slice(q);
        key.copy_from_slice(k);
        if let Some(turns) = turns {
            q_out.chunks_exact_mut(d).for_each(|head| turns.turn(row, head));
            key.chunks_exact_mut(d).for_each(|head| turns.turn(row, head));
            if step.rounds {
                round_all_bf16(q_out);
            }
        }
        let position = step.positions[row];
        let table = &step.sequences[step.sequence_of_row[row]].tables[spec.group.index()];
        let block = table.blocks[(position / block_tokens - table.first) as usize].0 as usize;
        for head in 0..spec.kv_heads {
            let at = block_offset(spec, block, head) + (position % block_tokens) as usize * d;
            let part = head * d..(head + 1) * d;
            narrow_into(&mut planes.keys[at..at + d], &key[part.clone()]);
            narrow_into(&mut planes.values[at..at + d], &v[part]);
        }
    }
    query
}

fn narrow_into<E: Element>(stored: &mut [E], values: &[f32]) {
    for (stored, &value) in stored.iter_mut().zip(values) {
        *stored = E::narrow(value);
    }
}

fn attend<E: Loadable>(
    step: &Step<'_>,
    query: &Tensor,
    planes: &Planes<E>,
    spec: &KvLayerSpec,
    window: Window,
    out: &mut Tensor,
) {
    // One piece of work is one row and one KV head with the query heads that share it.
    let shared = spec.query_heads / spec.kv_heads * spec.head_dim;
    let keys: usize = step.positions.iter().map(|&p| visible(p, window).len()).sum();
    let work = 2 * keys * spec.query_heads * spec.head_dim;
    step.threads.split(out.as_mut_slice(), shared, work, |first, out| {
        let mut scores = Vec::new();
        for (i, out) in out.chunks_exact_mut(shared).enumerate() {
            let piece = first / shared + i;
            let (row, head) = (piece / spec.kv_heads, piece % spec.kv_heads);
            let position = step.positions[row];
            let sequence = &step.sequences[step.sequence_of_row[row]];
            let table = &sequence.tables[spec.group.index()];
            let cached = Cached { planes, spec, table, head, keys: visible(position, window) };
            let q = &query.row(row)[head * shared..(head + 1) * shared];
            dispatch(SharedHead { q, cached: &cached, scores: &mut scores, out });
        }
    });
}

/// The keys and values one row sees of one head.
struct Cached<'a, E> {
    planes: &'a Planes<E>,
    spec: &'a KvLayerSpec,
    table: &'a ops::BlockTable,
    head: usize,
    keys: Range<u32>,
}

impl<E: Element> Cached<'_, E> {
    /// Contiguous runs of visible keys: offset of the first element in the planes, number of keys.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let block_tokens = self.spec.block_size.tokens();
        let (first, end) = (self.keys.start, self.keys.end);
        (first / block_tokens..=(end - 1) / block_tokens).map(move |logical| {
            let from = first.max(logical * block_tokens);
            let to = end.min((logical + 1) * block_tokens);
            let block = self.table.blocks[(logical - self.table.first) as usize].0 as usize;
            let within = (from % block_tokens) as usize * self.spec.head_dim;
            (block_offset(self.spec, block, self.head) + within, (to - from) as usize)
        })
    }
}

/// The query heads of one row that share a key/value head.
struct SharedHead<'a, E> {
    q: &'a [f32],
    cached: &'a Cached<'a, E>,
    scores: &'a mut Vec<f32>,
    out: &'a mut [f32],
}

impl<E: Loadable> Kernel for SharedHead<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { q, cached, scores, out } = self;
        let d = cached.spec.head_dim;
        let scale = 1.0 / (d as f32).sqrt();
        scores.resize(cached.keys.len(), 0.0);
        for head in 0..q.len() / d {
            let q = &q[head * d..(head + 1) * d];
            let out = &mut out[head * d..(head + 1) * d];
            let mut next = 0;
            for (at, count) in cached.runs() {
                for key in 0..count {
                    let key = &cached.planes.keys[at + key * d..at + (key + 1) * d];
                    scores[next] = dot(lanes, q, key) * scale;
                    next += 1;
                }
            }
            let factor = 1.0 / exponentials(scores);
            weigh_values(lanes, cached, scores, out);
            for o in out {
                *o *= factor;
            }
        }
    }
}

/// Replaces scores by their exponentials relative to the largest, and returns the sum.
#[inline(always)]
fn exponentials(scores: &mut [f32]) -> f32 {
    let mut max = f32::NEG_INFINITY;
    for &score in scores.iter() {
        max = if score > max { score } else { max };
    }
    for score in scores.iter_mut() {
        *score = exp(*score - max);
    }
    let mut sum = 0.0;
    for &score in scores.iter() {
        sum += score;
    }
    sum
}

/// Σ weight · value over the visible keys, a few registers of the head at a time.
#[inline(always)]
fn weigh_values<L: Lanes, E: Loadable>(lanes: L, cached: &Cached<'_, E>, weights: &[f32], out: &mut [f32]) {
    /// Registers of one head kept while all values pass: 32 numbers.
    const TILE: usize = 4;
    let d = out.len();
    let mut first = 0;
    while first + TILE * LANES <= d {
        let mut sums = [lanes.zero(); TILE];
        let mut next = 0;
        for (at, count) in cached.runs() {
            for value in 0..count {
                let value = &cached.planes.values[at + value * d..at + (value + 1) * d];
                let weight = lanes.splat(weights[next]);
                next += 1;
                for t in 0..TILE {
                    sums[t] = lanes.mul_add(weight, eight(lanes, value, first + t * LANES), sums[t]);
                }
            }
        }
        for t in 0..TILE {
            out[first + t * LANES..first + (t + 1) * LANES].copy_from_slice(&lanes.store(sums[t]));
        }
        first += TILE * LANES;
    }
    let out = &mut out[first..];
    out.fill(0.0);
    let mut next = 0;
    for (at, count) in cached.runs() {
        for value in 0..count {
            let value = &cached.planes.values[at + value * d + first..at + (value + 1) * d];
            for i in 0..out.len() {
                out[i] = weights[next].mul_add(value[i].widen(), out[i]);
            }
            next += 1;
        }
    }
}
