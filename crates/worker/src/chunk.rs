//! What the engine says, on the wire to the router.

use std::time::Duration;

use engine::{Finish, Refusal, TokenLogprob};
use proto::worker::{self, GenerateChunk};
use proto::{Failure, Violation};
use tokio::sync::Semaphore;
use types::{Generation, TokenId};

/// Prompt positions in one message: with many alternatives each, a long prompt would outgrow a gRPC message.
const PROMPT_POSITIONS_MAX: usize = 512;

/// Messages a request can produce at most: what its stream must hold.
pub(crate) fn messages_max(prompt_tokens: usize, generation: &Generation) -> usize {
    // For each sequence its tokens and its end; and the prompt's.
    let each = (generation.max_tokens() as usize).saturating_add(2);
    let all = each.saturating_mul(generation.sequences() as usize);
    all.saturating_add(prompt_tokens.div_ceil(PROMPT_POSITIONS_MAX)).min(Semaphore::MAX_PERMITS)
}

/// Which sequence a chunk belongs to, and what its next one has to tell of its start.
#[derive(Debug)]
pub(crate) struct Origin {
    index: u32,
    start: Start,
}

#[derive(Debug, Clone, Copy)]
enum Start {
    Waited,
    /// With so many tokens that were there already.
    Found(u32),
    Told,
}

impl Origin {
    pub(crate) const fn new(index: u32) -> Self {
        Self { index, start: Start::Waited }
    }

    pub(crate) const fn index(&self) -> u32 {
        self.index
    }

    /// Takes note of its start; what is found after a preemption is its own.
    /// Whether it has not begun.
    pub(crate) const fn waits(&self) -> bool {
        matches!(self.start, Start::Waited)
    }

    pub(crate) fn started(&mut self, cached_tokens: u32) {
        if matches!(self.start, Start::Waited) {
            self.start = Start::Found(cached_tokens);
        }
    }

    fn cached_tokens(&mut self) -> Option<u32> {
        match std::mem::replace(&mut self.start, Start::Told) {
            Start::Found(tokens) => Some(tokens),
            Start::Waited | Start::Told => None,
        }
    }
}

/// One generated token.
pub(crate) fn token(origin: &mut Origin, token: TokenId, logprob: Option<&TokenLogprob>) -> GenerateChunk {
    GenerateChunk {
        index: origin.index,
        cached_tokens: origin.cached_tokens(),
        token_ids: vec![token.0],
        logprobs: logprob.map(wire).into_iter().collect(),
        ..GenerateChunk::default()
    }
}

/// A prompt's log-probabilities, which belong to the request's first sequence, the first position without one.
pub(crate) fn prompt_logprobs(
    origin: &Origin,
    logprobs: Vec<TokenLogprob>,
) -> impl Iterator<Item = GenerateChunk> {
    let index = origin.index;
    let first = worker::PromptLogprob { value: None };
    let rest = logprobs.into_iter().map(|entry| worker::PromptLogprob { value: Some(wire(&entry)) });
    let mut positions = std::iter::once(first).chain(rest).peekable();
    std::iter::from_fn(move || {
        positions.peek()?;
        let prompt_logprobs = positions.by_ref().take(PROMPT_POSITIONS_MAX).collect();
        Some(GenerateChunk { index, prompt_logprobs, ..GenerateChunk::default() })
    })
}

fn wire(entry: &TokenLogprob) -> worker::TokenLogprob {
    let top = entry.top.iter().map(|&(id, logprob)| worker::Alternative { token_id: id.0, logprob });
    worker::TokenLogprob { token_id: entry.token.0, logprob: entry.logprob, top: top.collect() }
}

/// The end of a sequence: a last message, or the failure that ended it.
pub(crate) fn finish(origin: &Origin, finish: Finish) -> Result<GenerateChunk, Failure> {
    let (reason, token_id) = match finish {
        Finish::Eos(token) => (worker::FinishReason::Eos, Some(token.0)),
        Finish::StopToken(token) => (worker::FinishReason::StopToken, Some(token.0)),
        Finish::Length => (worker::FinishReason::Length, None),
        Finish::Cancelled => return Err(Failure::Cancelled),
        Finish::DeadlineExceeded => return Err(Failure::DeadlineExceeded),
        Finish::NoToken => {
            let why = "the form of the answer leaves no token to go on with: its grammar became too large to follow";
            return Err(Failure::Internal { why: why.into() });
        }
        Finish::NotANumber => {
            let why =
                "a logit is not a number: the weights are damaged, or the computation overflowed".into();
            return Err(Failure::Internal { why });
        }
    };
    let finish = worker::Finish { reason: reason.into(), token_id };
    Ok(GenerateChunk { index: origin.index, finish: Some(finish), ..GenerateChunk::default() })
}

/// Why a request was not taken; where too much waits, it is worth to come back after `retry_after`.
pub(crate) fn refusal(refusal: &Refusal, retry_after: Duration) -> Failure {
    let words = refusal.to_string();
    match *refusal {
        Refusal::EmptyPrompt => Violation::new("prompt", words).into(),
        Refusal::TokenOutOfVocabulary { index, .. } => {
            Violation::new(format!("prompt[{index}]"), words).into()
        }
        Refusal::PromptTooLong { tokens, context } => {
            Failure::PromptTooLong { prompt_tokens: tokens as u64, context_tokens_max: context }
        }
        Refusal::KvTooSmall { .. } => Violation::new("prompt", words).into(),
        Refusal::OnlyStopsAllowed { .. } => Violation::new("generation.min_tokens", words).into(),
        Refusal::ResumeOfSeveral { .. }
        | Refusal::ResumeToken { .. }
        | Refusal::ResumeEnded { .. }
        | Refusal::ResumeTooLong { .. } => Violation::new("resume_tokens", words).into(),
        Refusal::Stream { .. } => Violation::new("first_stream", words).into(),
        Refusal::DeadlinePassed { .. } => Failure::DeadlineExceeded,
        // Nothing waits, and still it is too much: it would be tomorrow too.
        Refusal::QueueFull { waiting: 0, max } => {
            let words = format!("asks for more sequences than may wait at once, {max}");
            Violation::new("generation.n", words).into()
        }
        Refusal::QueueTokensFull { waiting: 0, prompt, max } => {
            let words = format!("has {prompt} tokens over all sequences; at most {max} may wait at once");
            Violation::new("prompt", words).into()
        }
        Refusal::QueueFull { max, .. } => {
            Failure::Overloaded { what: "waiting requests".into(), max: max.into(), retry_after }
        }
        Refusal::QueueTokensFull { max, .. } => {
            Failure::Overloaded { what: "waiting prompt tokens".into(), max: max.into(), retry_after }
        }
    }
}
