//! The next step is planned and sent while one runs, shown by what must happen before what, without a clock.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::convert::Infallible;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use engine::{Config, Effect, Engine, Event, Request, RequestOptions, RowOutput, Step};
use types::{BlockSize, GenerationSpec, Micros, SeqId, TokenId};
use worker::{Job, Pipeline, Steps};

fn config() -> Config {
    Config {
        block_size: BlockSize::new(4).unwrap(),
        blocks: [64, 64],
        window_keys: 8,
        context_tokens_max: 64,
        vocab_size: 1000,
        eos_token_ids: vec![TokenId(7)],
        step_tokens_max: 16,
        logit_rows_max: 16,
        running_max: 4,
        data_parallel: 1,
        waiting_requests_max: 8,
        waiting_tokens_max: 256,
    }
}

fn submit(seq: u64, max_tokens: u32) -> Event {
    let spec = GenerationSpec { max_tokens: Some(max_tokens), ..GenerationSpec::default() };
    let request = Request {
        prompt: vec![TokenId(5)],
        generation: spec.validate(0, 1000).unwrap(),
        deadline: None,
        options: RequestOptions::default(),
    };
    Event::Submit { seq: SeqId(seq), request }
}

/// An executor that says when it begins a step, and ends it when it is told with which token.
struct Controlled {
    began: Receiver<u64>,
    token: Sender<u32>,
    ran: Receiver<Box<Job>>,
}

impl Controlled {
    fn start(scope: &'static str, steps: Steps) -> Self {
        let (begin, began) = channel();
        let (token, tokens) = channel::<u32>();
        let (done, ran) = channel();
        let execute = move |step: &Step| {
            begin.send(step.plan.step()).unwrap();
            let token = TokenId(tokens.recv().unwrap());
            Ok::<_, Infallible>(
                step.work.iter().map(|_| RowOutput::Sampled { token, logprob: None }).collect(),
            )
        };
        let spawned = thread::Builder::new()
            .name(scope.into())
            .spawn(|| steps.run(execute, move |job| done.send(job).unwrap()));
        spawned.unwrap();
        Self { began, token, ran }
    }
}

#[test]
fn the_next_step_is_planned_and_sent_while_one_runs() {
    let (mut pipeline, steps) = Pipeline::new(Engine::new(config()).unwrap());
    let executor = Controlled::start("controlled", steps);
    let (mut effects, mut sent) = (Vec::new(), Vec::new());
    pipeline.apply(submit(1, 4), Micros(0), &mut effects);
    let Ok(()) = pipeline.advance(Micros(0), &mut effects, |step, _| {
        sent.push(step.plan.step());
        Ok::<_, Infallible>(())
    });
    assert_eq!(executor.began.recv(), Ok(1));
    assert_eq!(sent, [1, 2], "the second was sent, and the first cannot have ended: nobody let it");
    executor.token.send(50).unwrap();
    pipeline.answer(executor.ran.recv().unwrap(), Micros(1), &mut effects);
    assert_eq!(executor.began.recv(), Ok(2), "it needed nothing from the engine to go on");
    let tokens = effects.iter().filter(|effect| matches!(effect, Effect::Token { .. })).count();
    assert_eq!(tokens, 1);
}

#[test]
fn a_rest_is_not_counted_as_a_gap() {
    let (mut pipeline, steps) = Pipeline::new(Engine::new(config()).unwrap());
    let executor = Controlled::start("controlled", steps);
    let mut effects = Vec::new();
    for seq in 1..4 {
        pipeline.apply(submit(seq, 2), Micros(0), &mut effects);
        loop {
            let Ok(()) = pipeline.advance(Micros(0), &mut effects, |_, _| Ok::<_, Infallible>(()));
            if pipeline.engine().steps_in_flight() == 0 {
                break;
            }
            executor.token.send(50).unwrap();
            pipeline.answer(executor.ran.recv().unwrap(), Micros(1), &mut effects);
        }
    }
    assert_eq!(pipeline.gaps().summary().steps, 3, "three requests of two steps, each with one gap");
}
