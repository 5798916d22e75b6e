//! The engine's state, and what events do to it.

use std::collections::{BTreeMap, VecDeque};
use std::mem;

use types::limits::SEQUENCES_MAX;
use types::{Generation, Micros, SeqId, SlotId, TokenId};

use crate::group::SubGroup;
use crate::kv::Kv;
use crate::rank::Rank;
use crate::sabotage::Sabotage;
use crate::sequence::{Free, Leaving, Running, Sequence, stops};
use crate::{Config, Effect, Error, Event, Finish, KvGroup, Refusal, Request, RowOutput, StepOutput};

/// Steps that may be planned and not answered: one that runs, and one that is ready when it ends. A token that is not
/// known yet is therefore always one that the step just before draws.
pub const STEPS_IN_FLIGHT_MAX: usize = 2;

/// The scheduler of one group: a pure state machine. The caller owns time, threads and the device.
///
/// The loop around it: [`Engine::apply`] what has happened, pass the effects on, [`Engine::plan_into`], hand the step to
/// whoever runs it, apply [`Event::StepDone`], and again. Up to [`STEPS_IN_FLIGHT_MAX`] steps may be planned and not
/// answered: the next one is made while one runs.
///
/// # Steps in flight
/// Every rank executes steps one after the other in the order of their numbers, so what is decided while a step is in
/// flight concerns only later ones:
///
/// - **Blocks** are free the moment a sequence leaves, although steps in flight may still write to them. Whoever gets one
///   does so in a later plan, whose rows run after those writes, and reads only positions that were written
///   since: by its own rows, or, for a block of the prefix tree, before the block was put there. Blocks go into the tree
///   when the step that filled them has been answered; nothing in flight writes to them any more, because the rows
///   of a sequence only ever write behind what it has computed.
/// - **A sequence that ends** while it has a row in a later step leaves at once. That row's result is dropped, and
///   its slot is named in the first plan made after that.
/// - **A sequence that is preempted** has no row in the step being made, so at most one step in flight draws a token of it.
///   It waits when it has that token ([`Leaving`]), and so loses none.
#[derive(Debug)]
pub struct Engine {
    pub(crate) config: Config,
    /// What runs, by sub-group.
    pub(crate) groups: Vec<SubGroup>,
    /// Those that wait, preempted ones included.
    pub(crate) waiting: BTreeMap<Rank, Sequence>,
    pub(crate) waiting_tokens: u64,
    /// No sequence has an earlier deadline; one that had it may have ended.
    pub(crate) first_deadline: Option<Micros>,
    /// Preempted while a step in flight draws their next token: all of them have rows in the oldest one.
    pub(crate) leaving: Vec<Leaving>,
    /// Slots to name in the next plan.
    pub(crate) slots_released: Vec<SlotId>,
    /// The oldest first.
    pub(crate) in_flight: VecDeque<InFlight>,
    pub(crate) steps: u64,
    /// What the rows of sequences without constraints carry.
    pub(crate) free: Free,
    /// Sequences that have just stopped computing the prompt of others, and whether it is there.
    led: Vec<(SeqId, bool)>,
    /// A bug a test has switched on.
    pub(crate) sabotage: Option<Sabotage>,
    last_id: Option<SeqId>,
}

/// A step that was planned and has not been answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InFlight {
    pub(crate) step: u64,
    pub(crate) logit_rows: usize,
}

/// How busy an engine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Sequences in the running batch.
    pub running: u32,
    /// Sequences that wait, preempted ones included.
    pub waiting: u32,
    /// Tokens of the sequences that wait.
    pub waiting_tokens: u64,
    /// Blocks held by sequences, by [`KvGroup::index`].
    pub blocks_used: [u32; 2],
    /// Blocks no sequence holds that keep a prefix until the space is needed, by [`KvGroup::index`].
    pub blocks_cached: [u32; 2],
    /// Blocks there are, by [`KvGroup::index`].
    pub blocks: [u32; 2],
    /// Prompts looked up in the prefix tree since the start.
    pub prefix_look_ups: u64,
}

