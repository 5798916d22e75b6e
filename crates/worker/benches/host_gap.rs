//! Time an executor sits idle between two steps: the engine's thread plans ahead while steps of 2 ms run.
//!
//! `cargo bench -p worker --bench host_gap`

use std::io::Write;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use engine::{Config, Engine, Event, Request, RequestOptions, RowOutput, Step};
use types::{BlockSize, GenerationSpec, Micros, SeqId, TokenId};
use worker::{GapSummary, Pipeline};

const STEP: Duration = Duration::from_millis(2);
const TOKENS: u32 = 500;

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for running in [1, 64, 256] {
        let GapSummary { steps, p50_us, p99_us } = gaps(running);
        writeln!(out, "{running} running: {steps} steps of 2 ms, host gap p50 {p50_us} µs, p99 {p99_us} µs")?;
    }
    Ok(())
}

fn config(running: u32) -> Config {
    Config {
        block_size: BlockSize::new(16).expect("a block size"),
        blocks: [running * 64, running * 64],
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

/// Sleeps, as a host does while a device computes, then gives each row a token.
fn execute(step: &Step) -> Result<Vec<RowOutput>, std::convert::Infallible> {
    thread::sleep(STEP);
    Ok(step.work.iter().map(|_| RowOutput::Sampled { token: TokenId(50_000), logprob: None }).collect())
}

fn gaps(running: u32) -> GapSummary {
    let (mut pipeline, steps) = Pipeline::new(Engine::new(config(running)).expect("a configuration"));
    let clock = Instant::now();
    let now = || Micros::from(clock.elapsed());
    let mut effects = Vec::new();
    for seq in 0..running {
        let spec = GenerationSpec { max_tokens: Some(TOKENS), ..GenerationSpec::default() };
        let generation = spec.validate(0, 262_144).expect("a valid request");
        let prompt = (0..64).map(|i| TokenId(1000 + seq * 64 + i)).collect();
        let request = Request { prompt, generation, deadline: None, options: RequestOptions::default() };
        pipeline.apply(Event::Submit { seq: SeqId(seq.into()), request }, now(), &mut effects);
    }
    let (done, ran) = channel();
    thread::scope(|scope| {
        scope.spawn(move || steps.run(execute, |job| _ = done.send(job)));
        loop {
            effects.clear();
            let Ok(()) = pipeline.advance(now(), &mut effects, |_, _| Ok::<_, std::convert::Infallible>(()));
            if pipeline.engine().steps_in_flight() == 0 {
                break;
            }
            let Ok(job) = ran.recv() else { break };
            pipeline.answer(job, now(), &mut effects);
        }
        let summary = pipeline.gaps().summary();
        drop(pipeline);
        summary
    })
}
