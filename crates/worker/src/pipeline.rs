//! What lies between the engine and whoever runs its steps: two threads, and two steps that go round between them. The
//! engine's thread plans the next step while the executor runs one, so the executor finds it ready when it is done. An
//! executor that queues work on a device begins the next step before the one before it has ended.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use engine::{Effect, Engine, Event, RowOutput, STEPS_IN_FLIGHT_MAX, Step, StepOutput};
use types::Micros;

use crate::flight::FlightRecorder;
use crate::gap::Gaps;

/// A step on its way to the executor and back. Its buffers are used again for a later step.
#[derive(Debug, Default)]
pub struct Job {
    step: Step,
    rows: Vec<RowOutput>,
    /// Whether there has been work ever since the step before was planned.
    follows: bool,
    /// How long the executor waited for it, when it follows.
    gap: Option<Duration>,
    /// How long it ran.
    took: Duration,
    /// How long the device had nothing to do before it, where it says so.
    idle: Option<Duration>,
}

/// What a step was like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ran {
    /// Rows computed.
    pub rows: usize,
    /// How long the executor waited for it, while there was work.
    pub gap: Option<Duration>,
    /// How long it ran.
    pub took: Duration,
}

/// What the executor is given.
#[derive(Debug)]
enum Work {
    Run(Box<Job>),
    /// Something else to do between two steps.
    Pause,
}

/// The engine, with the steps it has in flight.
#[derive(Debug)]
pub struct Pipeline {
    engine: Engine,
    jobs: SyncSender<Work>,
    #[expect(
        clippy::vec_box,
        reason = "a job travels as one pointer, through an inbox whose messages are small"
    )]
    spare: Vec<Box<Job>>,
    /// Whether the engine has had nothing to do since the last step was planned.
    rested: bool,
    gaps: Gaps,
    idle: Gaps,
    flight: Arc<FlightRecorder>,
}

/// The executor's end: the steps to run, in order.
#[derive(Debug)]
pub struct Steps(Receiver<Work>);

impl Pipeline {
    /// A pipeline around `engine`, and the executor's end of it.
    #[must_use]
    pub fn new(engine: Engine) -> (Self, Steps) {
        Self::recorded(engine, Arc::default())
    }

    /// As [`Pipeline::new`], with its steps recorded in `flight`.
    #[must_use]
    pub fn recorded(engine: Engine, flight: Arc<FlightRecorder>) -> (Self, Steps) {
        flight.begin(engine.config());
        // One step runs, the others and a pause wait here: sending never blocks.
        let (jobs, steps) = sync_channel(STEPS_IN_FLIGHT_MAX + 1);
        let spare = (0..STEPS_IN_FLIGHT_MAX).map(|_| Box::default()).collect();
        (
            Self { engine, jobs, spare, rested: true, gaps: Gaps::default(), idle: Gaps::default(), flight },
            Steps(steps),
        )
    }

    /// The engine.
    #[must_use]
    pub const fn engine(&self) -> &Engine {
        &self.engine
    }

    /// How long the executor waited between steps while there was work.
    #[must_use]
    pub const fn gaps(&self) -> &Gaps {
        &self.gaps
    }

    /// How long the device had nothing to do between steps while there was work, where it says so.
    #[must_use]
    pub const fn idle(&self) -> &Gaps {
        &self.idle
    }

    /// As [`Engine::apply`], for everything but results of steps.
    pub fn apply(&mut self, event: Event, now: Micros, effects: &mut Vec<Effect>) {
        self.engine.apply(event, now, effects);
    }

