//! An executor that queues work on a device begins a step before the one before it has ended. What comes out is what comes
//! out of running one step after the other, and everything is told in order.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use engine::{
    Config, Effect, Engine, Event, Finish, Input, Request, RequestOptions, RowOutput, RowPurpose, RowWork,
    SlotTables, Step,
};
use ops::conformance::Random;
use types::{BlockSize, GenerationSpec, KvGroup, Micros, SeqId, TokenId};
use worker::{Execute, FlightRecorder, Job, Pipeline, Progress, Steps};

const SEED: u64 = 20_261_130;
const REQUESTS: u64 = 120;
const VOCABULARY: u32 = 60;
const BLOCK_TOKENS: u32 = 4;

/// Few blocks, so that sequences are preempted.
fn config() -> Config {
    Config {
        block_size: BlockSize::new(BLOCK_TOKENS).unwrap(),
        blocks: [24, 0],
        window_keys: 8,
        context_tokens_max: 64,
        vocab_size: VOCABULARY,
        eos_token_ids: vec![TokenId(7)],
        step_tokens_max: 16,
        logit_rows_max: 16,
        running_max: 6,
        data_parallel: 1,
        waiting_requests_max: 256,
        waiting_tokens_max: 4096,
    }
}

/// What is queued on the device: the forward pass of a step, or the drawing of its tokens.
enum Queued {
    Forward(Vec<Row>),
    Draw { step: u64, work: Vec<RowWork> },
}

struct Row {
    input: Input,
    position: u32,
    /// Blocks of its sequence.
    blocks: Vec<u32>,
    has_logits: bool,
}

/// A device without arithmetic: its cache holds the tokens themselves, and a token that is drawn says which tokens its row
/// saw. It does its work when somebody waits for it, in order.
#[derive(Default)]
struct Device {
    queue: VecDeque<Queued>,
    cache: HashMap<(u32, u32), TokenId>,
    /// What the rows of the last forward pass saw.
    seen: Vec<u64>,
    /// The last step's tokens, by logit row: only the device knows them.
    drawn: Vec<TokenId>,
}

impl Device {
    /// Works up to the end of `step`.
    fn wait(&mut self, step: u64) -> Vec<TokenId> {
        loop {
            match self.queue.pop_front().expect("the step was queued") {
                Queued::Forward(rows) => self.forward(&rows),
                Queued::Draw { step: number, work } => {
                    let draw = |(seen, work): (&u64, &RowWork)| {
                        let RowPurpose::Sample { stream, position, .. } = &work.purpose else {
                            unreachable!("nobody asks for prompt log-probabilities")
                        };
                        let mut hash = DefaultHasher::new();
                        (seen, stream, position).hash(&mut hash);
                        TokenId((hash.finish() % u64::from(VOCABULARY)) as u32)
                    };
                    self.drawn = self.seen.iter().zip(&work).map(draw).collect();
                    if number == step {
                        return self.drawn.clone();
                    }
                }
            }
        }
    }

    fn forward(&mut self, rows: &[Row]) {
        self.seen.clear();
        for row in rows {
            let token = match row.input {
                Input::Known(token) => token,
                Input::Drawn { row } => self.drawn[row as usize],
            };
            let place = |at: u32| (row.blocks[(at / BLOCK_TOKENS) as usize], at % BLOCK_TOKENS);
            self.cache.insert(place(row.position), token);
            if row.has_logits {
                let mut hash = DefaultHasher::new();
                (0..=row.position).for_each(|at| self.cache[&place(at)].hash(&mut hash));
                self.seen.push(hash.finish());
            }
        }
    }
}

/// Queues steps on a device.
struct Ahead {
    tables: SlotTables,
    device: Device,
    under_way: usize,
    /// Steps that began before the one before them was collected.
    ahead: usize,
    /// Whether a step ends only when nothing more can be planned.
    quiet: Option<Arc<AtomicBool>>,
}

