//! The leader's engine thread: gather what happened, plan, send the plan, pass the tokens on. The executor runs the steps
//! on the thread the model was loaded on; while it runs one, the next is planned and sent here.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use collectives::PlanSender;
use engine::{Briefings, Drawn, Effect, Engine, Event, Step};
use model::Activity;
use proto::Failure;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use types::{GenerationSpec, Micros, SeqId, TokenId, TpRank, TpSize};

use crate::flight::FlightRecorder;
use crate::follower::{ACTIVITY, END};
use crate::guide::Guides;
use crate::inbox::{Asker, Inbox, Message, Outlet, Submission};
use crate::metrics::EngineCounters;
use crate::numerics::Numerics;
use crate::pipeline::{Pipeline, Steps};
use crate::state::{State, StatePublisher};
use crate::streams::Streams;
use crate::traced::Notes;
use crate::{Config, Error, GapSummary, Report, Reporter};

/// How often the thread that watches the followers looks whether it is still needed.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// How often steps are held up at most for what the ranks have done.
const ACTIVITY_INTERVAL: Duration = Duration::from_millis(250);
/// Callers that may wait for that.
const ASKERS_MAX: usize = 64;

/// The plan channel: the engine thread sends plans on it and how to sample them, the executor's what they drew or may draw.
#[derive(Clone)]
pub(crate) struct Plans {
    rank: TpRank,
    sub_groups: u32,
    sender: Arc<Mutex<PlanSender>>,
    /// Steps for which other sub-groups wait for masks. A sequence may end before its step runs, so this cannot be told
    /// from the guides then.
    promised: Arc<Mutex<VecDeque<u64>>>,
}

impl Plans {
    pub(crate) fn new(rank: TpRank, engine: &engine::Config, sender: PlanSender) -> Self {
        let (sub_groups, sender) = (engine.data_parallel, Arc::new(Mutex::new(sender)));
        Self { rank, sub_groups, sender, promised: Arc::default() }
    }

    /// Sends what `encode` puts into `frame`, which is only memory. A group of one has nobody to tell.
    fn send(&self, frame: &mut Vec<u8>, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), Error> {
        if self.rank.size() == TpSize::ONE {
            return Ok(());
        }
        frame.clear();
        encode(frame);
        // A write waits at most until the followers have run the step they are at, which needs no other frame.
        let sent = self.sender.lock().unwrap_or_else(PoisonError::into_inner).send(frame);
        sent.map_err(|source| Error::Group { rank: self.rank, source })
    }

    /// Tells the followers of a step, and other sub-groups than the leader's how to sample it.
    fn step(
        &self,
        frame: &mut Vec<u8>,
        step: &Step,
        (briefings, guides): (&mut Briefings, &Guides),
    ) -> Result<(), Error> {
        self.send(frame, |frame| step.plan.encode(frame))?;
        if self.sub_groups == 1 {
            return Ok(());
        }
        let mut guided = false;
        self.send(frame, |frame| guided = briefings.encode(step, |seq| guides.guide(seq), frame))?;
        if guided {
            self.promised.lock().unwrap_or_else(PoisonError::into_inner).push_back(step.plan.step());
        }
        Ok(())
    }

    /// Tells other sub-groups what their guided `rows` of a step may draw, when they wait for it.
    pub(crate) fn masks(
        &self,
        frame: &mut Vec<u8>,
        step: &Step,
        guides: &Guides,
        rows: &mut dyn Iterator<Item = usize>,
    ) -> Result<(), Error> {
        let number = step.plan.step();
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        if promised.front() != Some(&number) {
            return Ok(());
        }
        promised.pop_front();
        drop(promised);
        let masks = guides.masks(step, rows);
        self.send(frame, |frame| masks.encode(frame))
    }

    /// Tells the followers what a step drew. Ranks of several sub-groups have told each other.
    pub(crate) fn drawn(&self, frame: &mut Vec<u8>, drawn: &Drawn) -> Result<(), Error> {
        if self.sub_groups > 1 || drawn.tokens().is_empty() {
            return Ok(());
        }
        self.send(frame, |frame| drawn.encode(frame))
    }
}

