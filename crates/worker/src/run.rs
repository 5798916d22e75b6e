//! A rank from start to end.

use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use collectives::PlanChannel;
use engine::{RowOutput, Step};
use proto::worker::ModelFacts;
use tokio_util::sync::CancellationToken;
use types::Bytes;

use crate::boot::{self, Booted, Facts};
use crate::device::QueuedForward;
use crate::executor::{Drawing, Executor};
use crate::flight::{DumpOnPanic, FlightRecorder};
use crate::follower::Followed;
use crate::guide::Guides;
use crate::inbox::{Inbox, Message, Outlet};
use crate::leader::{Leader, Plans, Seat};
use crate::metrics::{FollowerMetrics, Metrics};
use crate::pipeline::{Execute, Progress, Steps};
use crate::pulse::Pulse;
use crate::server::{FollowerServer, GrpcServer};
use crate::state::{State, StatePublisher};
use crate::{Config, Error, Phase, Report, Reporter, follower};

/// Runs one rank until `shutdown` is cancelled and open requests are done (leader), or until its leader ends
/// (follower). Blocks; the model runs on the calling thread.
///
/// # Errors
/// Whatever keeps the rank from starting, or ends its group. The process should then exit: the group is the unit of
/// recovery.
pub fn run(config: &Config, reporter: &Arc<dyn Reporter>, shutdown: &CancellationToken) -> Result<(), Error> {
    if config.rank.is_leader() {
        lead(config, reporter, shutdown)
    } else {
        follow(config, reporter, shutdown)
    }
}

fn phase(reporter: &Arc<dyn Reporter>, phase: Phase) {
    reporter.report(Report::Phase { phase, done: Bytes(0), total: Bytes(0) });
}

fn follow(config: &Config, reporter: &Arc<dyn Reporter>, shutdown: &CancellationToken) -> Result<(), Error> {
    let started = Instant::now();
    let (state, metrics) = (Arc::new(StatePublisher::new()), Arc::new(FollowerMetrics::new(config)));
    let _server = FollowerServer::start(config, &metrics, &state)?;
    let loading = Arc::clone(&metrics);
    let reporter: &Arc<dyn Reporter> = &(Arc::new(Both {
        reporter: Arc::clone(reporter),
        state,
        loading: Box::new(move |done, total| loading.loading(done, total)),
    }) as Arc<dyn Reporter>);
    phase(reporter, Phase::Starting);
    let facts = boot::facts(config)?;
    let engine = facts.engine.clone();
    let joined = boot::meet(config, &facts, reporter.as_ref())?;
    let Booted { model, plans, abort } = boot::load(config, facts, joined, reporter)?;
    let executor = Executor::new(config.rank, config.tensor, model, &engine)?;
    let plans = match plans {
        PlanChannel::Follower(plans) => plans,
        PlanChannel::Leader(_) => unreachable!("only rank 0 is given the leader's end"),
    };
    let hang_up = plans.hang_up().map_err(|source| Error::Group { rank: config.rank, source })?;
    phase(reporter, Phase::Serving);
    reporter.report(Report::Ready { elapsed: started.elapsed() });
    let tell = Arc::clone(reporter);
    let _pulse = Pulse::start(move || tell.report(Report::Alive))?;
    follower::run_until_stopped(config, shutdown, (abort, hang_up), || {
        follower::run(config, Followed { executor, engine, clock: metrics.clock() }, plans)
    })
}

fn lead(config: &Config, reporter: &Arc<dyn Reporter>, shutdown: &CancellationToken) -> Result<(), Error> {
    let (inbox, outlet) = Inbox::new();
    let state = Arc::new(StatePublisher::new());
    let metrics = Arc::new(Metrics::new(config));
    let flight = Arc::new(FlightRecorder::default());
    let server = GrpcServer::start(config, inbox.clone(), &state, &metrics, &flight)?;
    reporter.report(Report::Listening(server.address()));
    let front = Front { config, reporter, state, inbox, metrics, flight: Arc::clone(&flight) };
    let on_panic = DumpOnPanic { flight: &flight, config };
    let outcome = lead_behind(&front, outlet, shutdown);
    if let Err(error) = &outcome {
        flight.dump(config.fault_dir.as_deref(), &config.model_name, &error.to_string());
    }
    drop(on_panic);
    let closed = server.close();
    outcome.and(closed)
}

