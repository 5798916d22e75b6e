//! Time of an engine step in steady decode, by running sequences, by their length and after many others; of a prefix
//! look-up; and the size of a plan.
//!
//! `cargo bench -p engine --bench step`. Each figure is the median and the slowest of many repetitions, in µs.

use std::collections::VecDeque;
use std::io::Write;
use std::time::{Duration, Instant};

use engine::kv::{Cursor, Kv, Root, Tables};
use engine::{Config, Effect, Engine, Event, Request, RequestOptions, RowOutput, Step, StepOutput};
use types::{BlockSize, GenerationSpec, Micros, SeqId, TokenId};

const STEPS: usize = 1000;
const PROMPT: u32 = 64;

/// What is in the engine when its steps are timed.
struct Decode {
    /// Sequences that draw a token in each step.
    running: u32,
    /// Steps in flight: 2 when one is planned while another runs.
    depth: usize,
    /// Tokens of each prompt, about.
    prompt: u32,
    /// Requests that have ended before.
    finished: u32,
}

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for running in [256, 1024, 4096] {
        for (depth, when) in [(1, "between steps"), (2, "one step ahead")] {
            let (times, bytes) = steady_decode(&Decode { running, depth, prompt: PROMPT, finished: 0 });
            writeln!(out, "apply + plan {when}, {running} running: {}, plan {bytes} bytes", figures(times))?;
        }
    }
    for prompt in [1024, 8192, 65_536] {
        let (times, _) = steady_decode(&Decode { running: 64, depth: 2, prompt, finished: 0 });
        writeln!(out, "64 running behind {prompt} tokens each: {}", figures(times))?;
    }
    for finished in [0, 10_000, 1_000_000] {
        let (times, _) = steady_decode(&Decode { running: 256, depth: 2, prompt: PROMPT, finished });
        writeln!(out, "256 running after {finished} requests: {}", figures(times))?;
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
        waiting_tokens_max: 1 << 24,
    }
}

fn request(tag: u32, prompt: u32, max_tokens: u32) -> Request {
    let spec = GenerationSpec { max_tokens: Some(max_tokens), ..GenerationSpec::default() };
    let generation = spec.validate(0, 262_144).expect("a valid request");
    let token = |i: u32| TokenId(1000 + tag.wrapping_mul(977).wrapping_add(i * 31) % 200_000);
    // Different lengths, so that blocks do not all become full at once.
    let prompt = (0..prompt + tag % 16).map(token).collect();
    Request { prompt, generation, deadline: None, options: RequestOptions::default() }
}

fn drawn(step: &Step) -> Event {
    let rows = step.work.iter().map(|_| RowOutput::Sampled { token: TokenId(50_000), logprob: None });
    Event::StepDone(StepOutput { step: step.plan.step(), rows: rows.collect() })
}

/// Lets `count` short requests come and go; the first id that is free then.
fn come_and_go(engine: &mut Engine, count: u32, effects: &mut Vec<Effect>) -> u64 {
    let (mut step, mut next) = (Step::default(), 0);
    while next < count || !engine.is_idle() {
        while next < count && engine.load().waiting < 64 {
            engine.apply(
                Event::Submit { seq: SeqId(next.into()), request: request(next, PROMPT, 2) },
                Micros(0),
                effects,
            );
            next += 1;
        }
        engine.plan_into(Micros(0), &mut step, effects);
        engine.apply(drawn(&step), Micros(0), effects);
        effects.clear();
    }
    next.into()
}

/// Times of `apply` and `plan` together in steps in which every sequence draws a token, and the median plan's bytes.
fn steady_decode(decode: &Decode) -> (Vec<Duration>, usize) {
    let &Decode { running, depth, prompt, finished } = decode;
    let blocks = running * (prompt + 1200).div_ceil(16) * 2;
    let mut engine = Engine::new(config(running, 16, [blocks, blocks])).expect("a configuration");
    let (mut effects, mut encoded) = (Vec::new(), Vec::new());
    let mut steps: VecDeque<Step> = (0..depth).map(|_| Step::default()).collect();
    let first = come_and_go(&mut engine, finished, &mut effects);
    for seq in 0..running {
        let request = request(finished + seq, prompt, 1150);
        engine.apply(Event::Submit { seq: SeqId(first + u64::from(seq)), request }, Micros(0), &mut effects);
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
        let answer = drawn(step);
        let begin = Instant::now();
        steps.rotate_left(1);
        let step = steps.back_mut().expect("at least one");
        engine.apply(answer, Micros(now), &mut effects);
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
