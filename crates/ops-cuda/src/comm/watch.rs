//! What keeps a rank from waiting for other cards for ever: whoever waits for the card asks here how its communicator is.

use std::cell::{Cell, RefCell, RefMut};
use std::fmt;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use collectives::{Collective, Op};
use cudarc::driver::sys::{CUstream, CUstreamCaptureStatus, cuStreamIsCapturing};

use super::peer::Peer;
use crate::Error;
use crate::graph::Event;
use crate::nccl::Communicator;

/// How long the hosts have to say who is still there, once a step is late.
const ROLL_CALL: Duration = Duration::from_secs(1);
/// Collectives between two waits that are told apart in errors: more than a step has.
const MARKS_MAX: usize = 1024;

/// How long a card has to say which rank it waited for, once it was told to give up.
const LAST_WORD: Duration = Duration::from_millis(100);

/// A communicator, the cards' own line if there is one, the hosts' line beside them, and how long a wait may take.
pub(crate) struct Watch {
    communicator: RefCell<Communicator>,
    peer: Option<Rc<Peer>>,
    /// Sums of the cards' own line that had begun when the card was last waited for.
    passed: Cell<u32>,
    line: RefCell<Box<dyn Collective<[f32]>>>,
    step: Duration,
    marks: RefCell<Marks>,
}

/// What was queued since the card was last waited for.
#[derive(Debug, Default)]
struct Marks {
    events: Vec<Event>,
    queued: Vec<Op>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("step", &self.step).field("marks", &self.marks).finish_non_exhaustive()
    }
}

impl Watch {
    pub(crate) fn new(
        communicator: Communicator,
        peer: Option<Rc<Peer>>,
        line: Box<dyn Collective<[f32]>>,
        step: Duration,
    ) -> Self {
        let (communicator, line) = (RefCell::new(communicator), RefCell::new(line));
        Self { communicator, peer, passed: Cell::new(0), line, step, marks: RefCell::default() }
    }

    /// The cards' own line.
    pub(crate) const fn peer(&self) -> Option<&Rc<Peer>> {
        self.peer.as_ref()
    }

    /// Ends everything that is queued and waits for other ranks.
    pub(crate) fn abort(&self) {
        // First what may stand before NCCL's operations: aborting those waits for the card.
        if let Some(peer) = &self.peer {
            peer.give_up();
        }
        self.communicator.borrow_mut().abort();
    }

    pub(crate) fn communicator(&self) -> RefMut<'_, Communicator> {
        self.communicator.borrow_mut()
    }

    pub(crate) fn line(&self) -> RefMut<'_, Box<dyn Collective<[f32]>>> {
        self.line.borrow_mut()
    }

    pub(crate) const fn step(&self) -> Duration {
        self.step
    }

    /// Notes an operation that was just queued. Inside a recording there is nothing to wait for.
    pub(crate) fn queued(&self, op: Op, stream: CUstream) -> Result<(), Error> {
        let mut capturing = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream is alive, the pointer valid for the call.
        unsafe { cuStreamIsCapturing(stream, &raw mut capturing) }
            .result()
            .map_err(Error::driver("cuStreamIsCapturing"))?;
        let mut marks = self.marks.borrow_mut();
        let number = marks.queued.len();
        if capturing != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE || number == MARKS_MAX {
            return Ok(());
        }
        if marks.events.len() == number {
            marks.events.push(Event::new()?);
        }
        marks.queued.push(op);
        marks.events[number].record(stream)
    }

    /// The card has come past something that was waited for; what was queued behind it may go on.
    pub(crate) fn passed(&self) {
        let Marks { events, queued } = &mut *self.marks.borrow_mut();
        let open = queued.iter().zip(&*events).position(|(_, event)| !event.is_passed());
        let done = open.unwrap_or(queued.len());
        queued.drain(..done);
        events.rotate_left(done);
        if let Some(peer) = &self.peer {
            self.passed.set(peer.begun());
        }
    }

    /// Looks after the communicator when the card has been waited for so long.
    ///
    /// # Errors
    /// When NCCL has failed, or the wait is over: then everything queued is aborted, and the error names the
    /// collective, and the rank if its host does not answer either.
    pub(crate) fn check(&self, waited: Duration) -> Result<(), Error> {
        let failed = match self.communicator.borrow().state() {
            Ok(_) if waited <= self.step => return Ok(()),
            Ok(_) => format!("not done within {:?}", self.step),
            Err(error) => error.to_string(),
        };
        let (rank, at) = (self.communicator.borrow().rank().index(), self.first_open());
        let missing = self.end();
        Err(Error::Stuck { rank, at, failed, missing })
    }

    /// What is said when `op` cannot be queued: everything is aborted.
    pub(crate) fn refused(&self, op: Op, failed: String) -> collectives::Error {
        let rank = self.communicator.borrow().rank().index();
        collectives::Error::Device { rank, collective: op.name(), failed, missing: self.end() }
    }

    /// Aborts, and says who does not answer.
    fn end(&self) -> String {
        self.abort();
        let silent = self.silent();
        let missing = match self.line.borrow_mut().barrier_within(ROLL_CALL) {
            Ok(()) => "every rank's host answers, so a card or a link between cards is stuck".to_owned(),
            Err(error) => error.to_string(),
        };
        match silent {
            Some(silent) => format!("the card of rank {silent} sent nothing; {missing}"),
            None => missing,
        }
    }

    /// The rank whose part of a sum did not come to this card.
    fn silent(&self) -> Option<u32> {
        let peer = self.peer.as_ref()?;
        let asked = Instant::now();
        while peer.waited_for().is_none() && asked.elapsed() < LAST_WORD {
            thread::yield_now();
        }
        peer.waited_for()
    }

    /// The first operation that is not done, in words.
    fn first_open(&self) -> String {
        let marks = self.marks.borrow();
        let open = marks.queued.iter().zip(&marks.events).position(|(_, event)| !event.is_passed());
        match open {
            Some(number) => {
                format!(
                    "{} number {} of the {} of this step",
                    marks.queued[number],
                    number + 1,
                    marks.queued.len()
                )
            }
            None => match &self.peer {
                Some(peer) => format!(
                    "{} number {} of a recorded step (the first is the embedding's, and each layer has one)",
                    Op::AllReduce,
                    peer.begun().wrapping_sub(self.passed.get()).max(1)
                ),
                None => "the collectives of a recorded step".to_owned(),
            },
        }
    }
}
