//! What goes into the engine and what comes out of it.

use types::{Generation, Micros, Priority, SeqId, SlotId, TokenId};

use crate::KvGroup;

/// One request, for [`Generation::sequences`] sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The prompt; at least one token.
    pub prompt: Vec<TokenId>,
    /// What to generate, and how.
    pub generation: Generation,
    /// When the caller stops caring.
    pub deadline: Option<Micros>,
    /// What most requests leave alone.
    pub options: RequestOptions,
}

/// Fields of a request with a default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RequestOptions {
    /// Higher goes first; waiting makes up for it, see [`crate::AGEING_MAX`].
    pub priority: Priority,
    /// With whom it shares computed blocks.
    pub reuse: PrefixReuse,
    /// Tokens generated already, elsewhere: they count as output (lengths, penalties, the generator, usage) and are not
    /// emitted again. Only for a request of one sequence.
    pub resume_tokens: Vec<TokenId>,
    /// Generator stream of its first sequence. Together with `resume_tokens`, one sequence of a request of several
    /// goes on alone.
    pub first_stream: u32,
}

/// With whom a request shares the blocks of a prompt they have in common.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PrefixReuse {
    /// Every request without a salt.
    #[default]
    Open,
    /// Requests with the same salt only. A caller with salts of any length hashes them to this one.
    Salted(u128),
    /// Nobody: it computes its whole prompt, and leaves nothing behind. Its own sequences still share.
    Bypass,
}

/// Something that happened outside.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A request arrived. Ids grow: each must be above every one submitted before it. A request for `n` sequences
    /// takes the `n` ids from `seq` on, one for each; effects and cancels name them one by one.
    Submit {
        /// The id the effects of its first sequence will carry.
        seq: SeqId,
        /// The request.
        request: Request,
    },
    /// Nobody waits for this sequence any more. Without effect when it has ended already.
    Cancel(SeqId),
    /// The step planned last has run.
    StepDone(StepOutput),
}

/// What a step computed.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    /// The number of the step.
    pub step: u64,
    /// One result for each entry of [`crate::Step::work`], in its order.
    pub rows: Vec<RowOutput>,
}

/// The result of one logit row.
#[derive(Debug, Clone, PartialEq)]
pub enum RowOutput {
    /// A token was drawn.
    Sampled {
        /// The token.
        token: TokenId,
        /// Its log-probability, when the row's work asked for it.
        logprob: Option<TokenLogprob>,
    },
    /// The log-probability of a prompt token.
    PromptLogprob(TokenLogprob),
    /// Nothing can be drawn: what says which tokens may come has none left. Ends the sequence.
    NoToken,
    /// The logits are not numbers: the weights are damaged or the computation overflowed. Ends the sequence.
    NotANumber,
}

/// A token, how likely it was, and what would have been more likely.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens, most likely first, as many as were asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// Something the caller must pass on. Each submitted sequence gets exactly one [`Effect::Refused`] or
/// [`Effect::Finished`], and nothing after it.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// The request was not taken.
    Refused {
        /// The sequence.
        seq: SeqId,
        /// Why.
        refusal: Refusal,
    },
    /// The prompt's log-probabilities, when asked for; once, before the first token of the request's first sequence. A
    /// resumed request has had them.
    PromptLogprobs {
        /// The sequence.
        seq: SeqId,
        /// Entry `i` belongs to prompt position `i + 1`; the first position has none.
        logprobs: Vec<TokenLogprob>,
    },
    /// The next token.
    Token {
        /// The sequence.
        seq: SeqId,
        /// The token, the stopping one included.
        token: TokenId,
        /// Its log-probability, when asked for.
        logprob: Option<TokenLogprob>,
    },
    /// The sequence got a place in the running batch; again after each [`Effect::Preempted`].
    Started {
        /// The sequence.
        seq: SeqId,
        /// Leading tokens whose keys and values were there already.
        cached_tokens: u32,
        /// The slot it has in plans from now on.
        slot: SlotId,
    },
    /// The sequence lost its blocks to ones that go before it and will be computed again; the caller sees a pause, no repeat.
    Preempted {
        /// The sequence.
        seq: SeqId,
    },
    /// The sequence ended; everything it held is free.
    Finished {
        /// The sequence.
        seq: SeqId,
        /// Why.
        finish: Finish,
        /// What it used.
        usage: Usage,
    },
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model drew this end-of-sequence token.
    Eos(TokenId),
    /// The model drew this stop token of the request.
    StopToken(TokenId),
    /// `max_tokens` were drawn, or the context is full.
    Length,
    /// The caller cancelled it.
    Cancelled,
    /// Its deadline passed.
    DeadlineExceeded,
    /// Nothing could be drawn.
    NoToken,
    /// The logits of its next token were not numbers.
    NotANumber,
}

