//! One request's stream to a leader, and the choice of another leader when the first refuses.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use futures::stream::{once, unfold};
use futures::{Stream, StreamExt};
use proto::{Failure, GenerationFields, RETRY_AFTER, worker};
use tokio::sync::Notify;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Status, Streaming};
use trace::Span;

use crate::affinity::Chain;
use crate::call::DEADLINE_MARGIN;
use crate::trail::Trail;
use crate::workers::{Groups, InFlight, describe};

/// A request with its place at a group, not sent yet.
#[derive(Debug)]
pub(crate) struct Placed {
    groups: Arc<Groups>,
    place: InFlight,
    tried: Vec<usize>,
    request: Arc<worker::GenerateRequest>,
    prompt: Chain,
    trail: Trail,
    taken: Arc<Notify>,
}

/// What a group generates for a request, until all its sequences have ended or it broke. Dropping it cancels the
/// request at the leader.
pub(crate) type Chunks = Pin<Box<dyn Stream<Item = Result<Piece, Broken>> + Send>>;

/// A chunk, and the group it came from unless it was made here.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) chunk: worker::GenerateChunk,
    pub(crate) group: Option<usize>,
}

/// The end of a stream that did not come to its end.
#[derive(Debug, Clone)]
pub(crate) struct Broken {
    pub(crate) failure: Failure,
    /// The group that had it last.
    pub(crate) group: usize,
    /// Whether something had been generated.
    pub(crate) begun: bool,
    /// Whether a group that had the request was lost, as opposed to refusing it.
    pub(crate) lost: bool,
    /// The sequences it was for, ended or not.
    pub(crate) sequences: Range<u32>,
}

/// A request that runs: dropping it cancels the request at the leader.
#[derive(Debug)]
pub(crate) struct WorkerStream {
    place: InFlight,
    first: Option<worker::GenerateChunk>,
    chunks: Streaming<worker::GenerateChunk>,
    sequences: Range<u32>,
    /// Sequences that have not ended.
    open: usize,
    span: Span,
}

/// Why a group did not start a request.
struct Refused {
    failure: Failure,
    /// Whether another group might.
    try_elsewhere: bool,
    /// Whether the group may have begun.
    lost: bool,
}

impl Placed {
    /// Takes a place at the best group that is not in `tried`.
    ///
    /// # Errors
    /// [`Failure::NotServing`] or [`Failure::Unavailable`] when no group takes requests, with how far they are.
    pub(crate) fn new(
        groups: &Arc<Groups>,
        request: &Arc<worker::GenerateRequest>,
        mut tried: Vec<usize>,
        trail: &Trail,
    ) -> Result<Self, Failure> {
        let prompt = match request.bypass_prefix_cache {
            true => Chain::default(),
            false => Chain::of(&request.prompt, &request.cache_salt),
        };
        let place = groups.place(&mut tried, &prompt).ok_or_else(|| groups.progress().refusal())?;
        let (groups, request, trail) = (Arc::clone(groups), Arc::clone(request), trail.clone());
        Ok(Self { groups, place, tried, request, prompt, trail, taken: Arc::default() })
    }

    /// The group it is to be sent to.
    pub(crate) fn address(&self) -> &str {
        self.place.group().address()
    }

    /// Told when a group has taken the request.
    pub(crate) fn taken(&self) -> Arc<Notify> {
        Arc::clone(&self.taken)
    }

    /// Sends the request and passes its chunks on; nothing is sent before they are asked for.
    pub(crate) fn into_chunks(self, deadline: Option<Instant>) -> Chunks {
        chunks(async move { Ok(self.open(deadline).await?.into_chunks()) })
    }

    /// Sends the request and waits for the first chunk. A group that refuses before it, or cannot be reached, is
    /// replaced by another one, each tried at most once: nothing has been generated, so nothing can be lost.
    ///
    /// # Errors
    /// The refusal of the last group tried, or at once one that would be the same everywhere.
    pub(crate) async fn open(mut self, deadline: Option<Instant>) -> Result<WorkerStream, Broken> {
        let first = self.request.first_stream;
        let count = self.request.generation.as_ref().and_then(|generation| generation.n).unwrap_or(1);
        let sequences = first..first.saturating_add(count);
        let mut lost = false;
        loop {
            let group = self.place.index();
            let span = self.trail.attempt(self.place.group().address(), &self.request);
            let headers = |headers: &mut MetadataMap| self.trail.tell(&span, headers);
            let refused = match attempt(self.place, &self.request, deadline, headers, &self.taken).await {
                Ok((place, first, chunks)) => {
                    self.groups.tried(group, true);
                    let open = sequences.len();
                    return Ok(WorkerStream { place, first: Some(first), chunks, sequences, open, span });
                }
                Err(refused) => refused,
            };
            span.fail(refused.failure.reason(), refused.failure.to_string());
            lost |= refused.lost;
            if refused.lost {
                self.groups.tried(group, false);
            }
            let elsewhere = || self.groups.place_again(&mut self.tried, &self.prompt);
            match refused.try_elsewhere.then(elsewhere).flatten() {
                Some(place) => {
                    let (request, to) = (&self.request.request_id, place.group().address());
                    tracing::info!(request, reason = %refused.failure, to, "trying another group");
                    self.place = place;
                }
                None => {
                    return Err(Broken { failure: refused.failure, group, begun: false, lost, sequences });
                }
            }
        }
    }
}

