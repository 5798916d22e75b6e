//! What a call brings beside its message: an id and a deadline.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use proto::{Failure, Violation};
use security::Visit;
use tokio::time::Instant;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Extensions, Status};

use crate::running::{Entry, Running};
use crate::trail::Trail;

/// The header that carries a request's id both ways.
pub(crate) const REQUEST_ID: &str = "x-request-id";
const REQUEST_ID_BYTES_MAX: usize = 128;
/// A request ends this much before its deadline, so that our status with its details is out before the transport's
/// own timer ends the call with a bare CANCELLED.
pub(crate) const DEADLINE_MARGIN: Duration = Duration::from_millis(5);

/// One call's identity and time.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) request_id: String,
    pub(crate) deadline: Option<Instant>,
    /// Its line among the running requests, for as long as a part of it runs.
    entry: Option<Arc<Entry>>,
    /// The use of its API key, where one is asked for.
    visit: Option<Arc<Visit>>,
    /// Its trace.
    pub(crate) trail: Trail,
}

impl Call {
    /// Reads the headers of a call whose message names `request_id` (empty: take the header's, else draw one), and what
    /// the door has noted of it.
    ///
    /// # Errors
    /// [`Failure::Invalid`] for an id that cannot travel in a header, or a `grpc-timeout` that is not one.
    pub(crate) fn new(headers: &MetadataMap, noted: &Extensions, request_id: &str) -> Result<Self, Failure> {
        let from_header = || headers.get(REQUEST_ID)?.to_str().ok().filter(|id| is_request_id(id));
        let request_id = match request_id {
            "" => from_header().map_or_else(draw_request_id, str::to_owned),
            id if is_request_id(id) => id.to_owned(),
            _ => {
                let reason = format!("must be 1 to {REQUEST_ID_BYTES_MAX} visible ASCII characters");
                return Err(Violation::new("request_id", reason).into());
            }
        };
        let deadline = proto::timeout(headers)?
            .and_then(|timeout| Instant::now().checked_add(timeout.saturating_sub(DEADLINE_MARGIN)));
        Ok(Self { request_id, deadline, entry: None, visit: noted.get().cloned(), trail: Trail::of(headers) })
    }

    /// Whether its key may have this priority; lower numbers are served first.
    ///
    /// # Errors
    /// [`Failure::Forbidden`] with the most urgent one it may have.
    pub(crate) fn check_priority(&self, priority: i32) -> Result<(), Failure> {
        let bound = self.visit.as_ref().and_then(|visit| visit.meter().limits().priority_min);
        match bound.filter(|&bound| priority < bound) {
            None => Ok(()),
            Some(bound) => {
                let why =
                    format!("this key may ask for priority {bound} or higher numbers, not for {priority}");
                Err(Failure::Forbidden { why })
            }
        }
    }

    /// The name of its API key; empty without one.
    pub(crate) fn key(&self) -> Arc<str> {
        self.visit.as_ref().map_or_else(|| Arc::from(""), |visit| visit.meter().shared_name())
    }

    /// Counts tokens of its prompt or answer.
    pub(crate) fn spend_tokens(&self, count: usize) {
        if let Some(visit) = &self.visit {
            visit.spend_tokens(count, std::time::Instant::now());
        }
    }

    /// The status of a failure, with the request's id in its headers.
    pub(crate) fn status(&self, failure: &Failure) -> Status {
        let mut status = failure.to_status();
        self.label(status.metadata_mut());
        status
    }

    /// Writes the request's id into the headers of an answer.
    pub(crate) fn label(&self, headers: &mut MetadataMap) {
        if let Ok(value) = AsciiMetadataValue::try_from(self.request_id.as_str()) {
            headers.insert(REQUEST_ID, value);
        }
    }

    /// The same call, listed among those that run under its id. A part of a call that is listed stays with the whole.
    pub(crate) fn listed(mut self, running: &Arc<Running>) -> Self {
        self.entry.get_or_insert_with(|| Arc::new(running.enter(&self.request_id)));
        self
    }

    /// Runs `work` until the deadline, until somebody ends the call by its id, or until the router closes.
    ///
    /// # Errors
    /// [`Failure::DeadlineExceeded`], [`Failure::Cancelled`], [`Failure::Unavailable`], or what `work` fails with.
    pub(crate) async fn within<T>(
        &self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let aborted = async {
            match &self.entry {
                Some(entry) => entry.aborted().await,
                None => std::future::pending().await,
            }
        };
        let in_time = async {
            match self.deadline {
                None => work.await,
                Some(deadline) => {
                    tokio::time::timeout_at(deadline, work).await.unwrap_or(Err(Failure::DeadlineExceeded))
                }
            }
        };
        tokio::select! {
            biased;
            failure = aborted => Err(failure),
            result = in_time => result,
        }
    }
}

/// 64 random bits: std's hasher keys come from the system's generator and differ at every call.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn draw_request_id() -> String {
    format!("{:016x}{:016x}", random_u64(), random_u64())
}

/// Whether it can travel in a header, and is short enough for a line of a log.
pub(crate) fn is_request_id(id: &str) -> bool {
    (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}
