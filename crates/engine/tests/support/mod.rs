//! What the tests share: small configurations, requests, and an executor whose next token depends on every key and
//! value it should see, read through the block tables.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of every test binary, each of which uses its own part"
)]
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

pub mod random;
pub mod sim;
pub mod world;

use engine::{
    Config, Effect, Engine, Event, Finish, Input, Request, RequestOptions, RowOutput, RowPurpose, Step,
    StepOutput, TokenLogprob, Usage,
};
use types::{BlockSize, Generation, GenerationSpec, Micros, SeqId, TokenId};

pub const VOCAB: u32 = 1000;
pub const EOS: TokenId = TokenId(7);

/// Ample room for everything; tests narrow what they are about.
pub fn config() -> Config {
    Config {
        block_size: BlockSize::new(4).unwrap(),
        blocks: [64, 64],
        window_keys: 8,
        context_tokens_max: 64,
        vocab_size: VOCAB,
        eos_token_ids: vec![EOS],
        step_tokens_max: 16,
        logit_rows_max: 16,
        running_max: 4,
        data_parallel: 1,
        waiting_requests_max: 8,
        waiting_tokens_max: 256,
    }
}

pub fn spec(max_tokens: u32) -> GenerationSpec {
    GenerationSpec { max_tokens: Some(max_tokens), ..GenerationSpec::default() }
}

pub fn valid(spec: GenerationSpec) -> Generation {
    spec.validate(0, VOCAB).unwrap()
}

/// A prompt of `len` tokens, different for each `tag`.
pub fn prompt(tag: u32, len: u32) -> Vec<TokenId> {
    (0..len).map(|i| TokenId(100 + (tag * 31 + i * 7) % 800)).collect()
}

pub fn request(tag: u32, prompt_tokens: u32, max_tokens: u32) -> Request {
    Request {
        prompt: prompt(tag, prompt_tokens),
        generation: valid(spec(max_tokens)),
        deadline: None,
        options: RequestOptions::default(),
    }
}

/// An engine whose invariants are checked after every call, driven step by step with chosen tokens.
pub struct Driver {
    pub engine: Engine,
    pub now: Micros,
    pub effects: Vec<Effect>,
}

impl Driver {
    pub fn new(config: Config) -> Self {
        Self { engine: Engine::new(config).unwrap(), now: Micros(0), effects: Vec::new() }
    }

    pub fn apply(&mut self, event: Event) {
        self.engine.apply(event, self.now, &mut self.effects);
        self.engine.check();
    }

    pub fn submit(&mut self, seq: u64, request: Request) {
        self.apply(Event::Submit { seq: SeqId(seq), request });
    }

    pub fn plan(&mut self) -> Option<Step> {
        let step = self.engine.plan(self.now, &mut self.effects);
        self.engine.check();
        step
    }

    /// Answers `step`: prompt rows with a fixed value, sampling rows with `token` (told the sequence).
    pub fn answer(&mut self, step: &Step, mut token: impl FnMut(SeqId) -> TokenId) {
        let rows = step
            .work
            .iter()
            .map(|work| match &work.purpose {
                RowPurpose::Sample { logprobs, history, .. } => {
                    let token = token(work.seq);
                    let token = history.as_ref().map_or(token, |history| history.draw(|_| token));
                    let logprob = logprobs.map(|_| TokenLogprob { token, logprob: -0.5, top: Vec::new() });
                    RowOutput::Sampled { token, logprob }
                }
                RowPurpose::PromptLogprob { target, position, .. } => {
                    let logprob = -(position.0 as f32);
                    RowOutput::PromptLogprob(TokenLogprob { token: *target, logprob, top: Vec::new() })
                }
            })
            .collect();
        self.apply(Event::StepDone(StepOutput { step: step.plan.step(), rows }));
    }

    /// Plans and answers one step with an ordinary token for everyone.
    pub fn step(&mut self) -> Step {
        let step = self.plan().expect("there is work");
        self.answer(&step, |_| TokenId(50));
        step
    }

    /// Steps until nothing is left; how many it took.
    pub fn run(&mut self) -> usize {
        let mut steps = 0;
        while let Some(step) = self.plan() {
            self.answer(&step, |_| TokenId(50));
            steps += 1;
            assert!(steps < 10_000, "the engine does not come to an end");
        }
        steps
    }

    /// Tokens emitted for `seq` so far.
    pub fn tokens(&self, seq: u64) -> Vec<TokenId> {
        self.effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Token { seq: s, token, .. } if s.0 == seq => Some(*token),
                _ => None,
            })
            .collect()
    }

    /// How `seq` ended, if it did.
    pub fn finish(&self, seq: u64) -> Option<Finish> {
        self.effects.iter().find_map(|effect| match effect {
            Effect::Finished { seq: s, finish, .. } if s.0 == seq => Some(*finish),
            _ => None,
        })
    }

    /// Why `seq` was refused, in words, if it was.
    pub fn refusal(&self, seq: u64) -> Option<String> {
        self.effects.iter().find_map(|effect| match effect {
            Effect::Refused { seq: s, refusal } if s.0 == seq => Some(refusal.to_string()),
            _ => None,
        })
    }

    /// How many tokens were there already each time `seq` started.
    pub fn cached(&self, seq: u64) -> Vec<u32> {
        let starts = self.effects.iter().filter_map(|effect| match effect {
            Effect::Started { seq: s, cached_tokens, .. } if s.0 == seq => Some(*cached_tokens),
            _ => None,
        });
        starts.collect()
    }

    /// What `seq` used, once it has ended.
    pub fn usage(&self, seq: u64) -> Option<Usage> {
        self.effects.iter().find_map(|effect| match effect {
            Effect::Finished { seq: s, usage, .. } if s.0 == seq => Some(*usage),
            _ => None,
        })
    }

    pub fn used(&self) -> [u32; 2] {
        self.engine.load().blocks_used
    }
}

/// Rows each scheduled sequence got, in order.
pub fn rows(step: &Step) -> Vec<usize> {
    step.plan.sequences().map(|s| s.inputs.len()).collect()
}

/// Inputs that are all known.
pub fn known(inputs: &[Input]) -> Vec<TokenId> {
    let token = |input: &Input| match input {
        Input::Known(token) => *token,
        Input::Drawn { row } => panic!("the token of row {row} is not known yet"),
    };
    inputs.iter().map(token).collect()
}