/// Tells all `askers` what the ranks have done.
fn answer(askers: &mut Vec<oneshot::Sender<Vec<Activity>>>, ranks: &[Activity]) {
    for asker in askers.drain(..) {
        // Nobody waits any more when the call was given up.
        let _ = asker.send(ranks.to_vec());
    }
}

/// Tells the followers which slots belong to traced requests, if any do.
fn note(notes: &mut Notes, effects: &[Effect], open: &Streams, (plans, frame): (&Plans, &mut Vec<u8>)) {
    notes.take(
        effects,
        |seq| open.traced(seq),
        |note| {
            if let Err(error) = plans.send(frame, |frame| note.encode(frame)) {
                // The next plan finds it out too, and ends the group.
                tracing::debug!(%error, "followers were not told of a trace");
            }
        },
    );
}

/// Everything the engine thread owns.
pub(crate) struct Leader {
    rank: TpRank,
    pipeline: Pipeline,
    plans: Plans,
    outlet: Outlet,
    state: Arc<StatePublisher>,
    counters: EngineCounters,
    clock: Instant,
    open: Streams,
    notes: Notes,
    guides: Arc<Guides>,
    next_id: u64,
    frame: Vec<u8>,
    effects: Vec<Effect>,
    briefings: Briefings,
    /// Who wants to know what the ranks have done; at most [`ASKERS_MAX`].
    askers: Vec<oneshot::Sender<Vec<Activity>>>,
    /// Whether the ranks are telling it now.
    asked: bool,
    reporter: Arc<dyn Reporter>,
    /// What they told last.
    told: Option<Told>,
    /// Steps that were run.
    steps: u64,
}

/// What the ranks have done.
struct Told {
    at: Instant,
    /// Steps that are counted in it.
    steps: u64,
    ranks: Vec<Activity>,
}

/// What a leader is made of once the group has booted.
pub(crate) struct Seat {
    pub(crate) engine: engine::Config,
    pub(crate) guides: Arc<Guides>,
    pub(crate) plans: Plans,
    pub(crate) outlet: Outlet,
    pub(crate) state: Arc<StatePublisher>,
    pub(crate) counters: EngineCounters,
    pub(crate) flight: Arc<FlightRecorder>,
    pub(crate) reporter: Arc<dyn Reporter>,
}

impl Leader {
    /// A leader, and the steps an executor must run for it.
    pub(crate) fn new(rank: TpRank, seat: Seat) -> Result<(Self, Steps), Error> {
        let briefings = Briefings::new(&seat.engine);
        let engine = Engine::new(seat.engine).map_err(|source| Error::Engine { rank, source })?;
        let (pipeline, steps) = Pipeline::recorded(engine, seat.flight);
        let times = seat.counters.times().clone();
        let leader = Self {
            rank,
            pipeline,
            plans: seat.plans,
            outlet: seat.outlet,
            state: seat.state,
            counters: seat.counters,
            clock: Instant::now(),
            open: Streams::new(Arc::clone(&seat.guides), times),
            notes: Notes::default(),
            guides: seat.guides,
            next_id: 0,
            briefings,
            frame: Vec::new(),
            effects: Vec::new(),
            askers: Vec::new(),
            asked: false,
            reporter: seat.reporter,
            told: None,
            steps: 0,
        };
        Ok((leader, steps))
    }

    /// Names the layer to requests whose logits are no numbers.
    pub(crate) fn explain_with(&mut self, numerics: Option<Numerics>) {
        self.open.explain_with(numerics);
    }