    /// Plans as many steps as may be in flight and can be planned now. Each is shown to `send`, with the effects that have come
    /// up so far, then given to the executor.
    ///
    /// # Errors
    /// What `send` says.
    pub fn advance<E>(
        &mut self,
        now: Micros,
        effects: &mut Vec<Effect>,
        mut send: impl FnMut(&Step, &[Effect]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.rested |= self.engine.is_idle();
        while let Some(mut job) = self.spare.pop() {
            let begun = Instant::now();
            if !self.engine.plan_into(now, &mut job.step, effects) {
                self.spare.push(job);
                break;
            }
            self.flight.planned(&job.step.plan, &self.engine.load(), begun.elapsed(), now);
            job.follows = !std::mem::take(&mut self.rested);
            send(&job.step, effects)?;
            // An executor that is gone says so on its own way.
            let _ = self.jobs.send(Work::Run(job));
        }
        Ok(())
    }

    /// Lets the executor do its other work when it has run the steps it was given; not again before it has.
    pub fn pause(&self) {
        // An executor that is gone says so on its own way.
        let _ = self.jobs.send(Work::Pause);
    }

    /// Takes a step back that has been run, and says what it was like.
    pub fn answer(&mut self, mut job: Box<Job>, now: Micros, effects: &mut Vec<Effect>) -> Ran {
        let gap = job.gap.take();
        if let Some(gap) = gap {
            self.gaps.record(gap);
        }
        let idle = job.idle.take();
        if let Some(idle) = idle.filter(|_| gap.is_some()) {
            self.idle.record(idle);
        }
        self.flight.ran(job.step.plan.step(), (gap, idle), job.took);
        let ran = Ran { rows: job.step.plan.inputs().len(), gap, took: job.took };
        let rows = std::mem::take(&mut job.rows);
        let output = StepOutput { step: job.step.plan.step(), rows };
        self.engine.apply(Event::StepDone(output), now, effects);
        self.spare.push(job);
        ran
    }
}

/// What runs steps. A step goes through three calls, and between the last two of them the next one may begin.
pub trait Execute {
    /// A step that has begun.
    type Begun;
    /// A step whose results are on their way.
    type Queued;
    /// Why it cannot go on.
    type Error;

    /// Begins a step. The one before it may be on its way still; what that draws is then known to the device alone.
    ///
    /// # Errors
    /// When nothing can be run any more.
    fn begin(&mut self, step: &Step) -> Result<Self::Begun, Self::Error>;

    /// Has the tokens of a step drawn. The results of all steps before it have been collected.
    ///
    /// # Errors
    /// As [`Execute::begin`].
    fn draw(&mut self, begun: Self::Begun, step: &Step) -> Result<Progress<Self::Queued>, Self::Error>;

    /// Whether [`Execute::collect`] would not wait.
    ///
    /// # Errors
    /// As [`Execute::begin`].
    fn is_done(&mut self, queued: &Self::Queued) -> Result<bool, Self::Error>;

    /// The results of a step, when they are there.
    ///
    /// # Errors
    /// As [`Execute::begin`].
    fn collect(&mut self, queued: Self::Queued, step: &Step) -> Result<Vec<RowOutput>, Self::Error>;

    /// How long the device had nothing to do before the step that was collected last, where it says so.
    fn idle(&self) -> Option<Duration> {
        None
    }