impl Ahead {
    fn new(quiet: Option<Arc<AtomicBool>>) -> Self {
        let (tables, device) = (SlotTables::new(&config()).unwrap(), Device::default());
        Self { tables, device, under_way: 0, ahead: 0, quiet }
    }
}

impl Execute for Ahead {
    type Begun = ();
    type Queued = u64;
    type Error = Infallible;

    fn begin(&mut self, step: &Step) -> Result<(), Infallible> {
        self.ahead += self.under_way;
        self.under_way += 1;
        self.tables.apply(&step.plan).unwrap();
        let mut rows = Vec::new();
        for sequence in step.plan.sequences() {
            let table = &self.tables.tables(sequence.slot)[KvGroup::Full.index()];
            let blocks: Vec<u32> = table.blocks.iter().map(|block| block.0).collect();
            let silent = sequence.inputs.len() - sequence.logit_rows as usize;
            rows.extend((0..).zip(sequence.inputs).map(|(at, &input)| Row {
                input,
                position: sequence.start.0 + at,
                blocks: blocks.clone(),
                has_logits: at as usize >= silent,
            }));
        }
        self.device.queue.push_back(Queued::Forward(rows));
        Ok(())
    }

    fn draw(&mut self, (): (), step: &Step) -> Result<Progress<u64>, Infallible> {
        assert_eq!(self.under_way, 1, "the step before has been collected");
        let number = step.plan.step();
        self.device.queue.push_back(Queued::Draw { step: number, work: step.work.clone() });
        match self.quiet {
            Some(_) => Ok(Progress::Queued(number)),
            None => self.collect(number, step).map(Progress::Done),
        }
    }

    fn is_done(&mut self, _queued: &u64) -> Result<bool, Infallible> {
        Ok(self.quiet.as_ref().is_none_or(|quiet| quiet.load(Ordering::Acquire)))
    }

    fn collect(&mut self, queued: u64, _step: &Step) -> Result<Vec<RowOutput>, Infallible> {
        self.under_way -= 1;
        let sampled = |token| RowOutput::Sampled { token, logprob: None };
        Ok(self.device.wait(queued).into_iter().map(sampled).collect())
    }
}

fn request(random: &mut Random) -> Request {
    let spec = GenerationSpec {
        max_tokens: Some(1 + random.below(30) as u32),
        min_tokens: (random.below(4) == 0).then_some(1),
        seed: Some(random.below(1000) as u64),
        ..GenerationSpec::default()
    };
    Request {
        prompt: (0..1 + random.below(20))
            .map(|_| TokenId(random.below(VOCABULARY as usize) as u32))
            .collect(),
        generation: spec.validate(0, VOCABULARY).unwrap(),
        deadline: None,
        options: RequestOptions::default(),
    }
}

/// What became of each sequence.
#[derive(Default)]
struct Told {
    tokens: BTreeMap<u64, Vec<TokenId>>,
    ends: BTreeMap<u64, Finish>,
    preempted: usize,
}

impl Told {
    fn take(&mut self, effects: &mut Vec<Effect>) {
        for effect in effects.drain(..) {
            match effect {
                Effect::Token { seq, token, .. } => self.tokens.entry(seq.0).or_default().push(token),
                Effect::Finished { seq, finish, .. } => {
                    assert!(self.ends.insert(seq.0, finish).is_none(), "{seq} ends once");
                }
                Effect::Preempted { .. } => self.preempted += 1,
                _ => {}
            }
        }
    }
}