impl Engine {
    /// An idle engine; everything it will hold per slot and block is allocated here.
    ///
    /// # Errors
    /// As [`Config::check`].
    pub fn new(config: Config) -> Result<Self, Error> {
        config.check()?;
        Ok(Self {
            groups: (0..config.data_parallel).map(|index| SubGroup::new(&config, index)).collect(),
            waiting: BTreeMap::new(),
            waiting_tokens: 0,
            first_deadline: None,
            leaving: Vec::new(),
            slots_released: Vec::new(),
            in_flight: VecDeque::with_capacity(STEPS_IN_FLIGHT_MAX),
            steps: 0,
            free: Free::default(),
            led: Vec::new(),
            sabotage: None,
            last_id: None,
            config,
        })
    }

    /// What the engine was built with.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Takes note of what happened at `now`. What must be passed on is appended to `effects`.
    ///
    /// # Panics
    /// When the caller breaks the protocol: an id that does not grow, or a step output that does not answer the
    /// oldest step in flight.
    pub fn apply(&mut self, event: Event, now: Micros, effects: &mut Vec<Effect>) {
        match event {
            Event::Submit { seq, request } => self.submit(seq, request, now, effects),
            Event::Cancel(seq) => self.end_where(effects, |s| (s.id == seq).then_some(Finish::Cancelled)),
            Event::StepDone(output) => self.step_done(output, effects),
        }
    }

    /// How busy the engine is.
    #[must_use]
    pub fn load(&self) -> Load {
        let count = |n: usize| u32::try_from(n).expect("queues are bounded");
        let sum = |of: &dyn Fn(&Kv, KvGroup) -> u32| {
            KvGroup::ALL.map(|kind| self.groups.iter().map(|one| of(&one.kv, kind)).sum())
        };
        Load {
            running: count(self.running().count()),
            waiting: count(self.waiting.len() + self.leaving.len()),
            waiting_tokens: self.waiting_tokens,
            blocks_used: sum(&|kv, kind| kv.pool(kind).total() - kv.available(kind)),
            blocks_cached: sum(&|kv, kind| kv.prefixes().shared(kind).idle()),
            blocks: sum(&|kv, kind| kv.pool(kind).total()),
            prefix_look_ups: self.groups.iter().map(|one| one.kv.prefixes().look_ups()).sum(),
        }
    }

