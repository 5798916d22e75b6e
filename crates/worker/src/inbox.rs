//! What the engine thread is told, and where its answers go.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Instant;

use engine::Request;
use model::Activity;
use proto::Failure;
use proto::worker::GenerateChunk;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;
use trace::Span;

use crate::guide::Guide;
use crate::pipeline::Job;

/// Messages that may lie unread: the engine thread reads all of them between two steps.
const INBOX_MAX: usize = 4096;

/// The stream of one request. Its capacity covers everything the request can produce, so the engine thread never
/// waits for a client.
pub(crate) type Sink = mpsc::Sender<Result<GenerateChunk, Status>>;

/// One message to the engine thread.
pub(crate) enum Message {
    /// A request that passed the checks of the service.
    Submit(Box<Submission>),
    /// The executor has run a step.
    Ran(Box<Job>),
    /// The executor is gone.
    Stopped {
        /// Why.
        why: String,
    },
    /// A follower is gone.
    Lost {
        /// Its rank.
        rank: u32,
    },
    /// Somebody wants to know what the ranks have done.
    Activity(oneshot::Sender<Vec<Activity>>),
    /// The executor tells it.
    Told(Vec<Activity>),
    /// One sequence of a request that goes on for its others is not wanted any more.
    Cancel {
        /// The request's.
        key: u64,
        /// The sequence's number.
        index: u32,
    },
    /// Look at the shutdown token.
    Wake,
    /// Say that the thread goes on.
    Beat,
}

/// A request on its way in.
pub(crate) struct Submission {
    pub(crate) request: Request,
    pub(crate) deadline: Option<Instant>,
    pub(crate) sink: Sink,
    /// What a cancel calls it; 0 for nothing.
    pub(crate) key: u64,
    /// One for each of its sequences; empty when they may draw what they like.
    pub(crate) guides: Vec<Guide>,
    /// Whose it is.
    pub(crate) asker: Asker,
}

/// What a request is called in logs and traces.
#[derive(Debug, Clone, Default)]
pub(crate) struct Asker {
    /// The id that its caller and the router know it by; empty for the group's own.
    pub(crate) request: Arc<str>,
    pub(crate) span: Span,
    /// Whether its times are counted: the group's own are not.
    pub(crate) counted: bool,
}

/// The way in, for any number of threads.
#[derive(Clone)]
pub(crate) struct Inbox(SyncSender<Message>);

impl Inbox {
    /// A way in and the engine thread's end of it.
    pub(crate) fn new() -> (Self, Outlet) {
        let (sender, receiver) = sync_channel(INBOX_MAX);
        (Self(sender), Outlet(receiver))
    }

    /// Hands a request to the engine thread without waiting.
    pub(crate) fn submit(&self, submission: Submission) -> Result<(), Failure> {
        self.ask(Message::Submit(Box::new(submission)))
    }

    /// As [`Inbox::submit`], for any message.
    pub(crate) fn ask(&self, message: Message) -> Result<(), Failure> {
        self.0.try_send(message).map_err(|error| match error {
            TrySendError::Full(_) => Failure::Overloaded {
                what: "requests between two steps".into(),
                max: INBOX_MAX as u64,
                retry_after: proto::RETRY_AFTER,
            },
            TrySendError::Disconnected(_) => {
                Failure::Unavailable { why: "the group is stopping".into(), retry_after: proto::RETRY_AFTER }
            }
        })
    }

    /// Tells the engine thread, without waiting, that a sequence is not wanted any more. With a full inbox it is
    /// computed to its end, as if nobody had said so.
    pub(crate) fn cancel(&self, key: u64, index: u32) {
        let _ = self.0.try_send(Message::Cancel { key, index });
    }

    /// Has the engine thread say that it goes on. With a full inbox it is asked again later.
    pub(crate) fn beat(&self) {
        let _ = self.0.try_send(Message::Beat);
    }

    /// Tells the engine thread something it must know; waits when the inbox is full. Nobody listens after the end.
    pub(crate) fn tell(&self, message: Message) {
        let _ = self.0.send(message);
    }
}

/// The engine thread's end.
pub(crate) struct Outlet(Receiver<Message>);

impl Outlet {
    /// The next message, waiting for it; `None` when nobody can send any more.
    pub(crate) fn wait(&self) -> Option<Message> {
        self.0.recv().ok()
    }

    /// The next message that is there already.
    pub(crate) fn next(&self) -> Option<Message> {
        self.0.try_recv().ok()
    }
}
