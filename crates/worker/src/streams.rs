//! The streams of open requests: which sequence's effects go where.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use engine::{Effect, Finish};
use proto::Failure;
use types::SeqId;

use crate::chunk::{self, Origin};
use crate::guide::Guides;
use crate::inbox::Sink;
use crate::numerics::Numerics;

/// Open sequences. Bounded by the engine's queue and batch.
pub(crate) struct Streams {
    open: BTreeMap<SeqId, Open>,
    /// Closed with the sequences.
    guides: Arc<Guides>,
    /// What every layer was found to hold, when that is looked at.
    numerics: Option<Numerics>,
}

/// One sequence and the stream it shares with the others of its request: the stream ends with the last of them.
struct Open {
    sink: Sink,
    origin: Origin,
    /// What its request is called by a cancel; 0 for nothing.
    key: u64,
}

impl Streams {
    pub(crate) const fn new(guides: Arc<Guides>) -> Self {
        Self { open: BTreeMap::new(), guides, numerics: None }
    }

    /// Opens the stream of a request's sequences, which are numbered from `first_stream` on.
    pub(crate) fn open(&mut self, sequences: Range<SeqId>, first_stream: u32, key: u64, sink: &Sink) {
        for (index, id) in (0..).zip(sequences.start.0..sequences.end.0) {
            // A first stream too high is for the engine to refuse.
            let origin = Origin::new(first_stream.saturating_add(index));
            self.open.insert(SeqId(id), Open { sink: sink.clone(), origin, key });
        }
    }

    /// Forgets sequence `index` of the request called `key`, if it is open.
    pub(crate) fn take(&mut self, key: u64, index: u32) -> Option<SeqId> {
        let named = |open: &Open| key != 0 && open.key == key && open.origin.index() == index;
        let seq = self.open.iter().find(|(_, open)| named(open)).map(|(&seq, _)| seq)?;
        self.open.remove(&seq).map(|_| seq)
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
        let gone: Vec<SeqId> = closed.map(|(&seq, _)| seq).collect();
        self.open.retain(|_, open| !open.sink.is_closed());
        gone.into_iter()
    }

    /// Passes an effect on to the stream it belongs to. A stream that is closed is noticed before the next step.
    pub(crate) fn deliver(&mut self, effect: Effect) {
        match effect {
            Effect::Token { seq, token, logprob } => {
                if let Some(Open { sink, origin, .. }) = self.open.get_mut(&seq) {
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
            Effect::Started { seq, cached_tokens } => {
                if let Some(open) = self.open.get_mut(&seq) {
                    open.origin.started(cached_tokens);
                }
            }
            Effect::Preempted { seq } => tracing::info!(%seq, "preempted for lack of KV blocks"),
            Effect::Finished { seq, finish, .. } => {
                self.guides.close(seq);
                if let Some(Open { sink, origin, .. }) = self.open.remove(&seq) {
                    let end = match (finish, &self.numerics) {
                        (Finish::NotANumber, Some(numerics)) => Err(numerics.failure()),
                        _ => chunk::finish(&origin, finish),
                    };
                    let _ = sink.try_send(end.map_err(Into::into));
                }
            }
            Effect::Refused { seq, refusal } => {
                self.guides.close(seq);
                if let Some(Open { sink, .. }) = self.open.remove(&seq) {
                    let _ = sink.try_send(Err(chunk::refusal(&refusal).into()));
                }
            }
        }
    }

    /// Ends every open request with the same status.
    pub(crate) fn end_all(&mut self, why: &Failure) {
        for (_, Open { sink, .. }) in std::mem::take(&mut self.open) {
            let _ = sink.try_send(Err(why.to_status()));
        }
    }
}
