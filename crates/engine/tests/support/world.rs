//! A fake rank and a single-request oracle. The rank stores what it computed per physical block and reads it back
//! through the tables the plans built, so a wrong table, a block in use twice or a block returned too early changes
//! the tokens.

use std::sync::Arc;

use engine::{
    Config, Drawn, Finish, Frame, KvGroup, PlannedSequence, Request, RowOutput, RowPurpose, RowWork,
    SlotTables, Step, StepOutput, StepPlan, TokenLogprob,
};
use types::{BlockId, History, SamplingParams, SeqId, SlotId, TokenId};

use super::random::mix;

/// What a row's cache entry holds, in place of keys and values.
#[derive(Clone, Copy, Default)]
struct Cached {
    position: u32,
    token: u32,
    written: bool,
    /// Not a number.
    spoiled: bool,
}

/// What may go wrong for a sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Its keys and values of that step are not numbers, nor is what sees them.
    NotANumber,
    /// No token may be drawn.
    NoToken,
}

/// A sequence and its fault.
pub type Failing = (SeqId, Fault);

pub struct FakeRank {
    config: Config,
    pub tables: SlotTables,
    /// Of each sub-group.
    caches: Vec<[Vec<Cached>; 2]>,
    /// What the last step drew, and as it was sent.
    drawn: Drawn,
    bytes: Vec<u8>,
    tokens: Vec<TokenId>,
}

impl FakeRank {
    pub fn new(config: &Config) -> Self {
        let entries = |group: KvGroup| (config.blocks[group.index()] * config.block_size.tokens()) as usize;
        Self {
            tables: SlotTables::new(config).unwrap(),
            caches: (0..config.data_parallel)
                .map(|_| KvGroup::ALL.map(|group| vec![Cached::default(); entries(group)]))
                .collect(),
            config: config.clone(),
            drawn: Drawn::default(),
            bytes: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// Executes a step that came as bytes, as a follower would, and answers it as the leader would, with a fault for the
    /// sequence that is `failing`.
    pub fn execute(&mut self, step: &Step, encoded: &[u8], failing: Option<Failing>) -> StepOutput {
        let Ok(Frame::Plan(plan)) = Frame::decode(encoded) else { panic!("a plan") };
        assert_eq!(plan, step.plan, "the plan survives its encoding");
        self.tables.apply(&plan).unwrap();
        self.tables.resolve(&plan, &self.drawn, &mut self.tokens).unwrap();
        self.check_written(&plan);
        let mut work = step.work.iter();
        let mut rows = Vec::with_capacity(step.work.len());
        let tokens = std::mem::take(&mut self.tokens);
        for sequence in plan.sequences() {
            let own: Vec<&RowWork> = work.by_ref().take(sequence.logit_rows as usize).collect();
            let fault = failing.filter(|(seq, _)| own.first().is_some_and(|work| work.seq == *seq));
            let fault = fault.map(|(_, fault)| fault);
            let spoiled = fault == Some(Fault::NotANumber);
            self.write(&sequence, &tokens[sequence.rows.clone()], spoiled);
            let end = sequence.start.0 + u32::try_from(sequence.rows.len()).unwrap();
            for (position, work) in (end - sequence.logit_rows..end).zip(own) {
                let draws = matches!(work.purpose, RowPurpose::Sample { .. });
                rows.push(match self.attend(&sequence, position) {
                    Some(_) if draws && fault == Some(Fault::NoToken) => RowOutput::NoToken,
                    Some(state) => answer(state, &work.purpose, VOCAB),
                    None => RowOutput::NotANumber,
                });
            }
        }
        self.tokens = tokens;
        assert_eq!(rows.len(), step.work.len(), "one piece of work for each logit row");
        self.drawn.take(plan.step(), &rows);
        self.bytes.clear();
        self.drawn.encode(&mut self.bytes);
        assert_eq!(Frame::decode(&self.bytes), Ok(Frame::Drawn(self.drawn.clone())));
        StepOutput { step: plan.step(), rows }
    }

    fn write(&mut self, sequence: &PlannedSequence<'_>, tokens: &[TokenId], spoiled: bool) {
        for (position, token) in (sequence.start.0..).zip(tokens) {
            for group in KvGroup::ALL.into_iter().filter(|&group| self.config.has(group)) {
                let at = self.address(sequence, group, position);
                let cached = Cached { position, token: token.0, written: true, spoiled };
                let index = self.config.sub_group(sequence.slot) as usize;
                self.caches[index][group.index()][at] = cached;
            }
        }
    }

    /// A block that is written is in one slot's table only.
    fn check_written(&self, plan: &StepPlan) {
        let size = self.config.block_size.tokens();
        for sequence in plan.sequences() {
            for group in KvGroup::ALL.into_iter().filter(|&group| self.config.has(group)) {
                let table = &self.tables.tables(sequence.slot)[group.index()];
                let first = (sequence.start.0 / size - table.first) as usize;
                for block in &table.blocks[first..] {
                    assert_eq!(
                        self.users(group, *block, self.config.sub_group(sequence.slot)),
                        [sequence.slot],
                        "{group} block {block} is written"
                    );
                }
            }
        }
    }

    fn users(&self, group: KvGroup, block: BlockId, sub_group: u32) -> Vec<SlotId> {
        let slots = (0..self.config.slots()).map(SlotId);
        let slots = slots.filter(|&slot| self.config.sub_group(slot) == sub_group);
        slots.filter(|&slot| self.tables.tables(slot)[group.index()].blocks.contains(&block)).collect()
    }

    fn address(&self, sequence: &PlannedSequence<'_>, group: KvGroup, position: u32) -> usize {
        let table = &self.tables.tables(sequence.slot)[group.index()];
        let size = self.config.block_size.tokens();
        let block = table.blocks[(position / size - table.first) as usize];
        (block.0 * size + position % size) as usize
    }

    /// What the row at `position` sees: every position through the full group, the window through the sliding one. `None`
    /// when something of it is not a number.
    fn attend(&self, sequence: &PlannedSequence<'_>, position: u32) -> Option<u64> {
        let mut state = Attention::new();
        let mut spoiled = false;
        for group in KvGroup::ALL.into_iter().filter(|&group| self.config.has(group)) {
            for seen in visible(&self.config, group, position) {
                let index = self.config.sub_group(sequence.slot) as usize;
                let cached = self.caches[index][group.index()][self.address(sequence, group, seen)];
                assert!(cached.written && cached.position == seen, "{group} position {seen} holds another's");
                spoiled |= cached.spoiled;
                state.add(cached.token);
            }
        }
        (!spoiled).then_some(state.0)
    }
}

const VOCAB: u32 = super::VOCAB;

fn visible(config: &Config, group: KvGroup, position: u32) -> std::ops::RangeInclusive<u32> {
    match group {
        KvGroup::Full => 0..=position,
        KvGroup::Sliding => (position + 1).saturating_sub(config.window_keys)..=position,
    }
}

struct Attention(u64);

impl Attention {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, token: u32) {
        self.0 = (self.0 ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3);
    }
}

/// A draw that depends on everything a real one may depend on.
fn draw(state: u64, key: (&SamplingParams, u32, u32), banned: &[TokenId], history: Option<u64>) -> TokenId {
    let (params, stream, position) = key;
    let counter = u64::from(stream) << 32 | u64::from(position);
    let mut number = mix(state ^ mix(params.seed()).wrapping_add(counter) ^ history.unwrap_or(0));
    loop {
        // A small range makes end-of-sequence and stop tokens come up.
        let token = TokenId(u32::try_from(number % 24).unwrap());
        if !banned.contains(&token) {
            return token;
        }
        number = mix(number.wrapping_add(1));
    }
}

/// A number for all that penalties and bad words see.
fn summary(history: &History) -> u64 {
    let seen = history.seen().map(|(token, times)| mix(u64::from(token.0) << 32 | u64::from(times)));
    let order = history.generated().iter().fold(0, |sum, token| mix(sum ^ u64::from(token.0)));
    seen.fold(order, u64::wrapping_add)
}

fn entry(state: u64, token: TokenId) -> TokenLogprob {
    let logprob = -((mix(state ^ u64::from(token.0)) % 1000) as f32);
    TokenLogprob { token, logprob, top: vec![(token, logprob)] }
}

fn answer(state: u64, purpose: &RowPurpose, vocab: u32) -> RowOutput {
    match purpose {
        RowPurpose::Sample { params, stream, position, banned, logprobs, history, .. } => {
            let key = (params, *stream, *position);
            let token = match history {
                Some(history) => history.draw(|history| draw(state, key, banned, Some(summary(history)))),
                None => draw(state, key, banned, None),
            };
            assert!(token.0 < vocab);
            RowOutput::Sampled { token, logprob: logprobs.map(|_| entry(state, token)) }
        }
        RowPurpose::PromptLogprob { target, .. } => RowOutput::PromptLogprob(entry(state, *target)),
    }
}

/// What one request must give, whatever it runs beside.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Expected {
    pub tokens: Vec<TokenId>,
    pub logprobs: Vec<TokenLogprob>,
    pub prompt_logprobs: Option<Vec<TokenLogprob>>,
    pub finish: Option<Finish>,
}