/// What the leader shares with its server.
struct Front<'a> {
    config: &'a Config,
    reporter: &'a Arc<dyn Reporter>,
    state: Arc<StatePublisher>,
    inbox: Inbox,
    metrics: Arc<Metrics>,
    flight: Arc<FlightRecorder>,
}

/// Reports to whoever started the rank, and keeps routers informed of the phase.
struct Both {
    reporter: Arc<dyn Reporter>,
    state: Arc<StatePublisher>,
    /// Told how much of the weights is there.
    loading: Box<dyn Fn(Bytes, Bytes) + Send + Sync>,
}

impl Reporter for Both {
    fn report(&self, event: Report) {
        if let Report::Phase { phase, done, total } = &event {
            if *phase == Phase::Loading {
                (self.loading)(*done, *total);
            }
            let percent = (done.0 * 100).checked_div(total.0).unwrap_or(0);
            let percent = u32::try_from(percent).unwrap_or(100);
            match phase {
                Phase::Starting | Phase::Loading | Phase::Warming => {
                    self.state.set(State::Booting { phase: *phase, percent });
                }
                Phase::Serving => self.state.set(State::Serving),
                Phase::Draining => self.state.set(State::Draining),
            }
        }
        self.reporter.report(event);
    }
}

fn lead_behind(front: &Front<'_>, outlet: Outlet, shutdown: &CancellationToken) -> Result<(), Error> {
    let Front { config, state, inbox, metrics, flight, .. } = front;
    let (counters, loading) = (metrics.engine(), Arc::clone(metrics));
    let started = Instant::now();
    let reporter: Arc<dyn Reporter> = Arc::new(Both {
        reporter: Arc::clone(front.reporter),
        state: Arc::clone(state),
        loading: Box::new(move |done, total| loading.loading(done, total)),
    });
    phase(&reporter, Phase::Starting);
    let facts = boot::facts(config)?;
    state.model(model_facts(config, &facts));
    let engine = facts.engine.clone();
    let joined = boot::meet(config, &facts, reporter.as_ref())?;
    let Booted { model, plans, .. } = boot::load(config, facts, joined, &reporter)?;
    let plans = match plans {
        PlanChannel::Leader(plans) => plans,
        PlanChannel::Follower(_) => unreachable!("rank 0 is given the leader's end"),
    };
    let numerics = model.numerics();
    let executor = Executor::new(config.rank, config.tensor, model, &engine)?;
    let plans = Plans::new(config.rank, &engine, plans);
    let guides = Guides::start().map_err(|source| Error::Start { what: "the mask threads", source })?;
    let guides = Arc::new(guides);
    let (own, state, counters) = (Arc::clone(&guides), Arc::clone(state), counters);
    let flight = Arc::clone(flight);
    let seat = Seat {
        engine,
        guides: own,
        plans: plans.clone(),
        outlet,
        state,
        counters,
        flight,
        reporter: Arc::clone(&reporter),
    };
    let (mut leader, steps) = Leader::new(config.rank, seat)?;
    leader.explain_with(numerics);
    let ended = CancellationToken::new();
    let _ended_on_return = ended.clone().drop_guard();
    leader.watch_followers(inbox.clone(), ended.clone())?;
    let decide = move || {
        phase(&reporter, Phase::Warming);
        leader.warm_up()?;
        wake_on(shutdown, inbox.clone(), ended)?;
        let asked = inbox.clone();
        let _pulse = Pulse::start(move || asked.beat())?;
        phase(&reporter, Phase::Serving);
        reporter.report(Report::Ready { elapsed: started.elapsed() });
        leader.run(config, shutdown)
    };
    std::thread::scope(|scope| {
        let engine = std::thread::Builder::new().name("engine".into()).spawn_scoped(scope, decide);
        let engine = engine.map_err(|source| Error::Start { what: "the engine's thread", source })?;
        // The model stays on the thread it was loaded on.
        let executed = execute(executor, steps, &plans, (inbox, &guides));
        let decided = engine.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        executed.and(decided)
    })
}

