//! The streams of open requests: which sequence's effects go where.

use std::collections::BTreeMap;

use engine::{Effect, Finish};
use proto::Failure;
use types::SeqId;

use crate::chunk::{self, Origin};
use crate::inbox::Sink;
use crate::numerics::Numerics;

/// Open sequences. Bounded by the engine's queue and batch.
#[derive(Default)]
pub(crate) struct Streams {
    open: BTreeMap<SeqId, Open>,
    /// What every layer was found to hold, when that is looked at.
    numerics: Option<Numerics>,
}

/// One sequence and the stream it shares with the others of its request: the stream ends with the last of them.
struct Open {
    sink: Sink,
    origin: Origin,
}

impl Streams {
    /// Opens the stream of a request's sequences: ids from `seq` on, numbers from `first_stream` on.
    pub(crate) fn open(&mut self, seq: SeqId, sequences: u32, first_stream: u32, sink: &Sink) {
        for index in 0..sequences {
            // A first stream too high is for the engine to refuse.
            let origin = Origin::new(first_stream.saturating_add(index));
            self.open.insert(SeqId(seq.0 + u64::from(index)), Open { sink: sink.clone(), origin });
        }
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
                if let Some(Open { sink, origin }) = self.open.get_mut(&seq) {
                    let _ = sink.try_send(Ok(chunk::token(origin, token, logprob.as_ref())));
                }
            }
            Effect::PromptLogprobs { seq, logprobs } => {
                if let Some(Open { sink, origin }) = self.open.get(&seq) {
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
                if let Some(Open { sink, origin }) = self.open.remove(&seq) {
                    let end = match (finish, &self.numerics) {
                        (Finish::NotANumber, Some(numerics)) => Err(numerics.failure()),
                        _ => chunk::finish(&origin, finish),
                    };
                    let _ = sink.try_send(end.map_err(Into::into));
                }
            }
            Effect::Refused { seq, refusal } => {
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