/// Computes a sequence of a request alone, from its prompt, token by token, without an engine.
pub fn oracle(config: &Config, request: &Request, stream: u32) -> Expected {
    let mut tokens = request.prompt.clone();
    let generation = &request.generation;
    let room = config.context_tokens_max - u32::try_from(tokens.len()).unwrap();
    let max_tokens = generation.max_tokens().min(room) as usize;
    let min_tokens = (generation.min_tokens() as usize).min(max_tokens);
    let eos: &[TokenId] = if generation.ignore_eos() { &[] } else { &config.eos_token_ids };
    let stops: Arc<[TokenId]> = eos.iter().chain(generation.stop_token_ids()).copied().collect();
    let mut expected = Expected::default();
    if generation.prompt_logprobs().is_some() {
        let entries = (1..tokens.len()).map(|at| entry(state(config, &tokens[..at]), tokens[at]));
        expected.prompt_logprobs = Some(entries.collect());
    }
    loop {
        let state = state(config, &tokens);
        let position = expected.tokens.len();
        let banned: &[TokenId] = if position < min_tokens { &stops } else { &[] };
        let history = History::new(&request.prompt, &expected.tokens);
        let history = generation.needs_history().then(|| summary(&history));
        let key = (generation.sampling(), stream, u32::try_from(position).unwrap());
        let token = draw(state, key, banned, history);
        tokens.push(token);
        expected.tokens.push(token);
        if generation.logprobs().is_some() {
            expected.logprobs.push(entry(state, token));
        }
        let finish = if eos.contains(&token) {
            Some(Finish::Eos(token))
        } else if stops.contains(&token) {
            Some(Finish::StopToken(token))
        } else {
            (expected.tokens.len() == max_tokens).then_some(Finish::Length)
        };
        if finish.is_some() {
            expected.finish = finish;
            return expected;
        }
    }
}

/// What the last of `tokens` sees.
fn state(config: &Config, tokens: &[TokenId]) -> u64 {
    let position = u32::try_from(tokens.len()).unwrap() - 1;
    let mut state = Attention::new();
    for group in KvGroup::ALL.into_iter().filter(|&group| config.has(group)) {
        visible(config, group, position).for_each(|seen| state.add(tokens[seen as usize].0));
    }
    state.0
}
