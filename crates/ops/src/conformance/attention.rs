//! Paged attention: several sequences in one batch, prompts and single tokens, blocks scattered over the pool.

use types::{BlockId, BlockSize, Position, TokenId};

use super::{Bench, reference as r};
use crate::{Backend, Batch, BatchSequence, BlockTable, Error, KvGroup, KvLayerSpec, Rope, Window};

struct Case {
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    block_tokens: u32,
    window: Window,
    rope: Option<Rope>,
    /// Tokens each sequence brings in each step.
    steps: &'static [&'static [usize]],
}

const CHUNKS: &[&[usize]] = &[&[5, 1, 9], &[1, 7, 1], &[3, 0, 1], &[1, 1, 1]];
const PROMPTS: &[&[usize]] = &[&[21, 2], &[1, 1]];
const THETA: f32 = 10_000.0;

pub(super) fn cases<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    let rope = Some(Rope { theta: THETA });
    let heads = [(4, 4, 16), (8, 2, 32), (6, 1, 8)];
    for (query_heads, kv_heads, head_dim) in heads {
        for window in [Window::All, Window::Keys(1), Window::Keys(7), Window::Keys(8)] {
            for (rope, steps) in [(rope, CHUNKS), (None, CHUNKS), (rope, PROMPTS)] {
                for block_tokens in [1, 4, 16] {
                    let case = Case { query_heads, kv_heads, head_dim, block_tokens, window, rope, steps };
                    run(bench, &case)?;
                }
            }
        }
    }
    Ok(())
}

/// One sequence's keys and values so far, in f64, by head.
#[derive(Clone)]
struct History {
    keys: Vec<Vec<Vec<f64>>>,
    values: Vec<Vec<Vec<f64>>>,
}

fn run<B: Backend>(bench: &mut Bench<B>, case: &Case) -> Result<(), Error> {
    let sequences = case.steps[0].len();
    let total = |s: usize| case.steps.iter().map(|step| step[s]).sum::<usize>();
    let blocks_of = |s: usize| total(s).div_ceil(case.block_tokens as usize);
    let pool: usize = (0..sequences).map(blocks_of).sum::<usize>() + 3;
    let mut free = bench.random.shuffled(pool);
    let tables: Vec<Vec<BlockId>> = (0..sequences)
        .map(|s| free.split_off(free.len() - blocks_of(s)).into_iter().map(|b| BlockId(b as u32)).collect())
        .collect();
    let spec = KvLayerSpec {
        group: KvGroup::Sliding,
        blocks: pool,
        block_size: BlockSize::new(case.block_tokens).map_err(|e| invalid(&e.to_string()))?,
        kv_heads: case.kv_heads,
        query_heads: case.query_heads,
        head_dim: case.head_dim,
    };
    let mut kv = bench.backend.kv_layer(&spec)?;
    let empty = History { keys: vec![vec![]; case.kv_heads], values: vec![vec![]; case.kv_heads] };
    let mut histories = vec![empty; sequences];
    for step in case.steps {
        let batch = batch(case, step, &histories, &tables);
        let width = (case.query_heads + 2 * case.kv_heads) * case.head_dim;
        let qkv = bench.values(batch.tokens.len() * width);
        let device = bench.rows_of(&batch, width, &qkv)?;
        let out = bench.backend.attention(&device, &mut kv, case.rope, case.window)?;
        let expected = expected(case, &batch, &r::wide(&qkv), step, &mut histories);
        let name = format!(
            "attention {}/{} heads of {}, {:?}, rope {}, blocks of {}, step {step:?}",
            case.query_heads,
            case.kv_heads,
            case.head_dim,
            case.window,
            case.rope.is_some(),
            case.block_tokens
        );
        bench.compare(&name, &out, &expected)?;
    }
    Ok(())
}

fn invalid(reason: &str) -> Error {
    Error::Shape { op: "conformance", detail: reason.to_owned() }
}

/// Sequences with tokens in this step. Blocks wholly before the window are left out of the sliding table.
fn batch(case: &Case, step: &[usize], histories: &[History], tables: &[Vec<BlockId>]) -> Batch {
    let mut batch = Batch::default();
    for (s, &count) in step.iter().enumerate().filter(|&(_, &count)| count > 0) {
        let start = histories[s].keys[0].len() as u32;
        let rows = batch.tokens.len()..batch.tokens.len() + count;
        batch.tokens.extend(std::iter::repeat_n(TokenId(0), count));
        let first_needed = match case.window {
            Window::All => 0,
            Window::Keys(n) => (start + 1).saturating_sub(n) / case.block_tokens,
        };
        let sliding = BlockTable { first: first_needed, blocks: tables[s][first_needed as usize..].to_vec() };
        batch.sequences.push(BatchSequence {
            rows,
            start: Position(start),
            tables: [BlockTable::default(), sliding],
        });
    }
    batch
}

fn expected(case: &Case, batch: &Batch, qkv: &[f64], step: &[usize], histories: &mut [History]) -> Vec<f64> {
    let (d, width) = (case.head_dim, (case.query_heads + 2 * case.kv_heads) * case.head_dim);
    let mut out = Vec::new();
    let owners = step.iter().enumerate().filter(|&(_, &count)| count > 0).map(|(s, _)| s);
    for (owner, sequence) in owners.zip(&batch.sequences) {
        let history = &mut histories[owner];
        for (i, row) in sequence.rows.clone().enumerate() {
            let position = sequence.start.0 + i as u32;
            let mut heads: Vec<Vec<f64>> =
                qkv[row * width..(row + 1) * width].chunks(d).map(<[f64]>::to_vec).collect();
            if let Some(rope) = case.rope {
                let turned = case.query_heads + case.kv_heads;
                heads[..turned].iter_mut().for_each(|h| r::rope(h, position, f64::from(rope.theta)));
            }
            for head in 0..case.kv_heads {
                history.keys[head].push(heads[case.query_heads + head].clone());
                history.values[head].push(heads[case.query_heads + case.kv_heads + head].clone());
            }
            for (q, head) in heads[..case.query_heads].iter().enumerate() {
                let shared = q / (case.query_heads / case.kv_heads);
                out.extend(r::attend(head, &history.keys[shared], &history.values[shared], case.window));
            }
        }
    }
    out
}
