//! A follower's loop: take the next plan, run it, until the leader says the end.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use collectives::{AbortHandle, HangUp, PlanReceiver};
use engine::{Briefed, Briefing, Drawn, Frame, Masks, RowWork, StepPlan};
use tokio_util::sync::CancellationToken;
use types::{TokenId, TpRank};

use crate::device::QueuedTokens;
use crate::executor::Executor;
use crate::guide::{Choices, Limit};
use crate::metrics::StepClock;
use crate::traced::{Followed as Traced, Note};
use crate::{Config, Error};

/// The frame that ends a group in good order; no other is empty.
pub(crate) const END: &[u8] = &[];

/// The frame that asks all ranks for what they have done, in its place between two steps; the engine's are longer.
pub(crate) const ACTIVITY: &[u8] = &[0];

/// Frames that may lie unread here; a leader that sends more waits.
const FRAMES_MAX: usize = 16;

/// What a leader wants done, in the order of its frames.
enum Order {
    /// A step, which in a group of several sub-groups comes with how to sample it.
    Step(StepPlan, Option<Briefing>),
    Activity,
    /// About a traced request.
    Note(Note),
    End,
}

impl Drop for Mail {
    fn drop(&mut self) {
        self.hang_up.hang_up();
    }
}

/// The leader's frames. Those that belong to a step that runs may come behind orders for later ones: a plan is made while
/// the step before it runs.
struct Mail {
    rank: TpRank,
    frames: Receiver<Result<Vec<u8>, collectives::Error>>,
    /// Ends the thread that reads them.
    hang_up: HangUp,
    /// Whether a briefing follows each plan.
    briefed: bool,
    /// A plan whose briefing has not come.
    plan: Option<StepPlan>,
    /// As many as steps may be in flight, and a few more.
    orders: VecDeque<Order>,
    drawn: Drawn,
    masks: Masks,
}

impl Mail {
    /// Starts to read what comes.
    fn open(rank: TpRank, mut plans: PlanReceiver, briefed: bool) -> Result<Self, Error> {
        let hang_up = plans.hang_up().map_err(|source| Error::Group { rank, source })?;
        let (pass_on, frames) = sync_channel(FRAMES_MAX);
        let read = move || loop {
            let mut frame = Vec::new();
            let read = plans.recv(&mut frame).map(|()| frame);
            let over = read.is_err();
            if pass_on.send(read).is_err() || over {
                return;
            }
        };
        let spawned = thread::Builder::new().name("plans".into()).spawn(read);
        spawned.map_err(|source| Error::Start { what: "the thread that reads plans", source })?;
        let (plan, orders) = (None, VecDeque::new());
        let (drawn, masks) = (Drawn::default(), Masks::default());
        Ok(Self { rank, frames, hang_up, briefed, plan, orders, drawn, masks })
    }

    /// The next order. While it is not there, `busy` looks after what is under way, until it says that nothing is.
    fn next(&mut self, mut busy: impl FnMut() -> Result<bool, Error>) -> Result<Order, Error> {
        loop {
            if let Some(order) = self.orders.pop_front() {
                return Ok(order);
            }
            match self.frames.try_recv() {
                Ok(frame) => self.take(frame)?,
                Err(TryRecvError::Empty) if busy()? => std::hint::spin_loop(),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => self.receive()?,
            }
        }
    }

    /// What step `step` drew.
    fn drawn(&mut self, step: u64) -> Result<&Drawn, Error> {
        while self.drawn.step() != step {
            self.receive()?;
        }
        Ok(&self.drawn)
    }

    /// What the guided rows of step `step` may draw.
    fn masks(&mut self, step: u64) -> Result<&Masks, Error> {
        while self.masks.step != step {
            self.receive()?;
        }
        Ok(&self.masks)
    }

    fn receive(&mut self) -> Result<(), Error> {
        let lost = collectives::Error::PeerLost { rank: 0, collective: "the plan channel" };
        let frame = self.frames.recv().unwrap_or(Err(lost));
        self.take(frame)
    }

    fn take(&mut self, frame: Result<Vec<u8>, collectives::Error>) -> Result<(), Error> {
        let rank = self.rank;
        let frame = frame.map_err(|source| Error::Group { rank, source })?;
        if frame == END || frame == ACTIVITY {
            self.orders.push_back(if frame == END { Order::End } else { Order::Activity });
            return Ok(());
        }
        if let Some(note) = Note::decode(&frame) {
            self.orders.push_back(Order::Note(note));
            return Ok(());
        }
        match Frame::decode(&frame).map_err(|source| Error::Engine { rank, source })? {
            Frame::Plan(plan) if self.briefed => self.plan = Some(plan),
            Frame::Plan(plan) => self.orders.push_back(Order::Step(plan, None)),
            Frame::Briefing(briefing) => {
                let plan = self.plan.take().unwrap_or_default();
                self.orders.push_back(Order::Step(plan, Some(briefing)));
            }
            Frame::Drawn(drawn) => self.drawn = drawn,
            Frame::Masks(masks) => self.masks = masks,
        }
        Ok(())
    }
}