    /// What is to be done at a [`Pipeline::pause`], when no step is on its way.
    ///
    /// # Errors
    /// As [`Execute::begin`].
    fn pause(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// How far a step has come whose tokens are to be drawn.
#[derive(Debug)]
pub enum Progress<Q> {
    /// It has ended, with these results: the next one begins behind it.
    Done(Vec<RowOutput>),
    /// It is on its way: the next one may begin.
    Queued(Q),
}

/// Runs a step in one piece.
struct AtOnce<F>(F);

impl<E, F: FnMut(&Step) -> Result<Vec<RowOutput>, E>> Execute for AtOnce<F> {
    type Begun = ();
    type Queued = Infallible;
    type Error = E;

    fn begin(&mut self, _step: &Step) -> Result<(), E> {
        Ok(())
    }

    fn draw(&mut self, (): (), step: &Step) -> Result<Progress<Infallible>, E> {
        (self.0)(step).map(Progress::Done)
    }

    fn is_done(&mut self, queued: &Infallible) -> Result<bool, E> {
        match *queued {}
    }

    fn collect(&mut self, queued: Infallible, _step: &Step) -> Result<Vec<RowOutput>, E> {
        match queued {}
    }
}

/// A step on its way, and when the executor had nothing else to wait for.
struct OnItsWay<Q> {
    job: Box<Job>,
    queued: Q,
    since: Instant,
}

impl Steps {
    /// Runs every step with `execute` and hands it back through `done`, until the pipeline is gone.
    ///
    /// # Errors
    /// What `execute` says; nothing is run after that.
    pub fn run<E>(
        self,
        execute: impl FnMut(&Step) -> Result<Vec<RowOutput>, E>,
        done: impl FnMut(Box<Job>),
    ) -> Result<(), E> {
        self.run_with(&mut AtOnce(execute), done)
    }

    /// As [`Steps::run`], by an executor that may begin a step before the one before it has ended. Steps are collected and
    /// handed back in order. Where an error ends it all, the steps before the one that failed have been handed back.
    ///
    /// # Errors
    /// What `executor` says; nothing is run after that.
    pub fn run_with<X: Execute>(
        self,
        executor: &mut X,
        mut done: impl FnMut(Box<Job>),
    ) -> Result<(), X::Error> {
        let mut ended: Option<Instant> = None;
        let mut under_way: Option<OnItsWay<X::Queued>> = None;
        while let Some(work) = self.next(executor, &mut under_way, (&mut ended, &mut done))? {
            let Work::Run(mut job) = work else {
                collect(executor, &mut under_way, (&mut ended, &mut done))?;
                executor.pause()?;
                continue;
            };
            let since = Instant::now();
            // A device that is at work is not kept waiting.
            let waited = match under_way {
                Some(_) => Some(Duration::ZERO),
                None => ended.map(|ended| since.saturating_duration_since(ended)),
            };
            job.gap = waited.filter(|_| job.follows);
            let begun = executor.begin(&job.step);
            collect(executor, &mut under_way, (&mut ended, &mut done))?;
            let since = ended.map_or(since, |ended| ended.max(since));
            match executor.draw(begun?, &job.step)? {
                Progress::Queued(queued) => under_way = Some(OnItsWay { job, queued, since }),
                Progress::Done(rows) => {
                    job.rows = rows;
                    hand_back(executor, job, since, (&mut ended, &mut done));
                }
            }
        }
        collect(executor, &mut under_way, (&mut ended, &mut done))
    }

    /// The next thing to do; meanwhile what ends is handed back. `None` when the pipeline is gone.
    fn next<X: Execute>(
        &self,
        executor: &mut X,
        under_way: &mut Option<OnItsWay<X::Queued>>,
        (ended, done): (&mut Option<Instant>, &mut impl FnMut(Box<Job>)),
    ) -> Result<Option<Work>, X::Error> {
        while let Some(one) = under_way {
            match self.0.try_recv() {
                Ok(work) => return Ok(Some(work)),
                Err(TryRecvError::Disconnected) => return Ok(None),
                Err(TryRecvError::Empty) if executor.is_done(&one.queued)? => {
                    collect(executor, under_way, (ended, done))?;
                }
                Err(TryRecvError::Empty) => std::hint::spin_loop(),
            }
        }
        Ok(self.0.recv().ok())
    }
}

/// Waits for the step on its way, if there is one, and hands it back.
fn collect<X: Execute>(
    executor: &mut X,
    under_way: &mut Option<OnItsWay<X::Queued>>,
    (ended, done): (&mut Option<Instant>, &mut impl FnMut(Box<Job>)),
) -> Result<(), X::Error> {
    if let Some(OnItsWay { mut job, queued, since }) = under_way.take() {
        job.rows = executor.collect(queued, &job.step)?;
        hand_back(executor, job, since, (ended, done));
    }
    Ok(())
}

fn hand_back<X: Execute>(
    executor: &X,
    mut job: Box<Job>,
    since: Instant,
    (ended, done): (&mut Option<Instant>, &mut impl FnMut(Box<Job>)),
) {
    let end = Instant::now();
    job.took = end.saturating_duration_since(since);
    job.idle = executor.idle();
    *ended = Some(end);
    done(job);
}