    /// A token or two from start to end on every sub-group, so that whatever is slow the first time is not a caller's first token, and a
    /// group that cannot compute never says it can.
    pub(crate) fn warm_up(&mut self) -> Result<(), Error> {
        let spec =
            GenerationSpec { max_tokens: Some(2), temperature: Some(0.0), ..GenerationSpec::default() };
        let generation = match spec.validate(0, self.pipeline.engine().config().vocab_size) {
            Ok(generation) => generation,
            Err(error) => unreachable!("the warm-up request is valid: {error}"),
        };
        let engine::Config { data_parallel, waiting_requests_max, .. } = *self.pipeline.engine().config();
        // Equal requests that come together run on a sub-group each.
        let requests = data_parallel.min(waiting_requests_max);
        let (sink, mut answers) = tokio::sync::mpsc::channel(8 * requests as usize);
        for _ in 0..requests {
            let request = engine::Request {
                prompt: vec![TokenId(0)],
                generation: generation.clone(),
                deadline: None,
                options: engine::RequestOptions::default(),
            };
            let sink = sink.clone();
            self.submit(Submission {
                request,
                deadline: None,
                sink,
                key: 0,
                guides: Vec::new(),
                asker: Asker::default(),
            });
        }
        self.turn()?;
        while self.is_busy() && self.wait()? {
            self.turn()?;
        }
        while let Ok(answer) = answers.try_recv() {
            answer.map_err(|status| Error::WarmUp { why: status.message().to_owned() })?;
        }
        Ok(())
    }

    /// Serves until told to stop, then finishes open requests within `config.drain_grace`.
    pub(crate) fn run(&mut self, config: &Config, shutdown: &CancellationToken) -> Result<(), Error> {
        let outcome = self.serve(config, shutdown).and_then(|()| self.settle());
        let GapSummary { steps, p50_us, p99_us } = self.pipeline.gaps().summary();
        tracing::info!(steps, p50_us, p99_us, "host gap between steps");
        let GapSummary { steps, p50_us, p99_us } = self.pipeline.idle().summary();
        if steps > 0 {
            tracing::info!(steps, p50_us, p99_us, "the card had nothing to do between steps");
        }
        let [ready, late] = self.guides.counts();
        if ready + late > 0 {
            tracing::info!(ready, late, "masks that were ready when the sampler came, and that were not");
        }
        let why = match &outcome {
            Ok(()) => {
                Failure::Unavailable { why: "the group is stopping".into(), retry_after: proto::RETRY_AFTER }
            }
            Err(error) => Failure::GroupLost { group: config.model_name.clone(), why: error.to_string() },
        };
        self.end_all(&why);
        if outcome.is_ok() {
            self.plans.send(&mut self.frame, |frame| frame.extend_from_slice(END))?;
        }
        outcome
    }

    /// Waits for the steps in flight: the executor has its part in them, whoever they were for.
    fn settle(&mut self) -> Result<(), Error> {
        while self.pipeline.engine().steps_in_flight() > 0 && self.wait()? {}
        Ok(())
    }

    fn serve(&mut self, config: &Config, shutdown: &CancellationToken) -> Result<(), Error> {
        let mut drain_until = None;
        loop {
            // Before the order to stop is looked at: this may take the message that would wake the thread for it.
            self.turn()?;
            if shutdown.is_cancelled() && drain_until.is_none() {
                self.state.set(State::Draining);
                drain_until = Some(Instant::now() + config.drain_grace);
            }
            if drain_until.is_some_and(|until| self.open.is_empty() || Instant::now() >= until) {
                return Ok(());
            }
            let Self { pipeline, counters, .. } = &*self;
            let load = || {
                let load = pipeline.engine().load();
                counters.load(&load);
                (load, pipeline.gaps().summary(), pipeline.idle().summary())
            };
            if self.is_busy() {
                self.state.load_now_and_then(load);
            } else {
                self.state.load(load());
            }
            if !self.wait()? {
                return Ok(());
            }
        }
    }

    /// Takes in what has happened, and plans what can be planned.
    fn turn(&mut self) -> Result<(), Error> {
        while let Some(message) = self.outlet.next() {
            self.take(message)?;
        }
        self.cancel_abandoned();
        self.ask()?;
        let now = self.now();
        let Self { pipeline, plans, effects, frame, briefings, guides, open, notes, .. } = self;
        let send = |step: &Step, effects: &[Effect]| {
            note(notes, effects, open, (plans, frame));
            plans.step(frame, step, (&mut *briefings, &**guides))
        };
        let sent = pipeline.advance(now, effects, send);
        self.deliver();
        sent
    }

