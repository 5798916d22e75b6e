//! A deterministic world around the engine: a clock, requests, faults, and a fake rank that takes time. One seed is
//! one run, the same on every machine.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use engine::{
    AGEING_MAX, Config, Effect, Engine, Event, Finish, PrefixReuse, Refusal, Request, RequestOptions,
    Sabotage, SlotTables, Step, StepOutput, TokenLogprob,
};
use types::{BlockSize, GenerationSpec, Micros, Priority, SeqId, TokenId};

use super::random::Random;
use super::world::{Expected, Failing, FakeRank, Fault, oracle};
use super::{EOS, VOCAB};

/// One sequence: what it must give, and what it has given.
struct Watched {
    request: Request,
    arrival: Micros,
    /// The first id of its request.
    family: SeqId,
    expected: Expected,
    tokens: Vec<TokenId>,
    logprobs: Vec<TokenLogprob>,
    prompt_logprobs: Option<Vec<TokenLogprob>>,
    waits: bool,
    started: bool,
    ended: bool,
}

impl Watched {
    /// All its tokens, as far as they will ever be known.
    fn all(&self) -> impl Iterator<Item = &TokenId> {
        self.request.prompt.iter().chain(&self.expected.tokens)
    }
}

/// How often what a run is about has happened.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    pub steps: u64,
    pub finished: u64,
    pub ended_early: u64,
    pub refused: u64,
    pub preempted: u64,
    pub resumed: u64,
    pub cached_starts: u64,
    /// Steps that were planned while another was in flight.
    pub planned_ahead: u64,
    /// Sequences that ended because of what are not numbers.
    pub spoiled: u64,
    /// Sequences that ended because nothing could be drawn.
    pub barred: u64,
    /// Steps with rows of several sub-groups, and those in which a sub-group of several had none.
    pub shared_steps: u64,
    pub uneven_steps: u64,
}

impl Counts {
    pub fn add(&mut self, other: Self) {
        let Self { steps, finished, ended_early, refused, preempted, resumed, .. } = other;
        self.steps += steps;
        self.finished += finished;
        self.ended_early += ended_early;
        self.refused += refused;
        self.preempted += preempted;
        self.resumed += resumed;
        self.cached_starts += other.cached_starts;
        self.planned_ahead += other.planned_ahead;
        self.spoiled += other.spoiled;
        self.barred += other.barred;
        self.shared_steps += other.shared_steps;
        self.uneven_steps += other.uneven_steps;
    }
}

/// A step in flight.
struct Flying {
    step: Step,
    bytes: Vec<u8>,
    /// Once the rank has executed it, which may be before or after the next one is planned.
    output: Option<StepOutput>,
}

/// One run.
pub struct World {
    config: Config,
    engine: Engine,
    rank: FakeRank,
    random: Random,
    now: Micros,
    /// What a step takes, before its rows.
    step_time: Micros,
    /// Prompts that requests begin with.
    beginnings: Vec<Vec<TokenId>>,
    watched: BTreeMap<SeqId, Watched>,
    /// Those of them that have not ended.
    open: BTreeSet<SeqId>,
    effects: Vec<Effect>,
    /// Steps planned and not answered.
    flying: VecDeque<Flying>,
    /// Buffers of steps that were answered.
    spare: Vec<Step>,
    /// Most steps in flight.
    depth: usize,
    /// The tables of a rank that has been told every plan.
    mirror: SlotTables,
    /// Those for which the rank has computed what are not numbers, or could draw nothing.
    failed: BTreeSet<(SeqId, Fault)>,
    next: u64,
    counts: Counts,
}

