//! What keeps a rank from waiting for other cards for ever: whoever waits for the card asks here how its communicator is.

use std::cell::{RefCell, RefMut};
use std::fmt;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use collectives::{Collective, Op};
use cudarc::driver::sys::{CUstream, CUstreamCaptureStatus, cuStreamIsCapturing};

use super::peer::Peer;
use crate::Error;
use crate::device::{Device, Grid};
use crate::graph::Event;
use crate::kernels::NoteParams;
use crate::memory::Pinned;
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
    /// The number in its step of the sum that the card has begun last, without the cards' own line.
    begun: Pinned,
    line: RefCell<Box<dyn Collective<[f32]>>>,
    step: Duration,
    marks: RefCell<Marks>,
}

/// An operation that was queued.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Queued {
    /// The sum over ranks of this number in its step, counted from 1.
    Sum(u32),
    /// Any other.
    Other(Op),
    /// A recorded step, of whose sums the card says which it has begun.
    Recorded,
}

/// A step's first sum is that of the embedding, and each layer has one.
impl fmt::Display for Queued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sum(0..=1) => write!(f, "{} of the embedding", Op::AllReduce),
            Self::Sum(number) => write!(f, "{} of layer {}", Op::AllReduce, number - 2),
            Self::Other(op) => op.fmt(f),
            Self::Recorded => f.write_str("a recorded step"),
        }
    }
}

/// What was queued since the card was last waited for.
#[derive(Debug, Default)]
struct Marks {
    events: Vec<Event>,
    queued: Vec<Queued>,
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
    ) -> Result<Self, Error> {
        let (communicator, line) = (RefCell::new(communicator), RefCell::new(line));
        let begun = Pinned::new(size_of::<u32>())?;
        Ok(Self { communicator, peer, begun, line, step, marks: RefCell::default() })
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

    /// Where the card says which of a step's sums it has begun.
    fn begun(&self) -> (&Pinned, usize) {
        self.peer.as_ref().map_or((&self.begun, 0), |peer| peer.begun())
    }

    /// In a recording, where the host cannot wait for a sum by itself, NCCL's are announced to it by the card before they
    /// begin. The cards' own line does so by itself.
    pub(crate) fn announce(&self, queued: Queued, device: &Device) -> Result<(), Error> {
        let Queued::Sum(number) = queued else { return Ok(()) };
        if !is_recorded(device.stream())? {
            return Ok(());
        }
        let (memory, word) = self.begun();
        let at = memory.address() + (word * size_of::<u32>()) as u64;
        device.launch(device.kernels.note, Grid::new(1, 1, 1), &NoteParams { at, value: number })
    }

    /// Notes an operation that was just queued. Inside a recording there is nothing to wait for.
    pub(crate) fn queued(&self, op: Queued, stream: CUstream) -> Result<(), Error> {
        let recorded = is_recorded(stream)?;
        let mut marks = self.marks.borrow_mut();
        let number = marks.queued.len();
        if recorded || number == MARKS_MAX {
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

    /// What is said when an operation cannot be queued: everything is aborted.
    pub(crate) fn refused(&self, queued: Queued, failed: String) -> collectives::Error {
        let rank = self.communicator.borrow().rank().index();
        collectives::Error::Device { rank, collective: queued.to_string(), failed, missing: self.end() }
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
        let open = marks.queued.iter().zip(&marks.events).find(|(_, event)| !event.is_passed());
        match open {
            Some((Queued::Recorded, _)) => {
                let (memory, word) = self.begun();
                Queued::Sum(memory.word(word).load(Ordering::Acquire)).to_string()
            }
            Some((queued, _)) => queued.to_string(),
            None => "what is queued behind the last collective".to_owned(),
        }
    }
}

fn is_recorded(stream: CUstream) -> Result<bool, Error> {
    let mut capturing = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the stream is alive, the pointer valid for the call.
    unsafe { cuStreamIsCapturing(stream, &raw mut capturing) }
        .result()
        .map_err(Error::driver("cuStreamIsCapturing"))?;
    Ok(capturing != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}