/// Sends the same requests through a pipeline, a few at a time; with `cancels`, some are given up on the way.
fn run(ahead: bool, cancels: bool) -> (Told, usize) {
    let (mut requests, mut choices) = (Random::new(SEED), Random::new(SEED + 1));
    let (mut pipeline, steps) = Pipeline::new(Engine::new(config()).unwrap());
    let quiet = Arc::new(AtomicBool::new(false));
    let mut executor = Ahead::new(ahead.then(|| Arc::clone(&quiet)));
    let (done, ran) = channel::<Box<Job>>();
    let (mut told, mut effects, mut submitted) = (Told::default(), Vec::new(), 0);
    let ahead = thread::scope(|scope| {
        let executor = scope.spawn(move || {
            let Ok(()) = steps.run_with(&mut executor, |job| done.send(job).unwrap());
            executor.ahead
        });
        loop {
            for _ in 0..choices.below(4) {
                if submitted < REQUESTS {
                    let event = Event::Submit { seq: SeqId(submitted), request: request(&mut requests) };
                    pipeline.apply(event, Micros(0), &mut effects);
                    submitted += 1;
                }
            }
            if cancels && submitted > 0 && choices.below(6) == 0 {
                let seq = SeqId(choices.below(submitted as usize) as u64);
                pipeline.apply(Event::Cancel(seq), Micros(0), &mut effects);
            }
            let Ok(()) = pipeline.advance(Micros(0), &mut effects, |_, _| Ok::<_, Infallible>(()));
            told.take(&mut effects);
            if pipeline.engine().steps_in_flight() == 0 {
                if submitted == REQUESTS {
                    break;
                }
                continue;
            }
            quiet.store(true, Ordering::Release);
            let job = ran.recv().unwrap();
            quiet.store(false, Ordering::Release);
            pipeline.answer(job, Micros(0), &mut effects);
            told.take(&mut effects);
        }
        drop(pipeline);
        executor.join().unwrap()
    });
    (told, ahead)
}

#[test]
fn a_run_queued_ahead_says_what_one_step_after_the_other_says() {
    let (expected, none) = run(false, false);
    assert_eq!(none, 0);
    assert_eq!(expected.ends.len() as u64, REQUESTS);
    let stopped = expected.ends.values().filter(|end| matches!(end, Finish::Eos(_))).count();
    assert!(stopped > 5 && expected.preempted > 0, "seed {SEED}: {stopped} stopped");
    let (said, ahead) = run(true, false);
    assert!(ahead > 20 && said.preempted > 0, "seed {SEED}: {ahead} steps began ahead");
    assert_eq!(said.ends, expected.ends, "seed {SEED}");
    assert_eq!(said.tokens, expected.tokens, "seed {SEED}");
}

#[test]
fn what_is_given_up_while_steps_are_queued_changes_nothing_for_the_others() {
    let (expected, _) = run(false, false);
    let (said, ahead) = run(true, true);
    assert!(ahead > 20, "seed {SEED}: {ahead} steps began ahead");
    let mut cancelled = 0;
    for (seq, end) in &expected.ends {
        let own = said.tokens.get(seq).map_or(&[][..], Vec::as_slice);
        let whole = expected.tokens.get(seq).map_or(&[][..], Vec::as_slice);
        if said.ends.get(seq) == Some(end) {
            assert_eq!(own, whole, "seed {SEED}, sequence {seq}");
        } else {
            assert!(whole.starts_with(own), "seed {SEED}, sequence {seq}: {own:?} of {whole:?}");
            cancelled += 1;
        }
    }
    assert!(cancelled > 3, "seed {SEED}: {cancelled} were given up");
}

