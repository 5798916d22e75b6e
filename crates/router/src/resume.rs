//! A request whose group was lost goes on at another one, from the tokens it has: its caller sees no gap and no repeat.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::once;
use proto::{Failure, worker};
use tokio::time::Instant;
use tonic::Code;

use crate::forward::{Broken, Chunks, Piece, Placed, chunks};
use crate::trail::Trail;
use crate::workers::Groups;

/// Times one request may lose its group: one that brings down whatever runs it must not bring down everything.
const LOSSES_MAX: u32 = 3;
/// Between two looks for a group that takes what was interrupted, doubled up to the maximum.
const LOOK_MIN: Duration = Duration::from_millis(10);
const LOOK_MAX: Duration = Duration::from_millis(500);
/// Longest wait for a leader to take note of a cancel.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);

/// What it takes to run sequences of a request again.
pub(crate) struct Replay {
    groups: Arc<Groups>,
    /// As it was first sent.
    request: Arc<worker::GenerateRequest>,
    eos_token_ids: Vec<u32>,
    deadline: Option<Instant>,
    /// Longest wait for a group that takes it.
    grace: Duration,
    losses: u32,
    trail: Trail,
}

impl Replay {
    /// For a request with a deadline, that waits no longer than a grace for a group when it was interrupted; never
    /// resumed when that is zero.
    pub(crate) fn new(
        groups: &Arc<Groups>,
        request: &Arc<worker::GenerateRequest>,
        eos_token_ids: Vec<u32>,
        limits: (Option<Instant>, Duration),
        trail: &Trail,
    ) -> Self {
        let (deadline, grace) = limits;
        let (groups, request) = (Arc::clone(groups), Arc::clone(request));
        Self { groups, request, eos_token_ids, deadline, grace, losses: 0, trail: trail.clone() }
    }

    /// The request as it is sent first.
    pub(crate) fn start(&self, placed: Placed) -> Chunks {
        placed.into_chunks(self.deadline)
    }

    /// Takes note of a loss.
    ///
    /// # Errors
    /// Its failure, when another group would fail in the same way, or it is one loss too many.
    pub(crate) fn lose(&mut self, broken: &Broken) -> Result<(), Failure> {
        self.losses += 1;
        let interrupted = broken.begun && matches!(broken.failure.code(), Code::Unavailable | Code::Aborted);
        match (interrupted || broken.lost) && self.losses <= LOSSES_MAX && !self.grace.is_zero() {
            true => Ok(()),
            false => Err(broken.failure.clone()),
        }
    }

    /// Sequence `index` of the request from its `tokens` on.
    pub(crate) fn resume(&self, index: u32, tokens: &[u32], broken: &Broken) -> Chunks {
        if let Some(finish) = self.ended(tokens) {
            // Only the word that it had ended was lost.
            let finish = Some(finish);
            let chunk = worker::GenerateChunk { index, finish, ..worker::GenerateChunk::default() };
            return once(async { Ok(Piece { chunk, group: None }) }).boxed();
        }
        let resume_tokens = tokens.to_vec();
        let mut request = worker::GenerateRequest { first_stream: index, resume_tokens, ..self.part(1) };
        if let Some(generation) = request.generation.as_mut().filter(|_| index > 0 || !tokens.is_empty()) {
            generation.prompt_logprobs = None;
        }
        self.search(request, broken)
    }

    /// Tells a group that sequence `index` is not wanted any more, while its stream goes on for others.
    pub(crate) fn cancel(&self, group: usize, index: u32) {
        let Some(mut client) = self.groups.client(group) else { return };
        let (asked, id) = (worker::CancelRequest { key: self.request.key, index }, Arc::clone(&self.request));
        tokio::spawn(async move {
            // Without it the sequence is computed to its end, and nobody reads it.
            if let Ok(Err(status)) = tokio::time::timeout(CANCEL_TIMEOUT, client.cancel(asked)).await {
                tracing::debug!(request = id.request_id, index, %status, "a sequence could not be cancelled");
            }
        });
    }

