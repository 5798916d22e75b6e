//! What the engine says, on the wire to the router.

use engine::{Finish, Refusal, TokenLogprob};
use proto::worker::{self, GenerateChunk};
use proto::{Failure, RETRY_AFTER, Violation};
use types::TokenId;

/// Prompt positions in one message: with many alternatives each, a long prompt would outgrow a gRPC message.
const PROMPT_POSITIONS_MAX: usize = 512;

/// Messages a request can produce at most: what its stream must hold.
pub(crate) fn messages_max(prompt_tokens: usize, max_tokens: u32) -> usize {
    // One for each token, the prompt's, and the end.
    max_tokens as usize + prompt_tokens.div_ceil(PROMPT_POSITIONS_MAX) + 2
}

/// One generated token.
pub(crate) fn token(token: TokenId, logprob: Option<&TokenLogprob>) -> GenerateChunk {
    GenerateChunk {
        token_ids: vec![token.0],
        logprobs: logprob.map(wire).into_iter().collect(),
        ..GenerateChunk::default()
    }
}

/// A prompt's log-probabilities, the first position without one.
pub(crate) fn prompt_logprobs(logprobs: Vec<TokenLogprob>) -> impl Iterator<Item = GenerateChunk> {
    let first = worker::PromptLogprob { value: None };
    let rest = logprobs.into_iter().map(|entry| worker::PromptLogprob { value: Some(wire(&entry)) });
    let mut positions = std::iter::once(first).chain(rest).peekable();
    std::iter::from_fn(move || {
        positions.peek()?;
        let prompt_logprobs = positions.by_ref().take(PROMPT_POSITIONS_MAX).collect();
        Some(GenerateChunk { prompt_logprobs, ..GenerateChunk::default() })
    })
}

fn wire(entry: &TokenLogprob) -> worker::TokenLogprob {
    let top = entry.top.iter().map(|&(id, logprob)| worker::Alternative { token_id: id.0, logprob });
    worker::TokenLogprob { token_id: entry.token.0, logprob: entry.logprob, top: top.collect() }
}

/// The end of a sequence: a last message, or the failure that ended it.
pub(crate) fn finish(finish: Finish) -> Result<GenerateChunk, Failure> {
    let (reason, token_id) = match finish {
        Finish::Eos(token) => (worker::FinishReason::Eos, Some(token.0)),
        Finish::StopToken(token) => (worker::FinishReason::StopToken, Some(token.0)),
        Finish::Length => (worker::FinishReason::Length, None),
        Finish::Cancelled => return Err(Failure::Cancelled),
        Finish::DeadlineExceeded => return Err(Failure::DeadlineExceeded),
        Finish::NotANumber => {
            let why =
                "a logit is not a number: the weights are damaged, or the computation overflowed".into();
            return Err(Failure::Internal { why });
        }
    };
    let finish = worker::Finish { reason: reason.into(), token_id };
    Ok(GenerateChunk { finish: Some(finish), ..GenerateChunk::default() })
}

/// Why a request was not taken.
pub(crate) fn refusal(refusal: &Refusal) -> Failure {
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
        Refusal::QueueFull { max, .. } => {
            Failure::Overloaded { what: "waiting requests".into(), max: max.into(), retry_after: RETRY_AFTER }
        }
        Refusal::QueueTokensFull { max, .. } => Failure::Overloaded {
            what: "waiting prompt tokens".into(),
            max: max.into(),
            retry_after: RETRY_AFTER,
        },
    }
}
