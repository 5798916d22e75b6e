//! The leader's engine thread: gather what happened, plan, send the plan, run it, pass the tokens on.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use collectives::PlanSender;
use engine::{Effect, Engine, Event, Step, StepOutput};
use proto::Failure;
use tokio_util::sync::CancellationToken;
use types::{GenerationSpec, Micros, SeqId, TokenId, TpRank};

use crate::executor::Executor;
use crate::follower::END;
use crate::inbox::{Inbox, Message, Outlet, Submission};
use crate::metrics::EngineCounters;
use crate::state::{State, StatePublisher};
use crate::streams::Streams;
use crate::{Config, Error};

/// How often the thread that watches the followers looks whether it is still needed.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// Everything the engine thread owns.
pub(crate) struct Leader {
    rank: TpRank,
    engine: Engine,
    executor: Executor,
    plans: PlanSender,
    outlet: Outlet,
    state: Arc<StatePublisher>,
    counters: EngineCounters,
    clock: Instant,
    open: Streams,
    next_id: u64,
    step: Step,
    frame: Vec<u8>,
    effects: Vec<Effect>,
}

/// What a leader is made of once the group has booted.
pub(crate) struct Seat {
    pub(crate) engine: engine::Config,
    pub(crate) executor: Executor,
    pub(crate) plans: PlanSender,
    pub(crate) outlet: Outlet,
    pub(crate) state: Arc<StatePublisher>,
    pub(crate) counters: EngineCounters,
}

impl Leader {
    pub(crate) fn new(rank: TpRank, seat: Seat) -> Result<Self, Error> {
        let engine = Engine::new(seat.engine).map_err(|source| Error::Engine { rank, source })?;
        Ok(Self {
            rank,
            engine,
            executor: seat.executor,
            plans: seat.plans,
            outlet: seat.outlet,
            state: seat.state,
            counters: seat.counters,
            clock: Instant::now(),
            open: Streams::default(),
            next_id: 0,
            step: Step::default(),
            frame: Vec::new(),
            effects: Vec::new(),
        })
    }

    /// One token from start to end, so that whatever is slow the first time is not a caller's first token, and a
    /// group that cannot compute never says it can.
    pub(crate) fn warm_up(&mut self) -> Result<(), Error> {
        let spec =
            GenerationSpec { max_tokens: Some(2), temperature: Some(0.0), ..GenerationSpec::default() };
        let generation = match spec.validate(0, self.engine.config().vocab_size) {
            Ok(generation) => generation,
            Err(error) => unreachable!("the warm-up request is valid: {error}"),
        };
        let prompt = vec![TokenId(0)];
        let request = engine::Request {
            prompt,
            generation,
            deadline: None,
            options: engine::RequestOptions::default(),
        };
        let (sink, mut answers) = tokio::sync::mpsc::channel(8);
        self.submit(Submission { request, deadline: None, sink });
        while self.step()? {}
        while let Ok(answer) = answers.try_recv() {
            answer.map_err(|status| Error::WarmUp { why: status.message().to_owned() })?;
        }
        Ok(())
    }

    /// Serves until told to stop, then finishes open requests within `config.drain_grace`.
    pub(crate) fn run(&mut self, config: &Config, shutdown: &CancellationToken) -> Result<(), Error> {
        let outcome = self.serve(config, shutdown);
        let why = match &outcome {
            Ok(()) => {
                Failure::Unavailable { why: "the group is stopping".into(), retry_after: proto::RETRY_AFTER }
            }
            Err(error) => Failure::GroupLost { group: config.model_name.clone(), why: error.to_string() },
        };
        self.end_all(&why);
        if outcome.is_ok() {
            self.plans.send(END).map_err(|source| Error::Group { rank: self.rank, source })?;
        }
        outcome
    }

