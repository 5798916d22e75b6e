//! One request's stream to a leader, and the choice of another leader when the first refuses.

use std::sync::Arc;

use proto::{Failure, RETRY_AFTER, worker};
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

/// A request that runs: dropping it cancels the request at the leader.
#[derive(Debug)]
pub(crate) struct WorkerStream {
    place: InFlight,
    first: Option<worker::GenerateChunk>,
    chunks: Streaming<worker::GenerateChunk>,
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

    /// Sends the request and waits for the first chunk. A group that refuses before it, or cannot be reached, is
    /// replaced by another one, each tried at most once: nothing has been generated, so nothing can be lost.
    ///
    /// # Errors
    /// The refusal of the last group tried, or at once one that would be the same everywhere.
    pub(crate) async fn open(mut self, deadline: Option<Instant>) -> Result<WorkerStream, Failure> {
        loop {
            let refused = match attempt(self.place, self.request.clone(), deadline).await {
                Ok(stream) => return Ok(stream),
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
) -> Result<WorkerStream, Refused> {
    let mut request = Request::new(request);
    if let Some(deadline) = deadline {
        // The leader gets the caller's own deadline: ours comes first and is the one that is reported.
        request.set_timeout(deadline.saturating_duration_since(Instant::now()) + DEADLINE_MARGIN);
    }
    let group = place.group().address();
    let answer = place.group().client().generate(request).await;
    let mut chunks = answer.map_err(|status| Refused::new(&status, group))?.into_inner();
    match chunks.message().await {
        Ok(Some(first)) => Ok(WorkerStream { place, first: Some(first), chunks }),
        Ok(None) => Err(Refused { failure: lost(group, ENDED_EARLY), try_elsewhere: true }),
        Err(status) => Err(Refused::new(&status, group)),
    }
}

const ENDED_EARLY: &str = "the stream ended without a finish";

impl Refused {
    fn new(status: &Status, group: &str) -> Self {
        let failure = Failure::from_status(status).unwrap_or_else(|| {
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

impl WorkerStream {
    /// The next chunk, the one with `finish` being the last.
    ///
    /// # Errors
    /// The leader's own failure, or [`Failure::GroupLost`] when the stream broke or ended without a finish.
    pub(crate) async fn next(&mut self) -> Result<worker::GenerateChunk, Failure> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        let group = self.place.group().address();
        match self.chunks.message().await {
            Ok(Some(chunk)) => Ok(chunk),
            Ok(None) => Err(lost(group, ENDED_EARLY)),
            Err(status) => {
                Err(Failure::from_status(&status).unwrap_or_else(|| lost(group, &describe(&status))))
            }
        }
    }
}

fn lost(group: &str, why: &str) -> Failure {
    Failure::GroupLost { group: group.to_owned(), why: why.to_owned() }
}
