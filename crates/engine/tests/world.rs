//! Random requests, cancels and deadlines on tiny pools: whatever happens around it, a request gets the tokens it
//! would get alone.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod support;

use std::collections::BTreeMap;

use engine::{Config, Effect, Engine, Event, Finish, Refusal, Request, RequestOptions, Step, TokenLogprob};
use support::random::Random;
use support::world::{Expected, FakeRank, oracle};
use support::{EOS, VOCAB};
use types::{BlockSize, GenerationSpec, Micros, Priority, SeqId, TokenId};

/// Seeds tried, and steps of arrivals in each.
const SEEDS: u64 = 400;
const STEPS: u32 = 300;

fn config(random: &mut Random) -> Config {
    let size = random.range(1, 5);
    let running_max = random.range(1, 6);
    let blocks = match random.range(0, 5) {
        0 => [random.range(4, 40), 0],
        1 => [0, random.range(4, 40)],
        _ => [random.range(4, 40), random.range(4, 40)],
    };
    let context_tokens_max = random.range(8, 48);
    Config {
        block_size: BlockSize::new(size).unwrap(),
        blocks,
        window_keys: random.range(1, 12),
        context_tokens_max,
        vocab_size: VOCAB,
        eos_token_ids: vec![EOS],
        step_tokens_max: running_max + random.range(0, 12),
        logit_rows_max: running_max + random.range(0, 6),
        running_max,
        waiting_requests_max: random.range(1, 8),
        waiting_tokens_max: context_tokens_max * random.range(1, 4),
    }
}

fn request(random: &mut Random, config: &Config, now: Micros) -> Request {
    let longest = if random.one_in(6) { config.context_tokens_max } else { 8 };
    let len = random.range(1, longest);
    let max_tokens = random.range(1, 24);
    let spec = GenerationSpec {
        max_tokens: Some(max_tokens),
        min_tokens: Some(random.range(0, max_tokens.min(6))),
        seed: Some(random.next()),
        stop_token_ids: if random.one_in(4) { vec![11, 12] } else { Vec::new() },
        ignore_eos: !random.one_in(3),
        logprobs: random.one_in(3).then_some(1),
        prompt_logprobs: random.one_in(3).then_some(1),
        ..GenerationSpec::default()
    };
    Request {
        prompt: (0..len).map(|_| TokenId(random.range(20, VOCAB - 1))).collect(),
        generation: spec.validate(0, VOCAB).unwrap(),
        deadline: random.one_in(5).then(|| now.after(Micros(random.range(1, 40).into()))),
        options: RequestOptions { priority: Priority::new(random.signed(3)).unwrap(), ..RequestOptions::default() },
    }
}

#[derive(Default)]
struct Seen {
    tokens: Vec<TokenId>,
    logprobs: Vec<TokenLogprob>,
    prompt_logprobs: Option<Vec<TokenLogprob>>,
    ended: bool,
}

