//! What keeps a rank from waiting for other cards for ever: whoever waits for the card asks here how its communicator is.

use std::cell::{RefCell, RefMut};
use std::fmt;
use std::time::Duration;

use collectives::{Collective, Op};
use cudarc::driver::sys::{CUstream, CUstreamCaptureStatus, cuStreamIsCapturing};

use crate::Error;
use crate::graph::Event;
use crate::nccl::Communicator;

/// How long the hosts have to say who is still there, once a step is late.
const ROLL_CALL: Duration = Duration::from_secs(1);
/// Collectives between two waits that are told apart in errors: more than a step has.
const MARKS_MAX: usize = 1024;

/// A communicator, the hosts' line beside it, and how long a wait may take.
pub(crate) struct Watch {
    communicator: RefCell<Communicator>,
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
    pub(crate) fn new(communicator: Communicator, line: Box<dyn Collective<[f32]>>, step: Duration) -> Self {
        let (communicator, line) = (RefCell::new(communicator), RefCell::new(line));
        Self { communicator, line, step, marks: RefCell::default() }
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

    /// Everything that was queued is done.
    pub(crate) fn passed(&self) {
        self.marks.borrow_mut().queued.clear();
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
        self.communicator.borrow_mut().abort();
        let missing = match self.line.borrow_mut().barrier_within(ROLL_CALL) {
            Ok(()) => "every rank's host answers, so a card or a link between cards is stuck".to_owned(),
            Err(error) => error.to_string(),
        };
        Err(Error::Stuck { rank, at, failed, missing })
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
            None => "the collectives of a recorded step".to_owned(),
        }
    }
}