/// The chunks of a stream that is still to be opened.
pub(crate) fn chunks(opening: impl Future<Output = Result<Chunks, Broken>> + Send + 'static) -> Chunks {
    let opened = async { opening.await.unwrap_or_else(|broken| once(async { Err(broken) }).boxed()) };
    once(opened).flatten().boxed()
}

async fn attempt(
    place: InFlight,
    request: &worker::GenerateRequest,
    deadline: Option<Instant>,
    headers: impl FnOnce(&mut MetadataMap),
    taken: &Notify,
) -> Result<(InFlight, worker::GenerateChunk, Streaming<worker::GenerateChunk>), Refused> {
    let mut request = Request::new(request.clone());
    if let Some(deadline) = deadline {
        // The leader gets the caller's own deadline: ours comes first and is the one that is reported.
        request.set_timeout(deadline.saturating_duration_since(Instant::now()) + DEADLINE_MARGIN);
    }
    headers(request.metadata_mut());
    let group = place.group().address();
    let answer = place.group().client().generate(request).await;
    let mut chunks = answer.map_err(|status| Refused::new(&status, group))?.into_inner();
    taken.notify_one();
    match chunks.message().await {
        Ok(Some(first)) => Ok((place, first, chunks)),
        Ok(None) => Err(Refused { failure: lost(group, ENDED_EARLY), try_elsewhere: true, lost: true }),
        Err(status) => Err(Refused::new(&status, group)),
    }
}

const ENDED_EARLY: &str = "the stream ended without a finish";

impl Refused {
    fn new(status: &Status, group: &str) -> Self {
        // That the group takes this router for a stranger is a matter between the two (a secret that one of them has not read
        // yet): the caller can do nothing about it, and another group may serve.
        let reported = reported(status).filter(|failure| !matches!(failure, Failure::Unauthenticated { .. }));
        let from_leader = reported.is_some();
        let failure = reported.unwrap_or_else(|| {
            let why = format!("group {group}: {}", describe(status));
            match status.code() {
                Code::InvalidArgument | Code::Unimplemented | Code::OutOfRange => Failure::Internal { why },
                // Whatever else did not come from the leader itself came from the connection to it.
                _ => Failure::Unavailable { why, retry_after: RETRY_AFTER },
            }
        });
        let code = failure.code();
        let try_elsewhere = matches!(code, Code::Unavailable | Code::ResourceExhausted | Code::Aborted);
        let lost = code == Code::Aborted || (try_elsewhere && !from_leader);
        Self { failure, try_elsewhere, lost }
    }
}

impl WorkerStream {
    /// The group it runs at.
    pub(crate) fn address(&self) -> &str {
        self.place.group().address()
    }

    /// Its chunks, until all its sequences have ended or it broke.
    pub(crate) fn into_chunks(self) -> Chunks {
        let next = |stream: Option<Box<Self>>| async {
            let mut stream = stream.filter(|stream| stream.open > 0)?;
            match stream.next().await {
                Ok(chunk) => Some((Ok(Piece { chunk, group: Some(stream.place.index()) }), Some(stream))),
                Err(failure) => {
                    let Self { place, sequences, .. } = *stream;
                    let group = place.index();
                    Some((Err(Broken { failure, group, begun: true, lost: false, sequences }), None))
                }
            }
        };
        // In a box: it moves with every chunk.
        unfold(Some(Box::new(self)), next).boxed()
    }

    /// The next chunk.
    ///
    /// # Errors
    /// The leader's own failure, or [`Failure::GroupLost`] when the stream broke or ended before its sequences.
    async fn next(&mut self) -> Result<worker::GenerateChunk, Failure> {
        let chunk = match self.first.take() {
            Some(first) => Ok(Some(first)),
            None => self.chunks.message().await,
        };
        let group = self.address();
        match chunk {
            Ok(Some(chunk)) => {
                self.open = self.open.saturating_sub(usize::from(chunk.finish.is_some()));
                Ok(chunk)
            }
            Ok(None) => Err(self.broken(lost(group, ENDED_EARLY))),
            Err(status) => {
                Err(self.broken(reported(&status).unwrap_or_else(|| lost(group, &describe(&status)))))
            }
        }
    }

    fn broken(&self, failure: Failure) -> Failure {
        self.span.fail(failure.reason(), failure.to_string());
        failure
    }
}

/// What a leader reported, its fields named as callers know them.
fn reported(status: &Status) -> Option<Failure> {
    Failure::from_status(status).map(|failure| GenerationFields::Public.rename(failure))
}

fn lost(group: &str, why: &str) -> Failure {
    Failure::GroupLost { group: group.to_owned(), why: why.to_owned() }
}