    /// Whether no sequence runs or waits. A step may be in flight all the same, for sequences that have ended.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running().next().is_none() && self.waiting.is_empty() && self.leaving.is_empty()
    }

    /// What runs, in any sub-group.
    pub(crate) fn running(&self) -> impl Iterator<Item = &Running> {
        self.groups.iter().flat_map(|group| &group.running)
    }

    /// What runs, waits, or will wait again.
    pub(crate) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        let leaving = self.leaving.iter().map(|one| &one.sequence);
        self.waiting.values().chain(leaving).chain(self.running().map(|one| &one.sequence))
    }

    /// Steps that were planned and have not been answered.
    #[must_use]
    pub fn steps_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether a request like this could ever run; what depends on the moment (queue, deadline) is not asked.
    ///
    /// # Errors
    /// The first thing that makes it impossible.
    pub fn check_request(&self, prompt: &[TokenId], generation: &Generation) -> Result<(), Refusal> {
        let Config { vocab_size, context_tokens_max: context, .. } = self.config;
        if prompt.is_empty() {
            return Err(Refusal::EmptyPrompt);
        }
        if prompt.len() >= context as usize {
            return Err(Refusal::PromptTooLong { tokens: prompt.len(), context });
        }
        if let Some(index) = prompt.iter().position(|token| token.0 >= vocab_size) {
            return Err(Refusal::TokenOutOfVocabulary { index, token: prompt[index], vocab_size });
        }
        let (min_tokens, rules) = (generation.min_tokens(), generation.rules());
        if min_tokens > 0
            && rules.allowed().is_some_and(|allowed| {
                let stops = stops(generation, &self.config);
                allowed.iter().all(|token| stops.contains(token))
            })
        {
            return Err(Refusal::OnlyStopsAllowed { min_tokens });
        }
        let prompt_tokens = u32::try_from(prompt.len()).expect("below the context length");
        let tokens = prompt_tokens + generation.max_tokens().min(context - prompt_tokens);
        // All sub-groups have as much.
        let kv = &self.groups[0].kv;
        for group in kv.groups() {
            // The last token generated is never an input, so it is never cached.
            let needed = kv.geometry().peak(group, tokens - 1);
            let available = kv.pool(group).total();
            if needed > available {
                return Err(Refusal::KvTooSmall { group, tokens, needed, available });
            }
        }
        Ok(())
    }

    fn submit(&mut self, seq: SeqId, request: Request, now: Micros, effects: &mut Vec<Effect>) {
        assert!(self.last_id < Some(seq), "{seq} was submitted after {:?}; ids must grow", self.last_id);
        let ids = seq.0..seq.0 + u64::from(request.generation.sequences());
        self.last_id = Some(SeqId(ids.end - 1));
        if let Err(refusal) = self.admissible(&request, now) {
            effects.extend(ids.map(|id| Effect::Refused { seq: SeqId(id), refusal: refusal.clone() }));
            return;
        }
        self.first_deadline = self.first_deadline.into_iter().chain(request.deadline).min();
        for mut sequence in Sequence::of(seq, request, now, &self.config) {
            self.spoil_sequence(&mut sequence);
            self.wait(sequence);
        }
    }

    /// Puts a sequence into the queue, at its place.
    pub(crate) fn wait(&mut self, sequence: Sequence) {
        self.waiting_tokens += u64::from(sequence.len());
        self.waiting.insert(sequence.rank, sequence);
    }

    fn admissible(&self, request: &Request, now: Micros) -> Result<(), Refusal> {
        self.check_request(&request.prompt, &request.generation)?;
        self.check_resume(request)?;
        if let Some(deadline) = request.deadline
            && deadline <= now
        {
            return Err(Refusal::DeadlinePassed { late_us: now.since(deadline).0 });
        }
        let sequences = request.generation.sequences();
        let waiting = u32::try_from(self.waiting.len()).expect("the queue is bounded");
        let max = self.config.waiting_requests_max;
        if waiting.saturating_add(sequences) > max {
            return Err(Refusal::QueueFull { waiting, max });
        }
        let tokens = request.prompt.len() + request.options.resume_tokens.len();
        let prompt = u32::try_from(tokens).expect("within the context").saturating_mul(sequences);
        let (waiting, max) = (self.waiting_tokens, self.config.waiting_tokens_max);
        if waiting + u64::from(prompt) > u64::from(max) {
            return Err(Refusal::QueueTokensFull { waiting, prompt, max });
        }
        Ok(())
    }

    /// Whether a request whose prompt is right can go on from its `resume_tokens`.
    fn check_resume(&self, request: &Request) -> Result<(), Refusal> {
        let Config { vocab_size, context_tokens_max: context, .. } = self.config;
        let Request { prompt, generation, options, .. } = request;
        let (resume, sequences) = (&options.resume_tokens, generation.sequences());
        let first = options.first_stream;
        if first.saturating_add(sequences) > SEQUENCES_MAX {
            return Err(Refusal::Stream { first, sequences, max: SEQUENCES_MAX });
        }
        if resume.is_empty() {
            return Ok(());
        }
        if sequences > 1 {
            return Err(Refusal::ResumeOfSeveral { sequences });
        }
        if let Some(index) = resume.iter().position(|token| token.0 >= vocab_size) {
            return Err(Refusal::ResumeToken { index, token: resume[index], vocab_size });
        }
        let stops = stops(generation, &self.config);
        if let Some(index) = resume.iter().position(|token| stops.contains(token)) {
            return Err(Refusal::ResumeEnded { index, token: resume[index] });
        }
        let prompt = u32::try_from(prompt.len()).expect("below the context length");
        let max = generation.max_tokens().min(context - prompt);
        match resume.len() >= max as usize {
            true => Err(Refusal::ResumeTooLong { tokens: resume.len(), max }),
            false => Ok(()),
        }
    }

    fn step_done(&mut self, output: StepOutput, effects: &mut Vec<Effect>) {
        let StepOutput { step, mut rows } = output;
        let answered = InFlight { step, logit_rows: rows.len() };
        assert_eq!(
            self.in_flight.pop_front(),
            Some(answered),
            "the output must answer the oldest step in flight"
        );
        for at in 0..self.groups.len() {
            let mut running = mem::take(&mut self.groups[at].running);
            running.retain_mut(|one| self.answer(at, one, step, &mut rows, effects));
            self.groups[at].running = running;
        }
        self.settle_leaving(&mut rows, effects);
        self.free_families();
    }

    /// Gives a running sequence of sub-group `at` its results of `step`; false when it runs no more.
    fn answer(
        &mut self,
        at: usize,
        one: &mut Running,
        step: u64,
        rows: &mut [RowOutput],
        effects: &mut Vec<Effect>,
    ) -> bool {
        // Results of sequences that ended while the step was in flight are nobody's: dropped without trace.
        let Some(flight) = one.flights[flight_index(step)].take() else { return true };
        one.answered = flight.end;
        let known = one.sequence.len();
        let finish = one.sequence.take(&flight, rows, &self.config, effects);
        if finish != Some(Finish::NotANumber) {
            let tokens = self.publishable(one);
            one.publish(&mut self.groups[at].kv, tokens);
        }
        let drew = one.sequence.len() > known;
        if drew || finish.is_some() {
            self.led.extend(mem::take(&mut one.sequence.leads).then_some((one.sequence.id, drew)));
        }
        let Some(finish) = finish else { return true };
        self.finish(&one.sequence, finish, effects);
        if self.haunts(one) {
            return true;
        }
        self.vacate(at, one);
        false
    }

    /// Gives those that were preempted while the step was in flight their results, and a place in the queue.
    fn settle_leaving(&mut self, rows: &mut [RowOutput], effects: &mut Vec<Effect>) {
        for mut one in mem::take(&mut self.leaving) {
            let finish = one.sequence.take(&one.flight, rows, &self.config, effects);
            if one.flight.draws || finish.is_some() {
                // Its blocks are gone, so whoever waits for its prompt does not find it.
                self.led.extend(mem::take(&mut one.sequence.leads).then_some((one.sequence.id, false)));
            }
            match finish {
                Some(finish) => self.finish(&one.sequence, finish, effects),
                None => self.send_back(one.sequence, effects),
            }
        }
    }

    fn finish(&self, sequence: &Sequence, finish: Finish, effects: &mut Vec<Effect>) {
        effects.push(Effect::Finished { seq: sequence.id, finish, usage: sequence.usage() });
    }

    /// Lets the sequences go that waited for others to compute their prompt. If that did not happen, the next of them
    /// computes it.
    fn free_families(&mut self) {
        while let Some((leader, computed)) = self.led.pop() {
            if self.has_bug(Sabotage::ForgetFamily) {
                continue;
            }
            let mut next = None;
            for sequence in self.waiting.values_mut().filter(|one| one.held_by == Some(leader)) {
                sequence.held_by = next;
                if next.is_none() && !computed {
                    sequence.leads = true;
                    next = Some(sequence.id);
                }
            }
        }
    }

    /// Ends every sequence, waiting or running, for which `ends` has a reason.
    pub(crate) fn end_where(
        &mut self,
        effects: &mut Vec<Effect>,
        ends: impl Fn(&Sequence) -> Option<Finish>,
    ) {
        let mut led = mem::take(&mut self.led);
        let mut end = |sequence: &Sequence| {
            let Some(finish) = ends(sequence) else { return false };
            led.extend(sequence.leads.then_some((sequence.id, false)));
            effects.push(Effect::Finished { seq: sequence.id, finish, usage: sequence.usage() });
            true
        };
        self.waiting.retain(|_, sequence| {
            let ended = end(sequence);
            self.waiting_tokens -= if ended { sequence.len().into() } else { 0 };
            !ended
        });
        self.leaving.retain(|one| !end(&one.sequence));
        for at in 0..self.groups.len() {
            let mut running = mem::take(&mut self.groups[at].running);
            running.extract_if(.., |one| end(&one.sequence)).for_each(|mut one| self.vacate(at, &mut one));
            self.groups[at].running = running;
        }
        self.led = led;
        self.free_families();
    }

    /// Frees everything a sequence that ran on sub-group `at` holds; see [`Engine`] for steps in flight that still write
    /// to it.
    pub(crate) fn vacate(&mut self, at: usize, one: &mut Running) {
        if self.has_bug(Sabotage::LeakBlocks) && !self.in_flight.is_empty() {
            one.tables = crate::kv::Tables::default();
        }
        let (twice, home) = (self.has_bug(Sabotage::FreeSlotTwice), self.slot_home(at));
        let group = &mut self.groups[at];
        group.slots_free.extend(twice.then_some(one.slot));
        group.kv.release(&mut one.tables);
        if let Some(cursor) = one.cursor.take() {
            group.kv.close(cursor);
        }
        self.groups[home].slots_free.push(one.slot);
        self.slots_released.push(one.slot);
    }
}

/// Where [`Running::flights`] keeps a sequence's part of `step`.
pub(crate) const fn flight_index(step: u64) -> usize {
    (step % STEPS_IN_FLIGHT_MAX as u64) as usize
}