/// Runs the engine's steps until it has no more, and tells it when that cannot go on.
fn execute(
    executor: Executor,
    steps: Steps,
    plans: &Plans,
    (inbox, guides): (&Inbox, &Arc<Guides>),
) -> Result<(), Error> {
    /// Tells the engine's thread, which would otherwise wait for ever, however this thread ends.
    struct Stopped<'a>(&'a Inbox, String);
    impl Drop for Stopped<'_> {
        fn drop(&mut self) {
            self.0.tell(Message::Stopped { why: std::mem::take(&mut self.1) });
        }
    }
    let mut stopped = Stopped(inbox, "the executor panicked".into());
    let mut lead = Lead { executor, plans, guides, inbox, frame: Vec::new() };
    let executed = steps.run_with(&mut lead, |job| inbox.tell(Message::Ran(job)));
    stopped.1 = executed.as_ref().err().map_or_else(|| "there are no more".into(), Error::to_string);
    executed
}

/// The leader's executor, and whom it tells what.
struct Lead<'a> {
    executor: Executor,
    plans: &'a Plans,
    guides: &'a Arc<Guides>,
    inbox: &'a Inbox,
    frame: Vec<u8>,
}

impl Execute for Lead<'_> {
    type Begun = QueuedForward;
    type Queued = Drawing;
    type Error = Error;

    fn begin(&mut self, step: &Step) -> Result<QueuedForward, Error> {
        self.executor.begin(&step.plan)
    }

    fn draw(&mut self, begun: QueuedForward, step: &Step) -> Result<Progress<Drawing>, Error> {
        let Self { executor, plans, guides, frame, .. } = self;
        let tell = |others: &mut dyn Iterator<Item = usize>| plans.masks(frame, step, guides, others);
        let progress = executor.draw(begun, step, &mut guides.as_ref(), tell)?;
        // Ranks whose device knows what was drawn need not hear it.
        if !executor.feeds() {
            plans.drawn(frame, &executor.drawn)?;
        }
        Ok(progress)
    }

    fn is_done(&mut self, queued: &Drawing) -> Result<bool, Error> {
        self.executor.is_drawn(queued)
    }

    fn collect(&mut self, queued: Drawing, step: &Step) -> Result<Vec<RowOutput>, Error> {
        self.executor.collect(queued, step, &mut self.guides.as_ref())
    }

    fn idle(&self) -> Option<Duration> {
        self.executor.idle()
    }

    fn pause(&mut self) -> Result<(), Error> {
        self.inbox.tell(Message::Told(self.executor.activity()?));
        Ok(())
    }
}

/// Wakes the engine thread when the order to stop comes while it sleeps.
fn wake_on(shutdown: &CancellationToken, inbox: Inbox, ended: CancellationToken) -> Result<(), Error> {
    let shutdown = shutdown.clone();
    let spawned = std::thread::Builder::new().name("shutdown".into()).spawn(move || {
        let either = async {
            tokio::select! {
                () = shutdown.cancelled() => true,
                () = ended.cancelled() => false,
            }
        };
        if futures::executor::block_on(either) {
            inbox.tell(Message::Wake);
        }
    });
    spawned.map(drop).map_err(|source| Error::Start { what: "the shutdown watch", source })
}

fn model_facts(config: &Config, facts: &Facts) -> ModelFacts {
    let mut config_hash = String::with_capacity(2 * facts.config_hash.len());
    for byte in facts.config_hash {
        // Writing to a string cannot fail.
        let _ = write!(config_hash, "{byte:02x}");
    }
    ModelFacts {
        name: config.model_name.clone(),
        vocab_size: facts.engine.vocab_size,
        context_tokens_max: facts.engine.context_tokens_max,
        eos_token_ids: facts.engine.eos_token_ids.iter().map(|id| id.0).collect(),
        dtype: config.dtype.name().to_owned(),
        tensor_parallel: config.rank.size().get(),
        config_hash,
    }
}