/// Runs `seed` for `steps` steps with arrivals, then until nothing is left.
pub fn run(seed: u64, steps: u32, bug: Option<Sabotage>) -> Counts {
    let mut world = World::new(seed, bug);
    for _ in 0..steps {
        world.disturb();
        world.step(true);
    }
    let mut left = 0;
    while world.step(false) {
        left += 1;
        assert!(left < 10_000, "work comes to an end");
    }
    assert!(world.open.is_empty(), "no sequence is lost: {:?}", world.open);
    assert_eq!(world.engine.load().blocks_used, [0, 0], "everything is free in the end");
    world.counts
}

fn config(random: &mut Random) -> Config {
    let running_max = random.range(1, 6);
    let blocks = match random.range(0, 5) {
        0 => [random.range(4, 40), 0],
        1 => [0, random.range(4, 40)],
        _ => [random.range(4, 40), random.range(4, 40)],
    };
    let context_tokens_max = random.range(8, 48);
    let data_parallel = [1, 1, 2, 4][random.range(0, 3) as usize];
    Config {
        block_size: BlockSize::new(random.range(1, 5)).unwrap(),
        blocks,
        window_keys: random.range(1, 12),
        context_tokens_max,
        vocab_size: VOCAB,
        eos_token_ids: vec![EOS],
        step_tokens_max: running_max + random.range(0, 12),
        logit_rows_max: running_max + random.range(0, 6),
        running_max,
        data_parallel,
        waiting_requests_max: random.range(1, 8),
        waiting_tokens_max: context_tokens_max * random.range(1, 4),
    }
}

impl World {
    fn new(seed: u64, bug: Option<Sabotage>) -> Self {
        let mut random = Random::new(seed);
        let config = config(&mut random);
        let engine = match bug {
            Some(bug) => Engine::sabotaged(config.clone(), bug),
            None => Engine::new(config.clone()),
        };
        let beginning = |random: &mut Random| tokens(random, config.context_tokens_max);
        let depth = random.range(1, 2) as usize;
        let mirror = SlotTables::new(&config).unwrap();
        Self {
            engine: engine.unwrap(),
            rank: FakeRank::new(&config),
            beginnings: (0..3).map(|_| beginning(&mut random)).collect(),
            step_time: Micros([1_000, 20_000, 300_000, 2_000_000][random.range(0, 3) as usize]),
            random,
            config,
            now: Micros(0),
            watched: BTreeMap::new(),
            open: BTreeSet::new(),
            effects: Vec::new(),
            flying: VecDeque::new(),
            spare: Vec::new(),
            depth,
            mirror,
            failed: BTreeSet::new(),
            next: 0,
            counts: Counts::default(),
        }
    }

    fn request(&mut self) -> Request {
        let random = &mut self.random;
        let max_tokens = random.range(1, 24);
        let spec = GenerationSpec {
            max_tokens: Some(max_tokens),
            min_tokens: Some(random.range(0, max_tokens.min(6))),
            seed: Some(random.next()),
            stop_token_ids: if random.one_in(4) { vec![11, 12] } else { Vec::new() },
            ignore_eos: !random.one_in(3),
            logprobs: random.one_in(4).then_some(1),
            prompt_logprobs: random.one_in(5).then_some(1),
            n: random.one_in(6).then(|| random.range(2, 3)),
            frequency_penalty: random.one_in(5).then_some(0.5),
            ..GenerationSpec::default()
        };
        let longest = if random.one_in(5) { self.config.context_tokens_max } else { 12 };
        let len = random.range(1, longest) as usize;
        let prompt = if random.one_in(3) {
            tokens(random, longest)
        } else {
            let beginning = &self.beginnings[random.range(0, 2) as usize];
            let mut prompt = beginning[..len.min(beginning.len())].to_vec();
            prompt.extend(tokens(random, 3));
            prompt
        };
        let reuse = match random.range(0, 7) {
            0 => PrefixReuse::Bypass,
            1 => PrefixReuse::Salted(1),
            2 => PrefixReuse::Salted(2),
            _ => PrefixReuse::Open,
        };
        let level = if random.one_in(8) { random.signed(100) } else { random.signed(2) };
        let deadline = random.one_in(6).then(|| u64::from(random.range(1, 40)) * self.step_time.0);
        Request {
            prompt,
            generation: spec.validate(0, VOCAB).unwrap(),
            deadline: deadline.map(|after| self.now.after(Micros(after))),
            options: RequestOptions {
                priority: Priority::new(level).unwrap(),
                reuse,
                ..RequestOptions::default()
            },
        }
    }