    /// Has all ranks tell what they have done, between two steps, when somebody asks. What they told is still true when no
    /// step was run since, and while steps run they are asked now and then only, however many callers there are: one who
    /// comes too early waits for the next step after that.
    fn ask(&mut self) -> Result<(), Error> {
        if self.askers.is_empty() || self.asked {
            return Ok(());
        }
        match &self.told {
            Some(told) if told.steps == self.steps => {
                answer(&mut self.askers, &told.ranks);
                return Ok(());
            }
            Some(told) if self.is_busy() && told.at.elapsed() < ACTIVITY_INTERVAL => return Ok(()),
            _ => {}
        }
        self.asked = true;
        self.plans.send(&mut self.frame, |frame| frame.extend_from_slice(ACTIVITY))?;
        self.pipeline.pause();
        Ok(())
    }

    /// Sleeps until something happens, and takes it in; false when nothing can happen any more.
    fn wait(&mut self) -> Result<bool, Error> {
        let Some(message) = self.outlet.wait() else { return Ok(false) };
        self.take(message)?;
        Ok(true)
    }

    fn is_busy(&self) -> bool {
        !self.pipeline.engine().is_idle() || self.pipeline.engine().steps_in_flight() > 0
    }

    fn take(&mut self, message: Message) -> Result<(), Error> {
        match message {
            Message::Submit(submission) => self.submit(*submission),
            Message::Ran(job) => {
                self.steps += 1;
                let now = self.now();
                let ran = self.pipeline.answer(job, now, &mut self.effects);
                self.counters.stepped(ran);
                self.deliver();
            }
            Message::Stopped { why } => return Err(Error::Stopped { rank: self.rank, why }),
            Message::Lost { rank } => {
                let collective = "the plan channel";
                let source = collectives::Error::PeerLost { rank, collective };
                return Err(Error::Group { rank: self.rank, source });
            }
            // One too many is dropped, which its caller sees.
            Message::Activity(asker) if self.askers.len() < ASKERS_MAX => self.askers.push(asker),
            Message::Activity(_) => {}
            Message::Told(ranks) => {
                self.asked = false;
                answer(&mut self.askers, &ranks);
                // The executor has said of each step before that it was run.
                self.told = Some(Told { at: Instant::now(), steps: self.steps, ranks });
            }
            Message::Cancel { key, index } => {
                if let Some(seq) = self.open.take(key, index) {
                    self.apply(Event::Cancel(seq));
                }
            }
            Message::Beat => self.reporter.report(Report::Alive),
            Message::Wake => {}
        }
        Ok(())
    }

    fn now(&self) -> Micros {
        self.clock.elapsed().into()
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { mut request, deadline, sink, key, guides, asker } = submission;
        request.deadline = deadline.map(|at| at.saturating_duration_since(self.clock).into());
        self.counters.submitted(request.prompt.len());
        let seq = SeqId(self.next_id);
        self.next_id += u64::from(request.generation.sequences());
        self.open.open(seq..SeqId(self.next_id), request.options.first_stream, (key, &asker), &sink);
        for (own, guide) in (seq.0..).map(SeqId).zip(guides) {
            self.guides.open(own, guide, Arc::clone(&asker.request));
        }
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
        self.pipeline.apply(event, now, &mut self.effects);
        self.deliver();
    }

    /// Passes effects on to the streams they belong to.
    fn deliver(&mut self) {
        let Self { notes, effects, open, plans, frame, .. } = self;
        note(notes, effects, open, (plans, frame));
        notes.delivered();
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
        let watch = self.plans.sender.lock().unwrap_or_else(PoisonError::into_inner).watch();
        let watch = watch.map_err(|source| Error::Group { rank, source })?;
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
