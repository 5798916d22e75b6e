//! A follower's loop: take the next plan, run it, until the leader says the end.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use collectives::{AbortHandle, HangUp, PlanReceiver};
use engine::Frame;
use tokio_util::sync::CancellationToken;
use types::TpRank;

use crate::executor::Executor;
use crate::{Config, Error};

/// The frame that ends a group in good order; no other is empty.
pub(crate) const END: &[u8] = &[];

/// The frame that asks all ranks for what they have done, sent while no step is in flight; the engine's are longer.
pub(crate) const ACTIVITY: &[u8] = &[0];

/// What a leader sends before the end.
enum Next {
    Frame(Frame),
    Activity,
}

/// Runs steps until the leader ends the group.
pub(crate) fn run(rank: TpRank, mut executor: Executor, mut plans: PlanReceiver) -> Result<(), Error> {
    let mut frame = Vec::new();
    while let Some(next) = receive(rank, &mut plans, &mut frame)? {
        let plan = match next {
            Next::Frame(Frame::Plan(plan)) => plan,
            Next::Frame(Frame::Drawn(drawn)) => {
                executor.drawn = drawn;
                continue;
            }
            Next::Activity => {
                executor.activity()?;
                continue;
            }
        };
        // The plan was made while the step before ran, so what that step drew may come after it.
        while plan.follows_on() && executor.drawn.step() + 1 != plan.step() {
            match receive(rank, &mut plans, &mut frame)? {
                Some(Next::Frame(Frame::Drawn(drawn))) => executor.drawn = drawn,
                Some(Next::Frame(Frame::Plan(_)) | Next::Activity) | None => break,
            }
        }
        executor.follow(&plan)?;
    }
    Ok(())
}

/// The leader's next frame; `None` at the end.
fn receive(rank: TpRank, plans: &mut PlanReceiver, frame: &mut Vec<u8>) -> Result<Option<Next>, Error> {
    plans.recv(frame).map_err(|source| Error::Group { rank, source })?;
    if frame == END {
        return Ok(None);
    }
    if frame == ACTIVITY {
        return Ok(Some(Next::Activity));
    }
    Frame::decode(frame)
        .map(|frame| Some(Next::Frame(frame)))
        .map_err(|source| Error::Engine { rank, source })
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