    /// Cuts a request of one sequence in two, as if its first part had run elsewhere.
    fn resume(&mut self, request: &mut Request) {
        if request.generation.sequences() > 1 || !self.random.one_in(4) || self.too_long(request) {
            return;
        }
        request.options.first_stream = self.random.range(0, 3);
        let expected = oracle(&self.config, request, request.options.first_stream);
        let most = u32::try_from(expected.tokens.len()).unwrap() - 1;
        let had = self.random.range(0, most) as usize;
        request.options.resume_tokens = expected.tokens[..had].to_vec();
        self.counts.resumed += u64::from(had > 0);
    }

    fn too_long(&self, request: &Request) -> bool {
        request.prompt.len() >= self.config.context_tokens_max as usize
    }

    fn apply(&mut self, event: Event) {
        self.engine.apply(event, self.now, &mut self.effects);
        self.engine.check();
        self.digest();
    }

    fn submit(&mut self) {
        let mut request = self.request();
        self.resume(&mut request);
        let family = SeqId(self.next + 1);
        let streams = request.options.first_stream..;
        let family_ids = family.0..family.0 + u64::from(request.generation.sequences());
        self.next = family_ids.end - 1;
        for seq in family_ids.clone() {
            let watched = Watched {
                request: request.clone(),
                arrival: self.now,
                family,
                expected: Expected::default(),
                tokens: Vec::new(),
                logprobs: Vec::new(),
                prompt_logprobs: None,
                waits: true,
                started: false,
                ended: false,
            };
            self.watched.insert(SeqId(seq), watched);
            self.open.insert(SeqId(seq));
        }
        self.apply(Event::Submit { seq: family, request });
        for (seq, stream) in family_ids.map(SeqId).zip(streams) {
            // The refused are gone, and need no oracle.
            let Some(one) = self.watched.get_mut(&seq) else { continue };
            one.expected = oracle(&self.config, &one.request, stream);
            if seq != family || !one.request.options.resume_tokens.is_empty() {
                one.expected.prompt_logprobs = None;
            }
        }
    }

    /// Submits and cancels at random; now and then everything is cancelled at once.
    fn disturb(&mut self) {
        if self.random.one_in(3) {
            self.submit();
        }
        if self.random.one_in(10) && self.next > 0 {
            let last = u32::try_from(self.next).unwrap();
            let seq = SeqId(self.random.range(last.saturating_sub(8).max(1), last).into());
            self.cancel(seq);
        }
        if self.random.one_in(150) {
            self.open.clone().into_iter().for_each(|seq| self.cancel(seq));
            let load = self.engine.load();
            assert_eq!((load.running, load.waiting, load.blocks_used), (0, 0, [0, 0]), "all is free at once");
        }
    }

    fn cancel(&mut self, seq: SeqId) {
        self.apply(Event::Cancel(seq));
        assert!(!self.open.contains(&seq), "{seq} goes on after its cancel");
    }

    /// Plans ahead as far as it may, executes, and answers one step, with disturbances in between; false when there was
    /// nothing to answer.
    fn step(&mut self, disturb: bool) -> bool {
        while self.flying.len() < self.depth && self.plan() {
            // A real rank is at times done with a step before the next one is planned.
            if self.random.one_in(3) {
                self.execute();
            }
        }
        self.execute();
        let Some(Flying { step, output, .. }) = self.flying.pop_front() else {
            assert!(self.engine.is_idle(), "a step is planned whenever there is work");
            self.now = self.now.after(self.step_time);
            return false;
        };
        self.counts.steps += 1;
        let rows = u64::try_from(step.plan.inputs().len()).unwrap();
        let mut took = self.step_time.after(Micros(self.step_time.0 / 20 * rows));
        if self.random.one_in(100) {
            took = Micros(took.0 * 50);
        }
        self.now = self.now.after(took);
        if disturb {
            self.disturb();
        }
        self.apply(Event::StepDone(output.unwrap()));
        self.spare.push(step);
        true
    }

