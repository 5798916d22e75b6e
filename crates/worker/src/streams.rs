//! The streams of open requests: which sequence's effects go where.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{Effect, Finish, Refusal};
use proto::{Failure, Pace, RETRY_AFTER};
use trace::Parent;
use types::SeqId;

use crate::chunk::{self, Origin};
use crate::guide::Guides;
use crate::inbox::{Asker, Sink};
use crate::metrics::{Clocked, Times};
use crate::numerics::Numerics;
use crate::traced::Stages;

/// Open sequences. Bounded by the engine's queue and batch.
pub(crate) struct Streams {
    open: BTreeMap<SeqId, Open>,
    /// Closed with the sequences.
    guides: Arc<Guides>,
    /// What every layer was found to hold, when that is looked at.
    numerics: Option<Numerics>,
    times: Times,
    /// How those that wait begin while no more may wait.
    pace: Pace,
}

/// One sequence and the stream it shares with the others of its request: the stream ends with the last of them.
struct Open {
    sink: Sink,
    origin: Origin,
    /// What its request is called by a cancel; 0 for nothing.
    key: u64,
    request: Arc<str>,
    clocked: Option<Clocked>,
    /// Of a request that is traced.
    stages: Option<Box<Stages>>,
}

impl Open {
    /// Nobody waits for it any more.
    fn abandoned(&self, seq: SeqId) -> SeqId {
        tracing::debug!(request = &*self.request, "its caller left");
        if let Some(stages) = &self.stages {
            stages.failed("ABANDONED", "nobody waits for it any more");
        }
        seq
    }
}

impl Streams {
    pub(crate) fn new(guides: Arc<Guides>, times: Times) -> Self {
        Self { open: BTreeMap::new(), guides, numerics: None, times, pace: Pace::default() }
    }

    /// Opens the stream of a request's sequences, which are numbered from `first_stream` on.
    pub(crate) fn open(
        &mut self,
        sequences: Range<SeqId>,
        first_stream: u32,
        (key, asker): (u64, &Asker),
        sink: &Sink,
    ) {
        for (index, id) in (0..).zip(sequences.start.0..sequences.end.0) {
            // A first stream too high is for the engine to refuse.
            let origin = Origin::new(first_stream.saturating_add(index));
            let stages = Stages::queued(&asker.span, origin.index());
            let clocked = asker.counted.then(Clocked::new);
            let (sink, request) = (sink.clone(), Arc::clone(&asker.request));
            self.open.insert(SeqId(id), Open { sink, origin, key, request, clocked, stages });
        }
    }

    /// Forgets sequence `index` of the request called `key`, if it is open.
    pub(crate) fn take(&mut self, key: u64, index: u32) -> Option<SeqId> {
        let named = |open: &Open| key != 0 && open.key == key && open.origin.index() == index;
        let seq = self.open.iter().find(|(_, open)| named(open)).map(|(&seq, _)| seq)?;
        self.open.remove(&seq).map(|_| seq)
    }

    /// What a traced sequence belongs to.
    pub(crate) fn traced(&self, seq: SeqId) -> Option<Parent> {
        self.open.get(&seq)?.stages.as_ref()?.parent()
    }

    pub(crate) fn explain_with(&mut self, numerics: Option<Numerics>) {
        self.numerics = numerics;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Forgets the sequences nobody waits for any more, and names them.
    pub(crate) fn take_abandoned(&mut self) -> impl Iterator<Item = SeqId> + use<> {
        let closed = self.open.iter().filter(|(_, open)| open.sink.is_closed());
        let gone: Vec<SeqId> = closed.map(|(&seq, open)| open.abandoned(seq)).collect();
        self.open.retain(|_, open| !open.sink.is_closed());
        gone.into_iter()
    }

    /// Passes an effect on to the stream it belongs to. A stream that is closed is noticed before the next step.
    pub(crate) fn deliver(&mut self, effect: Effect) {
        match effect {
            Effect::Token { seq, token, logprob } => {
                if let Some(Open { sink, origin, stages, clocked, .. }) = self.open.get_mut(&seq) {
                    if let Some(clocked) = clocked {
                        clocked.drew(&self.times);
                    }
                    if let Some(stages) = stages {
                        stages.drew();
                    }
                    let _ = sink.try_send(Ok(chunk::token(origin, token, logprob.as_ref())));
                }
            }
            Effect::PromptLogprobs { seq, logprobs } => {
                if let Some(Open { sink, origin, .. }) = self.open.get(&seq) {
                    chunk::prompt_logprobs(origin, logprobs).for_each(|chunk| {
                        let _ = sink.try_send(Ok(chunk));
                    });
                }
            }
            Effect::Started { seq, cached_tokens, .. } => {
                if let Some(open) = self.open.get_mut(&seq) {
                    // One that was preempted does not wait for a place in the queue.
                    if open.origin.waits() {
                        let now = Instant::now();
                        self.pace.left(1, now);
                        self.pace.eased(now);
                    }
                    open.origin.started(cached_tokens);
                    if let Some(clocked) = &mut open.clocked {
                        clocked.started(&self.times);
                    }
                    if let Some(stages) = &mut open.stages {
                        stages.started(cached_tokens);
                    }
                }
            }
            Effect::Preempted { seq } => {
                let open = self.open.get_mut(&seq);
                let request = open.as_ref().map(|open| Arc::clone(&open.request));
                tracing::info!(request = request.as_deref(), "preempted for lack of KV blocks");
                if let Some(stages) = open.and_then(|open| open.stages.as_mut()) {
                    stages.preempted();
                }
            }
            Effect::Finished { seq, finish, usage } => {
                self.guides.close(seq);
                if let Some(Open { sink, origin, stages, clocked, .. }) = self.open.remove(&seq) {
                    if let Some(clocked) = clocked {
                        clocked.finished(&self.times);
                    }
                    if let Some(stages) = stages {
                        stages.finished(finish, &usage);
                    }
                    let end = match (finish, &self.numerics) {
                        (Finish::NotANumber, Some(numerics)) => Err(numerics.failure()),
                        _ => chunk::finish(&origin, finish),
                    };
                    let _ = sink.try_send(end.map_err(Into::into));
                }
            }
            Effect::Refused { seq, refusal } => {
                self.guides.close(seq);
                if let Some(Open { sink, stages, .. }) = self.open.remove(&seq) {
                    let failure = chunk::refusal(&refusal, self.retry_after(&refusal));
                    if let Some(stages) = stages {
                        stages.failed(failure.reason(), &failure.to_string());
                    }
                    let _ = sink.try_send(Err(failure.into()));
                }
            }
        }
    }

    /// When it is worth to come back for one that was refused.
    fn retry_after(&mut self, refusal: &Refusal) -> Duration {
        if !matches!(refusal, Refusal::QueueFull { .. } | Refusal::QueueTokensFull { .. }) {
            return RETRY_AFTER;
        }
        let now = Instant::now();
        self.pace.full(now);
        let waiting = self.open.values().filter(|open| open.origin.waits()).count();
        self.pace.wait(u32::try_from(waiting).unwrap_or(u32::MAX), now)
    }

    /// Ends every open request with the same status.
    pub(crate) fn end_all(&mut self, why: &Failure) {
        for (_, Open { sink, stages, .. }) in std::mem::take(&mut self.open) {
            if let Some(stages) = stages {
                stages.failed(why.reason(), &why.to_string());
            }
            let _ = sink.try_send(Err(why.to_status()));
        }
    }
}