/// What the leader says the rows of one step may draw, read when the first guided row is sampled: it is sent while the
/// model computes.
struct Told<'a> {
    mail: &'a mut Mail,
    step: u64,
    guided: bool,
    failed: Option<Error>,
}

impl Choices for Told<'_> {
    fn limits(&self, _at: usize, _work: &RowWork) -> bool {
        self.guided
    }

    fn limit(&mut self, at: usize, _work: &RowWork) -> Limit {
        if !self.guided {
            return Limit::None;
        }
        match self.mail.masks(self.step) {
            Ok(masks) => masks.of(u32::try_from(at).unwrap_or(u32::MAX)).into(),
            Err(error) => {
                self.failed.get_or_insert(error);
                Limit::Nothing
            }
        }
    }

    fn drew(&mut self, _work: &RowWork, _token: TokenId) {}
}

/// Runs steps until the leader ends the group.
pub(crate) fn run(config: &Config, facts: Followed, plans: PlanReceiver) -> Result<(), Error> {
    let Followed { mut executor, engine, mut clock } = facts;
    let rank = config.rank;
    let briefed = engine.data_parallel > 1;
    let mut mail = Mail::open(rank, plans, briefed)?;
    let mut under_way: Option<UnderWay> = None;
    let (mut traced, own) = (Traced::default(), rank.index() / config.tensor.get());
    let mut briefings = Briefed::new(&engine, own);
    loop {
        let order = mail.next(|| match &under_way {
            None => Ok(false),
            Some((step, ..)) if !executor.has_followed(step)? => Ok(true),
            Some(_) => {
                finish(under_way.take(), (&mut executor, &mut traced, &mut clock))?;
                Ok(false)
            }
        })?;
        match order {
            Order::End => return finish(under_way, (&mut executor, &mut traced, &mut clock)),
            Order::Activity => drop(executor.activity()?),
            Order::Note(note) => {
                // What the slot was until now has its last step counted first.
                finish(under_way.take(), (&mut executor, &mut traced, &mut clock))?;
                traced.note(note, |slot| engine.sub_group(slot) == own);
            }
            Order::Step(plan, None) => {
                if plan.follows_on() && !executor.feeds() {
                    executor.drawn.clone_from(mail.drawn(plan.step() - 1)?);
                }
                traced.before(&plan);
                let begun = clock.begin();
                let forward = executor.begin(&plan)?;
                // The step before has ended, or ends while this one waits for it.
                finish(under_way.take(), (&mut executor, &mut traced, &mut clock))?;
                under_way = Some((executor.follow(forward)?, plan, begun));
            }
            Order::Step(plan, Some(briefing)) => {
                let refuse = |source| Error::Engine { rank, source };
                let brief = briefings.take(&plan, briefing).map_err(refuse)?;
                let (step, guided) = (plan.step(), brief.guided);
                let mut told = Told { mail: &mut mail, step, guided, failed: None };
                traced.before(&plan);
                let begun = clock.begin();
                let followed = executor.follow_among(&plan, &brief, &mut told);
                clock.end(begun);
                told.failed.map_or(followed, Err)?;
                traced.after(&plan);
            }
        }
    }
}

/// A step that was queued, and when it began.
type UnderWay = (QueuedTokens, StepPlan, Instant);

/// Ends the step that is under way, if one is.
fn finish(
    under_way: Option<UnderWay>,
    (executor, traced, clock): (&mut Executor, &mut Traced, &mut StepClock),
) -> Result<(), Error> {
    let Some((step, plan, begun)) = under_way else { return Ok(()) };
    executor.followed(step)?;
    clock.end(begun);
    traced.after(&plan);
    Ok(())
}

/// A follower that has booted.
pub(crate) struct Followed {
    pub(crate) executor: Executor,
    pub(crate) engine: engine::Config,
    pub(crate) clock: StepClock,
}

/// Runs `work`, and ends the process's part in the group when it was told to stop and the leader does not end in
/// time: a follower has no requests of its own to finish, so it otherwise goes on until its leader is done.
pub(crate) fn run_until_stopped(
    config: &Config,
    shutdown: &CancellationToken,
    (abort, hang_up): (AbortHandle, HangUp),
    work: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    let (done, ended) = channel::<()>();
    let patience = config.drain_grace + Duration::from_secs(1);
    let (rank, shutdown) = (config.rank, shutdown.clone());
    thread::scope(|scope| {
        let watch = scope.spawn(move || {
            loop {
                match ended.recv_timeout(Duration::from_millis(100)) {
                    Err(RecvTimeoutError::Timeout) if !shutdown.is_cancelled() => {}
                    Err(RecvTimeoutError::Timeout) => break,
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            }
            match ended.recv_timeout(patience) {
                Err(RecvTimeoutError::Timeout) => {
                    // It waits for the leader in a collective or, when nothing runs, for its next plan.
                    abort.abort();
                    hang_up.hang_up();
                    Err(Error::LeaderWouldNotEnd { rank, seconds: patience.as_secs() })
                }
                Ok(()) | Err(RecvTimeoutError::Disconnected) => Ok(()),
            }
        });
        let result = work();
        drop(done);
        let watched = watch.join().unwrap_or(Ok(()));
        // What the work says then is only that the leader is gone.
        watched.and(result)
    })
}