    /// Plans a step; false when there is none.
    fn plan(&mut self) -> bool {
        let mut step = self.spare.pop().unwrap_or_default();
        let ahead = !self.flying.is_empty();
        let planned = self.engine.plan_into(self.now, &mut step, &mut self.effects);
        self.engine.check();
        self.digest();
        let late =
            |seq: &&SeqId| self.watched[seq].request.deadline.is_some_and(|deadline| deadline <= self.now);
        assert_eq!(self.open.iter().find(late), None, "it goes on after its deadline");
        if !planned {
            assert!(ahead || self.engine.is_idle(), "a step is planned whenever there is work");
            self.spare.push(step);
            return false;
        }
        self.counts.planned_ahead += u64::from(ahead);
        let mut busy = 0;
        for index in 0..self.config.data_parallel {
            let own = step.plan.sequences().filter(|one| self.config.sub_group(one.slot) == index);
            let (rows, logits) =
                own.fold((0, 0), |(rows, logits), one| (rows + one.rows.len(), logits + one.logit_rows));
            assert!(rows <= self.config.step_tokens_max as usize, "rows within the budget");
            assert!(logits <= self.config.logit_rows_max, "logit rows within the budget");
            busy += u32::from(rows > 0);
        }
        self.counts.shared_steps += u64::from(busy > 1);
        self.counts.uneven_steps += u64::from(busy < self.config.data_parallel);
        self.mirror.apply(&step.plan).unwrap();
        self.engine.check_mirror(&self.mirror);
        let mut bytes = Vec::new();
        step.plan.encode(&mut bytes);
        self.flying.push_back(Flying { step, bytes, output: None });
        true
    }

    /// Lets the rank execute every step in flight, in order. Now and then it fails for one sequence.
    fn execute(&mut self) {
        for one in self.flying.iter_mut().filter(|one| one.output.is_none()) {
            let victim = self.random.one_in(150).then(|| one.step.work.first()).flatten();
            let failing: Option<Failing> = victim.map(|work| {
                let fault = if self.random.one_in(3) { Fault::NoToken } else { Fault::NotANumber };
                (work.seq, fault)
            });
            self.failed.extend(failing);
            one.output = Some(self.rank.execute(&one.step, &one.bytes, failing));
        }
    }

