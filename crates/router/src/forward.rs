//! One request's stream to a leader, and the choice of another leader when the first refuses.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use futures::stream::unfold;
use proto::{Failure, GenerationFields, RETRY_AFTER, worker};
use tokio::time::Instant;
use tonic::{Code, Request, Status, Streaming};

use crate::call::DEADLINE_MARGIN;
use crate::workers::{Groups, InFlight, describe};

/// A request with its place at a group, not sent yet.
#[derive(Debug)]
pub(crate) struct Placed {
    groups: Arc<Groups>,
    place: InFlight,
    tried: Vec<usize>,
    request: worker::GenerateRequest,
}

/// What a group generates for a request, until all its sequences have ended or something failed. Dropping it cancels
/// the request at the leader.
pub(crate) type Chunks = Pin<Box<dyn Stream<Item = Result<worker::GenerateChunk, Failure>> + Send>>;

/// A request that runs: dropping it cancels the request at the leader.
#[derive(Debug)]
struct WorkerStream {
    place: InFlight,
    first: Option<worker::GenerateChunk>,
    chunks: Streaming<worker::GenerateChunk>,
    /// Sequences that have not ended.
    open: u32,
}

/// How far a request has come.
enum Way {
    Placed(Box<Placed>),
    Running(Box<WorkerStream>),
    Ended,
}

/// Why a group did not start a request, and whether another one might.
struct Refused {
    failure: Failure,
    try_elsewhere: bool,
}

impl Placed {
    /// Takes a place at the least loaded group.
    ///
    /// # Errors
    /// [`Failure::NotServing`] or [`Failure::Unavailable`] when no group takes requests, with how far they are.
    pub(crate) fn new(groups: &Arc<Groups>, request: worker::GenerateRequest) -> Result<Self, Failure> {
        let mut tried = Vec::new();
        let place = groups.place(&mut tried).ok_or_else(|| groups.progress().refusal())?;
        Ok(Self { groups: Arc::clone(groups), place, tried, request })
    }

    /// Sends the request and passes its chunks on; nothing is sent before they are asked for.
    pub(crate) fn into_chunks(self, deadline: Option<Instant>) -> Chunks {
        Box::pin(unfold(Way::Placed(Box::new(self)), move |way| way.next(deadline)))
    }

    /// Sends the request and waits for the first chunk. A group that refuses before it, or cannot be reached, is
    /// replaced by another one, each tried at most once: nothing has been generated, so nothing can be lost.
    ///
    /// # Errors
    /// The refusal of the last group tried, or at once one that would be the same everywhere.
    async fn open(mut self, deadline: Option<Instant>) -> Result<WorkerStream, Failure> {
        let sequences = self.request.generation.as_ref().and_then(|generation| generation.n).unwrap_or(1);
        loop {
            let refused = match attempt(self.place, self.request.clone(), deadline).await {
                Ok((place, first, chunks)) => {
                    return Ok(WorkerStream { place, first: Some(first), chunks, open: sequences });
                }
                Err(refused) => refused,
            };
            match self.groups.place(&mut self.tried) {
                Some(place) if refused.try_elsewhere => {
                    let (request, to) = (&self.request.request_id, place.group().address());
                    tracing::info!(request, reason = %refused.failure, to, "trying another group");
                    self.place = place;
                }
                Some(_) | None => return Err(refused.failure),
            }
        }
    }
}

async fn attempt(
    place: InFlight,
    request: worker::GenerateRequest,
    deadline: Option<Instant>,
) -> Result<(InFlight, worker::GenerateChunk, Streaming<worker::GenerateChunk>), Refused> {
    let mut request = Request::new(request);
    if let Some(deadline) = deadline {
        // The leader gets the caller's own deadline: ours comes first and is the one that is reported.
        request.set_timeout(deadline.saturating_duration_since(Instant::now()) + DEADLINE_MARGIN);
    }
    let group = place.group().address();
    let answer = place.group().client().generate(request).await;
    let mut chunks = answer.map_err(|status| Refused::new(&status, group))?.into_inner();
    match chunks.message().await {
        Ok(Some(first)) => Ok((place, first, chunks)),
        Ok(None) => Err(Refused { failure: lost(group, ENDED_EARLY), try_elsewhere: true }),
        Err(status) => Err(Refused::new(&status, group)),
    }
}

const ENDED_EARLY: &str = "the stream ended without a finish";

impl Refused {
    fn new(status: &Status, group: &str) -> Self {
        let failure = reported(status).unwrap_or_else(|| {
            let why = format!("group {group}: {}", describe(status));
            match status.code() {
                Code::InvalidArgument | Code::Unimplemented | Code::OutOfRange => Failure::Internal { why },
                // Whatever else did not come from the leader itself came from the connection to it.
                _ => Failure::Unavailable { why, retry_after: RETRY_AFTER },
            }
        });
        let code = failure.code();
        let try_elsewhere = matches!(code, Code::Unavailable | Code::ResourceExhausted | Code::Aborted);
        Self { failure, try_elsewhere }
    }
}

impl Way {
    async fn next(self, deadline: Option<Instant>) -> Option<(Result<worker::GenerateChunk, Failure>, Self)> {
        let opened = match self {
            Self::Placed(placed) => placed.open(deadline).await.map(Box::new),
            Self::Running(stream) => Ok(stream),
            Self::Ended => return None,
        };
        let mut stream = match opened {
            Ok(stream) if stream.open == 0 => return None,
            Ok(stream) => stream,
            Err(failure) => return Some((Err(failure), Self::Ended)),
        };
        match stream.next().await {
            Ok(chunk) => Some((Ok(chunk), Self::Running(stream))),
            Err(failure) => Some((Err(failure), Self::Ended)),
        }
    }
}

impl WorkerStream {
    /// The next chunk.
    ///
    /// # Errors
    /// The leader's own failure, or [`Failure::GroupLost`] when the stream broke or ended before its sequences.
    async fn next(&mut self) -> Result<worker::GenerateChunk, Failure> {
        let group = self.place.group().address();
        let chunk = match self.first.take() {
            Some(first) => Ok(Some(first)),
            None => self.chunks.message().await,
        };
        match chunk {
            Ok(Some(chunk)) => {
                self.open = self.open.saturating_sub(u32::from(chunk.finish.is_some()));
                Ok(chunk)
            }
            Ok(None) => Err(lost(group, ENDED_EARLY)),
            Err(status) => Err(reported(&status).unwrap_or_else(|| lost(group, &describe(&status)))),
        }
    }
}

/// What a leader reported, its fields named as callers know them.
fn reported(status: &Status) -> Option<Failure> {
    Failure::from_status(status).map(|failure| GenerationFields::Public.rename(failure))
}

fn lost(group: &str, why: &str) -> Failure {
    Failure::GroupLost { group: group.to_owned(), why: why.to_owned() }
}