    /// All sequences of a stream that had generated nothing.
    pub(crate) fn again(&self, broken: &Broken) -> Chunks {
        let Range { start, end } = broken.sequences;
        let request = worker::GenerateRequest { first_stream: start, ..self.part(end.saturating_sub(start)) };
        self.search(request, broken)
    }

    /// The request for some of its sequences.
    fn part(&self, sequences: u32) -> worker::GenerateRequest {
        let mut request = worker::GenerateRequest::clone(&self.request);
        if let Some(generation) = &mut request.generation {
            generation.n = Some(sequences);
        }
        request
    }

    fn search(&self, request: worker::GenerateRequest, broken: &Broken) -> Chunks {
        let search = Search {
            groups: Arc::clone(&self.groups),
            request: Arc::new(request),
            deadline: self.deadline,
            until: Instant::now() + self.grace,
            lost: broken.clone(),
            trail: self.trail.clone(),
        };
        chunks(search.run())
    }

    /// How a sequence with these tokens ended, if it did.
    fn ended(&self, tokens: &[u32]) -> Option<worker::Finish> {
        let generation = self.request.generation.as_ref()?;
        let &last = tokens.last()?;
        // Neither kind is drawn before `min_tokens`.
        let eos = !generation.ignore_eos && self.eos_token_ids.contains(&last);
        let (reason, token_id) = if eos {
            (worker::FinishReason::Eos, Some(last))
        } else if generation.stop_token_ids.contains(&last) {
            (worker::FinishReason::StopToken, Some(last))
        } else if generation.max_tokens.is_some_and(|max| tokens.len() >= max as usize) {
            (worker::FinishReason::Length, None)
        } else {
            return None;
        };
        Some(worker::Finish { reason: reason.into(), token_id })
    }
}

/// The search for a group that goes on with a sequence.
struct Search {
    groups: Arc<Groups>,
    request: Arc<worker::GenerateRequest>,
    deadline: Option<Instant>,
    until: Instant,
    lost: Broken,
    trail: Trail,
}

impl Search {
    /// The chunks from the group found; without one, what was lost first.
    async fn run(self) -> Result<Chunks, Broken> {
        let span = self.trail.migration(&self.request, &self.lost.failure);
        let mut wait = LOOK_MIN;
        // Another group is better than the one that has just been lost, whatever that one says of itself.
        let mut tried = vec![self.lost.group];
        loop {
            let tried = std::mem::take(&mut tried);
            if let Ok(placed) = Placed::new(&self.groups, &self.request, tried, &self.trail) {
                match placed.open(self.deadline).await {
                    Ok(stream) => {
                        self.groups.count_resumed();
                        self.groups.migrations.count(self.request.resume_tokens.len());
                        self.tell(stream.address());
                        span.set("server.address", stream.address().to_owned());
                        return Ok(stream.into_chunks());
                    }
                    Err(broken) if !may_pass(&broken.failure) => {
                        span.fail(broken.failure.reason(), broken.failure.to_string());
                        return Err(broken);
                    }
                    Err(_) => {}
                }
            }
            if Instant::now() + wait > self.until {
                span.fail(self.lost.failure.reason(), "no group took it in time");
                return Err(self.lost);
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LOOK_MAX);
        }
    }

    fn tell(&self, to: &str) {
        let worker::GenerateRequest { request_id, resume_tokens, first_stream, .. } = &*self.request;
        let (tokens, why) = (resume_tokens.len(), &self.lost.failure);
        tracing::warn!(request = %request_id, sequence = first_stream, tokens, %why, to, "resumed after the loss of its group");
    }
}

/// Whether it may be otherwise in a moment.
fn may_pass(failure: &Failure) -> bool {
    matches!(failure.code(), Code::Unavailable | Code::Aborted | Code::ResourceExhausted)
}