    fn serve(&mut self, config: &Config, shutdown: &CancellationToken) -> Result<(), Error> {
        let mut drain_until = None;
        loop {
            if shutdown.is_cancelled() && drain_until.is_none() {
                self.state.set(State::Draining);
                drain_until = Some(Instant::now() + config.drain_grace);
            }
            if drain_until.is_some_and(|until| self.open.is_empty() || Instant::now() >= until) {
                return Ok(());
            }
            if self.engine.is_idle() {
                self.state.load(self.engine.load());
                match self.outlet.wait() {
                    Some(message) => self.take(message)?,
                    None => return Ok(()),
                }
            }
            while let Some(message) = self.outlet.next() {
                self.take(message)?;
            }
            self.cancel_abandoned();
            self.step()?;
            self.state.load_now_and_then(|| self.engine.load());
        }
    }

    fn take(&mut self, message: Message) -> Result<(), Error> {
        match message {
            Message::Submit(submission) => self.submit(*submission),
            Message::Lost { rank } => {
                let collective = "the plan channel";
                let source = collectives::Error::PeerLost { rank, collective };
                return Err(Error::Group { rank: self.rank, source });
            }
            Message::Wake => {}
        }
        Ok(())
    }

    fn now(&self) -> Micros {
        self.clock.elapsed().into()
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { mut request, deadline, sink } = submission;
        request.deadline = deadline.map(|at| at.saturating_duration_since(self.clock).into());
        self.counters.submitted(request.prompt.len());
        let seq = SeqId(self.next_id);
        let sequences = request.generation.sequences();
        self.next_id += u64::from(sequences);
        self.open.open(seq, sequences, request.options.first_stream, &sink);
        self.apply(Event::Submit { seq, request });
    }

    /// Cancels what nobody waits for any more; the blocks are free before the next step is planned.
    fn cancel_abandoned(&mut self) {
        for seq in self.open.take_abandoned() {
            self.apply(Event::Cancel(seq));
        }
    }

    fn apply(&mut self, event: Event) {
        let now = self.now();
        self.engine.apply(event, now, &mut self.effects);
        self.deliver();
    }

    /// Plans and runs one step; false when there is nothing to do.
    fn step(&mut self) -> Result<bool, Error> {
        let now = self.now();
        let planned = self.engine.plan_into(now, &mut self.step, &mut self.effects);
        self.deliver();
        if !planned {
            return Ok(false);
        }
        self.frame.clear();
        self.step.plan.encode(&mut self.frame);
        let rank = self.rank;
        self.plans.send(&self.frame).map_err(|source| Error::Group { rank, source })?;
        self.counters.stepped();
        let rows = self.executor.lead(&self.step.plan, &self.step.work)?;
        self.apply(Event::StepDone(StepOutput { step: self.step.plan.step(), rows }));
        Ok(true)
    }

    /// Passes effects on to the streams they belong to.
    fn deliver(&mut self) {
        for effect in self.effects.drain(..) {
            self.counters.count(&effect);
            self.open.deliver(effect);
        }
    }

    /// Ends every open request, and those still in the inbox, with the same status.
    fn end_all(&mut self, why: &Failure) {
        while let Some(message) = self.outlet.next() {
            if let Message::Submit(submission) = message {
                let _ = submission.sink.try_send(Err(why.to_status()));
            }
        }
        self.open.end_all(why);
    }

    /// Starts the thread that notices a follower's end while this one sleeps or computes.
    pub(crate) fn watch_followers(&self, inbox: Inbox, ended: CancellationToken) -> Result<(), Error> {
        if self.rank.size().get() == 1 {
            return Ok(());
        }
        let rank = self.rank;
        let watch = self.plans.watch().map_err(|source| Error::Group { rank, source })?;
        let spawned = thread::Builder::new().name("followers".into()).spawn(move || {
            while !ended.is_cancelled() {
                match watch.wait(WATCH_INTERVAL) {
                    Ok(None) => {}
                    Ok(Some(rank)) => return inbox.tell(Message::Lost { rank }),
                    Err(error) => return tracing::error!(%error, "the followers cannot be watched"),
                }
            }
        });
        spawned.map(drop).map_err(|source| Error::Start { what: "the follower watch", source })
    }
}