/// What a sequence used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the prompt that were not computed when it first started, because another request had left them.
    pub cached_tokens: u32,
    /// Tokens generated, those it was resumed with included.
    pub output_tokens: u32,
}

/// Why a request was not taken, with the numbers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is nothing to continue.
    #[error("the prompt is empty; it must have at least one token")]
    EmptyPrompt,
    /// A token the model does not have.
    #[error("prompt token {index} is {token}, which is not below the vocabulary size {vocab_size}")]
    TokenOutOfVocabulary {
        /// Index in the prompt.
        index: usize,
        /// The token.
        token: TokenId,
        /// The vocabulary size.
        vocab_size: u32,
    },
    /// The prompt leaves no room for a generated token.
    #[error("the prompt has {tokens} tokens; the context holds {context} and one must be left to generate")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens of the context.
        context: u32,
    },
    /// The request would not fit even if it ran alone.
    #[error("the request may need {needed} {group} KV blocks ({tokens} tokens) and there are {available}")]
    KvTooSmall {
        /// The group that is too small.
        group: KvGroup,
        /// Tokens of the prompt and of the longest output.
        tokens: u32,
        /// Blocks it needs.
        needed: u32,
        /// Blocks of the pool.
        available: u32,
    },
    /// Every token that is allowed ends the sequence, and it must not end yet.
    #[error(
        "all of allowed_token_ids end the sequence, and min_tokens is {min_tokens}; allow another or set 0"
    )]
    OnlyStopsAllowed {
        /// Tokens it must have.
        min_tokens: u32,
    },
    /// Several sequences cannot go on from the same output.
    #[error("resume_tokens are one sequence's, and the request is for {sequences}; resume each on its own")]
    ResumeOfSeveral {
        /// Sequences asked for.
        sequences: u32,
    },
    /// A resumed token the model does not have.
    #[error("resume token {index} is {token}, which is not below the vocabulary size {vocab_size}")]
    ResumeToken {
        /// Index among the resumed tokens.
        index: usize,
        /// The token.
        token: TokenId,
        /// The vocabulary size.
        vocab_size: u32,
    },
    /// A resumed sequence that had come to its end.
    #[error("resume token {index} is {token}, which ends the sequence: there is nothing to resume")]
    ResumeEnded {
        /// Index among the resumed tokens.
        index: usize,
        /// The token.
        token: TokenId,
    },
    /// A resumed sequence that has all the tokens it may have.
    #[error("{tokens} resume tokens leave nothing to generate: the request may have {max} tokens")]
    ResumeTooLong {
        /// Tokens generated already.
        tokens: usize,
        /// The most it may have.
        max: u32,
    },
    /// A generator stream no request can have.
    #[error("generator streams {first} to {first} + {sequences} - 1 are not all below {max}")]
    Stream {
        /// The first sequence's.
        first: u32,
        /// Sequences asked for.
        sequences: u32,
        /// How many there are.
        max: u32,
    },
    /// Its deadline had passed when it came.
    #[error("the deadline passed {late_us} µs before the request arrived")]
    DeadlinePassed {
        /// How long before.
        late_us: u64,
    },
    /// Too many requests wait.
    #[error("{waiting} requests wait, and no more than {max} may")]
    QueueFull {
        /// Requests that wait.
        waiting: u32,
        /// The limit.
        max: u32,
    },
    /// Too many tokens wait.
    #[error("{waiting} tokens wait; with {prompt} more they would be above the limit of {max}")]
    QueueTokensFull {
        /// Tokens that wait.
        waiting: u64,
        /// Tokens of the request's sequences.
        prompt: u32,
        /// The limit.
        max: u32,
    },
}
