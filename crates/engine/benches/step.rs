//! Time of an engine step in steady decode, of a prefix look-up, and the size of a plan.
//!
//! `cargo bench -p engine --bench step`. Each figure is the median and the slowest of many repetitions, in µs.

use std::collections::VecDeque;
use std::io::Write;
use std::time::{Duration, Instant};

use engine::kv::{Cursor, Kv, Root, Tables};
use engine::{Config, Engine, Event, Request, RequestOptions, RowOutput, Step, StepOutput};
use types::{BlockSize, GenerationSpec, Micros, SeqId, TokenId};

const STEPS: usize = 1000;
const PROMPT: u32 = 64;

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for running in [256, 1024, 4096] {
        for (depth, when) in [(1, "between steps"), (2, "one step ahead")] {
            let (times, bytes) = steady_decode(running, depth);
            writeln!(out, "apply + plan {when}, {running} running: {}, plan {bytes} bytes", figures(times))?;
        }
    }
    writeln!(out, "prefix look-up, 131,072 tokens in blocks of 16: {}", figures(look_up(16)))?;
    writeln!(out, "prefix look-up, 131,072 tokens in blocks of 64: {}", figures(look_up(64)))
}

fn figures(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    format!("median {:.1}, slowest {:.1}", micros(times[times.len() / 2]), micros(times[times.len() - 1]))
}

fn config(running: u32, block_tokens: u32, blocks: [u32; 2]) -> Config {
    Config {
        block_size: BlockSize::new(block_tokens).expect("a block size"),
        blocks,
        window_keys: 4096,
        context_tokens_max: 1 << 18,
        vocab_size: 262_144,
        eos_token_ids: vec![TokenId(7)],
        step_tokens_max: 1 << 16,
        logit_rows_max: running,
        running_max: running,
        data_parallel: 1,
        waiting_requests_max: running,
        waiting_tokens_max: 1 << 20,
    }
}

/// Times of `apply` and `plan` together in steps in which every sequence draws a token, with `depth` steps in flight
/// while they run, and the median plan's bytes.
fn steady_decode(running: u32, depth: usize) -> (Vec<Duration>, usize) {
    let blocks = running * (PROMPT + 1200).div_ceil(16) * 2;
    let mut engine = Engine::new(config(running, 16, [blocks, blocks])).expect("a configuration");
    let (mut effects, mut encoded) = (Vec::new(), Vec::new());
    let mut steps: VecDeque<Step> = (0..depth).map(|_| Step::default()).collect();
    for seq in 0..running {
        let spec = GenerationSpec { max_tokens: Some(1150), ..GenerationSpec::default() };
        let generation = spec.validate(0, 262_144).expect("a valid request");
        // Different lengths, so that blocks do not all become full at once.
        let prompt = (0..PROMPT + seq % 16).map(|i| TokenId(1000 + (seq * 977 + i * 31) % 200_000)).collect();
        let request = Request { prompt, generation, deadline: None, options: RequestOptions::default() };
        engine.apply(Event::Submit { seq: SeqId(seq.into()), request }, Micros(0), &mut effects);
    }
    let (mut times, mut sizes) = (Vec::new(), Vec::new());
    let mut now = 0;
    for step in &mut steps {
        engine.plan_into(Micros(now), step, &mut effects);
    }
    while times.len() < STEPS {
        effects.clear();
        now += 1;
        let step = &steps[0];
        let full = step.work.len() == running as usize;
        let rows =
            step.work.iter().map(|_| RowOutput::Sampled { token: TokenId(50_000), logprob: None }).collect();
        let output = StepOutput { step: step.plan.step(), rows };
        let begin = Instant::now();
        steps.rotate_left(1);
        let step = steps.back_mut().expect("at least one");
        engine.apply(Event::StepDone(output), Micros(now), &mut effects);
        engine.plan_into(Micros(now), step, &mut effects);
        let took = begin.elapsed();
        if full {
            times.push(took);
            encoded.clear();
            step.plan.encode(&mut encoded);
            sizes.push(encoded.len());
        }
    }
    sizes.sort_unstable();
    (times, sizes[sizes.len() / 2])
}

/// Times to find and lease the whole of a prompt that is known, and to give it back.
fn look_up(block_tokens: u32) -> Vec<Duration> {
    const TOKENS: u32 = 131_072;
    let blocks = TOKENS / block_tokens;
    let mut kv = Kv::new(&config(4, block_tokens, [blocks + 8, blocks + 8]));
    let tokens: Vec<TokenId> =
        (0..TOKENS).map(|i| TokenId(i.wrapping_mul(2_654_435_761) % 262_144)).collect();
    let mut tables = Tables::default();
    let mut cursor = Cursor::new(Root::Shared(None));
    kv.extend(&mut tables, TOKENS);
    for block in tokens.chunks(block_tokens as usize) {
        assert!(kv.publish(&mut tables, &mut cursor, block));
    }
    kv.release(&mut tables);
    kv.close(cursor);
    let one = |kv: &mut Kv| {
        let begin = Instant::now();
        let (mut tables, mut cursor) = (Tables::default(), Cursor::new(Root::Shared(None)));
        let found = kv.reuse(&mut tables, &mut cursor, &tokens, blocks - 1);
        kv.release(&mut tables);
        kv.close(cursor);
        let took = begin.elapsed();
        assert_eq!(found, blocks - 1, "all of it is known");
        took
    };
    (0..200).map(|_| one(&mut kv)).collect()
}