    fn digest(&mut self) {
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::Refused { seq, refusal } => {
                    self.counts.refused += 1;
                    let overload = matches!(
                        refusal,
                        Refusal::QueueFull { .. }
                            | Refusal::QueueTokensFull { .. }
                            | Refusal::PromptTooLong { .. }
                            | Refusal::KvTooSmall { .. }
                    );
                    assert!(overload, "{seq}: {refusal}");
                    self.open(seq);
                    self.watched.remove(&seq);
                    self.open.remove(&seq);
                }
                Effect::Started { seq, cached_tokens, .. } => self.started(seq, cached_tokens),
                Effect::PromptLogprobs { seq, logprobs } => {
                    let one = self.open(seq);
                    assert!(one.tokens.is_empty(), "before the first token");
                    assert_eq!(one.prompt_logprobs.replace(logprobs), None, "{seq}: once");
                }
                Effect::Token { seq, token, logprob } => {
                    let one = self.open(seq);
                    one.tokens.push(token);
                    one.logprobs.extend(logprob);
                }
                Effect::Preempted { seq } => {
                    self.counts.preempted += 1;
                    let one = self.open(seq);
                    assert!(!std::mem::replace(&mut one.waits, true), "{seq} ran");
                }
                Effect::Finished { seq, finish, usage } => {
                    let one = self.open(seq);
                    one.ended = true;
                    self.open.remove(&seq);
                    let one = &self.watched[&seq];
                    let had = one.request.options.resume_tokens.len();
                    assert_eq!(usage.output_tokens as usize, had + one.tokens.len(), "{seq}: usage");
                    assert_eq!(usage.prompt_tokens as usize, one.request.prompt.len(), "{seq}: usage");
                    self.compare(seq, finish);
                }
            }
        }
    }

    fn open(&mut self, seq: SeqId) -> &mut Watched {
        let one = self.watched.get_mut(&seq).expect("it was submitted");
        assert!(!one.ended, "{seq}: nothing comes after the end");
        one
    }

    fn started(&mut self, seq: SeqId, cached_tokens: u32) {
        let one = self.open(seq);
        assert!(std::mem::replace(&mut one.waits, false), "{seq} waited");
        let first = !std::mem::replace(&mut one.started, true);
        if first && cached_tokens > 0 {
            self.counts.cached_starts += 1;
            self.check_source(seq, cached_tokens as usize);
        }
        let arrival = self.watched[&seq].arrival;
        for id in &self.open {
            let other = &self.watched[id];
            // The others of a request wait for its first to compute their prompt.
            let waits = other.waits && other.family == *id;
            let starved = waits && other.arrival.after(AGEING_MAX) <= arrival;
            assert!(!starved, "{id} came {AGEING_MAX:?} before {seq} and still waits");
        }
    }

    /// Somebody it may share with had the tokens that were there.
    fn check_source(&self, seq: SeqId, cached: usize) {
        let one = &self.watched[&seq];
        let reuse = one.request.options.reuse;
        let source = self.watched.iter().any(|(id, other)| {
            let related = other.family == one.family
                || (other.request.options.reuse == reuse && reuse != PrefixReuse::Bypass);
            related && *id != seq && other.started && one.all().take(cached).eq(other.all().take(cached))
        });
        assert!(source, "{seq} found {cached} tokens that nobody left for it");
    }

    fn compare(&mut self, seq: SeqId, finish: Finish) {
        let one = &self.watched[&seq];
        let had = one.request.options.resume_tokens.len();
        let (tokens, logprobs) = (one.tokens.clone(), one.logprobs.clone());
        let mut expected = one.expected.clone();
        expected.tokens.drain(..had);
        expected.logprobs.drain(..had.min(expected.logprobs.len()));
        match finish {
            Finish::Cancelled | Finish::DeadlineExceeded => {
                self.counts.ended_early += 1;
                assert!(expected.tokens.starts_with(&tokens), "{seq}: a part of what it would have had");
            }
            Finish::NotANumber | Finish::NoToken => {
                let fault = if finish == Finish::NoToken { Fault::NoToken } else { Fault::NotANumber };
                let counts = &mut self.counts;
                *if finish == Finish::NoToken { &mut counts.barred } else { &mut counts.spoiled } += 1;
                assert!(self.failed.contains(&(seq, fault)), "{seq}: {finish:?}, and nobody gave it to it");
                assert!(expected.tokens.starts_with(&tokens), "{seq}: a part of what it would have had");
            }
            Finish::Eos(_) | Finish::StopToken(_) | Finish::Length => {
                let prompt_logprobs = one.prompt_logprobs.clone();
                let got = Expected { tokens, logprobs, prompt_logprobs, finish: Some(finish) };
                assert_eq!(got, expected, "{seq}");
                self.counts.finished += 1;
            }
        }
    }
}

fn tokens(random: &mut Random, most: u32) -> Vec<TokenId> {
    let len = random.range(1, most);
    (0..len).map(|_| TokenId(random.range(20, VOCAB - 1))).collect()
}