/// Does nothing but note what it is asked, and fails where it is told to.
#[derive(Default)]
struct Noting {
    asked: Vec<(&'static str, u64)>,
    fails: Vec<(&'static str, u64)>,
}

impl Noting {
    fn note(&mut self, call: &'static str, step: u64) -> Result<(), (&'static str, u64)> {
        self.asked.push((call, step));
        if self.fails.contains(&(call, step)) { Err((call, step)) } else { Ok(()) }
    }
}

impl Execute for Noting {
    type Begun = u64;
    type Queued = u64;
    type Error = (&'static str, u64);

    fn begin(&mut self, step: &Step) -> Result<u64, Self::Error> {
        self.note("begin", step.plan.step()).map(|()| step.plan.step())
    }

    fn draw(&mut self, begun: u64, step: &Step) -> Result<Progress<u64>, Self::Error> {
        assert_eq!(begun, step.plan.step());
        self.note("draw", begun).map(|()| Progress::Queued(begun))
    }

    fn is_done(&mut self, _queued: &u64) -> Result<bool, Self::Error> {
        Ok(false)
    }

    fn collect(&mut self, queued: u64, step: &Step) -> Result<Vec<RowOutput>, Self::Error> {
        assert_eq!(queued, step.plan.step(), "what was collected is the step's");
        self.note("collect", queued)?;
        let sampled = RowOutput::Sampled { token: TokenId(1), logprob: None };
        Ok(step.work.iter().map(|_| sampled.clone()).collect())
    }

    fn idle(&self) -> Option<Duration> {
        Some(Duration::from_micros(3))
    }

    fn pause(&mut self) -> Result<(), Self::Error> {
        self.note("pause", 0)
    }
}

/// A pipeline that has given its executor two steps and then a pause, at which it stops.
fn two_steps() -> (Pipeline, Steps, Arc<FlightRecorder>) {
    let flight = Arc::new(FlightRecorder::default());
    let (mut pipeline, steps) = Pipeline::recorded(Engine::new(config()).unwrap(), Arc::clone(&flight));
    let mut effects = Vec::new();
    let mut random = Random::new(SEED);
    let mut request = request(&mut random);
    request.generation =
        GenerationSpec { max_tokens: Some(9), ..GenerationSpec::default() }.validate(0, VOCABULARY).unwrap();
    request.prompt.truncate(1);
    pipeline.apply(Event::Submit { seq: SeqId(1), request }, Micros(0), &mut effects);
    let Ok(()) = pipeline.advance(Micros(0), &mut effects, |_, _| Ok::<_, Infallible>(()));
    assert_eq!(pipeline.engine().steps_in_flight(), 2);
    pipeline.pause();
    (pipeline, steps, flight)
}

#[test]
fn a_step_begins_before_the_one_before_it_is_collected_and_is_drawn_behind_it() {
    let (mut pipeline, steps, flight) = two_steps();
    let mut executor = Noting { fails: vec![("pause", 0)], ..Noting::default() };
    let mut jobs = Vec::new();
    assert_eq!(steps.run_with(&mut executor, |job| jobs.push(job)), Err(("pause", 0)));
    let expected =
        [("begin", 1), ("draw", 1), ("begin", 2), ("collect", 1), ("draw", 2), ("collect", 2), ("pause", 0)];
    assert_eq!(executor.asked, expected);
    let mut effects = Vec::new();
    for job in jobs {
        pipeline.answer(job, Micros(1), &mut effects);
    }
    let told = flight.last(2);
    let noted: Vec<_> = told.iter().map(|step| (step.gap_us, step.idle_us)).collect();
    assert_eq!(noted, [(None, None), (Some(0), Some(3))], "the device was not kept waiting for the second");
    assert!(told.iter().all(|step| step.step_us.is_some()));
    assert_eq!((pipeline.gaps().summary().steps, pipeline.idle().summary().steps), (1, 1));
}

#[test]
fn a_failure_is_that_of_the_oldest_step_and_those_before_it_are_handed_back() {
    #[expect(clippy::type_complexity, reason = "a table that is read once")]
    let cases: [(&[(&str, u64)], (&str, u64), usize); 4] = [
        (&[("begin", 1)], ("begin", 1), 0),
        (&[("begin", 2)], ("begin", 2), 1),
        (&[("collect", 1), ("begin", 2)], ("collect", 1), 0),
        (&[("collect", 2)], ("collect", 2), 1),
    ];
    for (fails, expected, handed_back) in cases {
        let (_pipeline, steps, _) = two_steps();
        let mut executor = Noting { fails: fails.to_vec(), ..Noting::default() };
        let mut jobs = 0;
        assert_eq!(steps.run_with(&mut executor, |_| jobs += 1), Err(expected));
        assert_eq!(jobs, handed_back, "{fails:?}");
    }
}
