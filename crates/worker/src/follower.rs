//! A follower's loop: take the next plan, run it, until the leader says the end.

use std::collections::VecDeque;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use collectives::{AbortHandle, HangUp, PlanReceiver};
use engine::{Briefed, Briefing, Drawn, Frame, Masks, RowWork, StepPlan};
use tokio_util::sync::CancellationToken;
use types::{TokenId, TpRank};

use crate::executor::Executor;
use crate::guide::{Choices, Limit};
use crate::{Config, Error};

/// The frame that ends a group in good order; no other is empty.
pub(crate) const END: &[u8] = &[];

/// The frame that asks all ranks for what they have done, in its place between two steps; the engine's are longer.
pub(crate) const ACTIVITY: &[u8] = &[0];

/// What a leader wants done, in the order of its frames.
enum Order {
    /// A step, which in a group of several sub-groups comes with how to sample it.
    Step(StepPlan, Option<Briefing>),
    Activity,
    End,
}

/// The leader's frames. Those that belong to a step that runs may come behind orders for later ones: a plan is made while
/// the step before it runs.
struct Mail {
    rank: TpRank,
    plans: PlanReceiver,
    frame: Vec<u8>,
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
    /// The next order.
    fn next(&mut self) -> Result<Order, Error> {
        loop {
            if let Some(order) = self.orders.pop_front() {
                return Ok(order);
            }
            self.receive()?;
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
        let Self { rank, plans, frame, .. } = self;
        let rank = *rank;
        plans.recv(frame).map_err(|source| Error::Group { rank, source })?;
        if frame == END || frame == ACTIVITY {
            self.orders.push_back(if frame == END { Order::End } else { Order::Activity });
            return Ok(());
        }
        match Frame::decode(frame).map_err(|source| Error::Engine { rank, source })? {
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
    let Followed { mut executor, engine } = facts;
    let rank = config.rank;
    let briefed = engine.data_parallel > 1;
    let mut mail = Mail {
        rank,
        plans,
        frame: Vec::new(),
        briefed,
        plan: None,
        orders: VecDeque::new(),
        drawn: Drawn::default(),
        masks: Masks::default(),
    };
    let mut briefings = Briefed::new(&engine, rank.index() / config.tensor.get());
    loop {
        match mail.next()? {
            Order::End => return Ok(()),
            Order::Activity => drop(executor.activity()?),
            Order::Step(plan, None) => {
                if plan.follows_on() {
                    executor.drawn.clone_from(mail.drawn(plan.step() - 1)?);
                }
                executor.follow(&plan)?;
            }
            Order::Step(plan, Some(briefing)) => {
                let refuse = |source| Error::Engine { rank, source };
                let brief = briefings.take(&plan, briefing).map_err(refuse)?;
                let (step, guided) = (plan.step(), brief.guided);
                let mut told = Told { mail: &mut mail, step, guided, failed: None };
                let followed = executor.follow_among(&plan, &brief, &mut told);
                told.failed.map_or(followed, Err)?;
            }
        }
    }
}

/// A follower that has booted.
pub(crate) struct Followed {
    pub(crate) executor: Executor,
    pub(crate) engine: engine::Config,
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