/// One run: the engine, a rank, and what each request was and has had.
struct World {
    config: Config,
    engine: Engine,
    rank: FakeRank,
    random: Random,
    now: Micros,
    requests: BTreeMap<SeqId, (Request, Seen)>,
    effects: Vec<Effect>,
    step: Step,
    next: u64,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    finished: u32,
    ended_early: u32,
    refused: u32,
    preempted: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let config = config(&mut random);
        Self {
            engine: Engine::new(config.clone()).unwrap(),
            rank: FakeRank::new(&config),
            random,
            config,
            now: Micros(0),
            requests: BTreeMap::new(),
            effects: Vec::new(),
            step: Step::default(),
            next: 0,
            counts: Counts::default(),
        }
    }

    fn apply(&mut self, event: Event) {
        self.engine.apply(event, self.now, &mut self.effects);
        self.engine.check();
        self.digest();
    }

    /// Submits and cancels at random.
    fn disturb(&mut self) {
        if self.random.one_in(3) {
            self.next += 1;
            let seq = SeqId(self.next);
            let request = request(&mut self.random, &self.config, self.now);
            self.requests.insert(seq, (request.clone(), Seen::default()));
            self.apply(Event::Submit { seq, request });
        }
        if self.random.one_in(8) && self.next > 0 {
            let last = u32::try_from(self.next).unwrap();
            let seq = SeqId(self.random.range(last.saturating_sub(8).max(1), last).into());
            self.apply(Event::Cancel(seq));
        }
    }

    /// One step, with a disturbance while it runs; false when there was nothing to run.
    fn step(&mut self, disturb: bool) -> bool {
        let mut step = std::mem::take(&mut self.step);
        let planned = self.engine.plan_into(self.now, &mut step, &mut self.effects);
        self.engine.check();
        self.digest();
        assert_eq!(planned, !self.engine.is_idle(), "a step is planned exactly when there is work");
        if planned {
            assert!(
                step.plan.tokens().len() <= self.config.step_tokens_max as usize,
                "rows within the budget"
            );
            assert!(step.work.len() <= self.config.logit_rows_max as usize, "logit rows within the budget");
            let mut bytes = Vec::new();
            step.plan.encode(&mut bytes);
            let output = self.rank.execute(&step, &bytes);
            self.engine.check_mirror(&self.rank.tables);
            if disturb {
                self.disturb();
            }
            self.apply(Event::StepDone(output));
        }
        self.step = step;
        self.now = self.now.after(Micros(1));
        planned
    }

    fn digest(&mut self) {
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::Refused { seq, refusal } => {
                    self.counts.refused += 1;
                    let possible =
                        !matches!(refusal, Refusal::EmptyPrompt | Refusal::TokenOutOfVocabulary { .. });
                    assert!(possible, "{seq}: {refusal}");
                    self.seen(seq).ended = true;
                }
                Effect::PromptLogprobs { seq, logprobs } => {
                    let seen = self.seen(seq);
                    assert!(seen.tokens.is_empty(), "before the first token");
                    assert_eq!(seen.prompt_logprobs.replace(logprobs), None, "{seq}: once");
                }
                Effect::Token { seq, token, logprob } => {
                    let seen = self.seen(seq);
                    seen.tokens.push(token);
                    seen.logprobs.extend(logprob);
                }
                Effect::Started { .. } => {}
                Effect::Preempted { .. } => self.counts.preempted += 1,
                Effect::Finished { seq, finish, usage } => {
                    let seen = self.seen(seq);
                    seen.ended = true;
                    assert_eq!(usage.output_tokens as usize, seen.tokens.len(), "{seq}: usage");
                    self.compare(seq, finish);
                }
            }
        }
    }

    fn seen(&mut self, seq: SeqId) -> &mut Seen {
        let seen = &mut self.requests.get_mut(&seq).expect("it was submitted").1;
        assert!(!seen.ended, "{seq}: nothing comes after the end");
        seen
    }

    fn compare(&mut self, seq: SeqId, finish: Finish) {
        let (request, seen) = &self.requests[&seq];
        let expected = oracle(&self.config, request);
        match finish {
            Finish::Cancelled | Finish::DeadlineExceeded => {
                self.counts.ended_early += 1;
                assert!(expected.tokens.starts_with(&seen.tokens), "{seq}: a part of what it would have had");
            }
            Finish::Eos(_) | Finish::StopToken(_) | Finish::Length | Finish::NotANumber => {
                self.counts.finished += 1;
                let (tokens, logprobs) = (seen.tokens.clone(), seen.logprobs.clone());
                let prompt_logprobs = seen.prompt_logprobs.clone();
                let got = Expected { tokens, logprobs, prompt_logprobs, finish: Some(finish) };
                assert_eq!(got, expected, "{seq}");
            }
        }
    }
}

fn run(seed: u64) -> Counts {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.disturb();
        world.step(true);
    }
    let mut left = 0;
    while world.step(false) {
        left += 1;
        assert!(left < 10_000, "work comes to an end");
    }
    assert!(world.requests.values().all(|(_, seen)| seen.ended), "no sequence is lost");
    assert_eq!(world.engine.load().blocks_used, [0, 0], "everything is free in the end");
    world.counts
}

#[test]
fn every_request_gets_the_tokens_it_would_get_alone() {
    let mut sum = Counts::default();
    for seed in 0..SEEDS {
        let counts = std::panic::catch_unwind(|| run(seed)).unwrap_or_else(|panic| {
            println!("failing seed: {seed}");
            std::panic::resume_unwind(panic)
        });
        sum.finished += counts.finished;
        sum.ended_early += counts.ended_early;
        sum.refused += counts.refused;
        sum.preempted += counts.preempted;
    }
    println!("{sum:?}");
    assert!(
        sum.finished > 10_000 && sum.ended_early > 1000 && sum.preempted > 1000,
        "the runs exercise it: {sum:?}"
    );
}
