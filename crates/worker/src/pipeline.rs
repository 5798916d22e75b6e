//! What lies between the engine and whoever runs its steps: two threads, and two steps that go round between them. The
//! engine's thread plans the next step while the executor runs one, so the executor finds it ready when it is done.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
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
        (Self { engine, jobs, spare, rested: true, gaps: Gaps::default(), flight }, Steps(steps))
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

    /// As [`Engine::apply`], for everything but results of steps.
    pub fn apply(&mut self, event: Event, now: Micros, effects: &mut Vec<Effect>) {
        self.engine.apply(event, now, effects);
    }

    /// Plans as many steps as may be in flight and can be planned now. Each is shown to `send`, then given to the executor.
    ///
    /// # Errors
    /// What `send` says.
    pub fn advance<E>(
        &mut self,
        now: Micros,
        effects: &mut Vec<Effect>,
        mut send: impl FnMut(&Step) -> Result<(), E>,
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
            send(&job.step)?;
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

    /// Takes a step back that has been run.
    pub fn answer(&mut self, mut job: Box<Job>, now: Micros, effects: &mut Vec<Effect>) {
        let gap = job.gap.take();
        if let Some(gap) = gap {
            self.gaps.record(gap);
        }
        self.flight.ran(job.step.plan.step(), gap, job.took);
        let rows = std::mem::take(&mut job.rows);
        let output = StepOutput { step: job.step.plan.step(), rows };
        self.engine.apply(Event::StepDone(output), now, effects);
        self.spare.push(job);
    }
}

impl Steps {
    /// Runs every step with `execute` and hands it back through `done`, until the pipeline is gone.
    ///
    /// # Errors
    /// What `execute` says; nothing is run after that.
    pub fn run<E>(
        self,
        mut execute: impl FnMut(&Step) -> Result<Vec<RowOutput>, E>,
        done: impl FnMut(Box<Job>),
    ) -> Result<(), E> {
        self.run_with(&mut (), |(), step| execute(step), |()| Ok(()), done)
    }

    /// As [`Steps::run`], with what `executor` does at a [`Pipeline::pause`].
    ///
    /// # Errors
    /// What `execute` and `pause` say; nothing is run after that.
    pub fn run_with<X, E>(
        self,
        executor: &mut X,
        mut execute: impl FnMut(&mut X, &Step) -> Result<Vec<RowOutput>, E>,
        mut pause: impl FnMut(&mut X) -> Result<(), E>,
        mut done: impl FnMut(Box<Job>),
    ) -> Result<(), E> {
        let mut ended: Option<Instant> = None;
        while let Ok(work) = self.0.recv() {
            let Work::Run(mut job) = work else {
                pause(executor)?;
                continue;
            };
            let begun = Instant::now();
            job.gap = ended.filter(|_| job.follows).map(|ended| begun.saturating_duration_since(ended));
            job.rows = execute(executor, &job.step)?;
            let end = Instant::now();
            job.took = end.saturating_duration_since(begun);
            ended = Some(end);
            done(job);
        }
        Ok(())
    }
}
