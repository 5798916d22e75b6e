//! Every fixed limit of the system, each with the reason it exists. Limits an operator may move are configuration,
//! and these are their ceilings.

use std::time::Duration;

/// Ranks in one group: the widest plan in use (8 GPUs a host, 16 hosts) with room to spare.
pub const RANKS_MAX: u32 = 128;
/// Tokens in one KV block: larger blocks waste memory at every sequence's end.
pub const BLOCK_TOKENS_MAX: u32 = 1024;
/// Alternatives that may be asked for at each position: OpenAI allows 20, and each costs a partial sort.
pub const LOGPROBS_TOP_MAX: u32 = 128;
/// `top_k` above this is indistinguishable from "all" for any vocabulary in use, and refused as a likely mistake.
pub const TOP_K_MAX: u32 = 1 << 20;
/// Stop strings in one request: each is searched for at every token.
pub const STOP_STRINGS_MAX: usize = 64;
/// Bytes of one stop string: text of this length is held back before it is sent.
pub const STOP_STRING_BYTES_MAX: usize = 1024;
/// Stop token ids in one request.
pub const STOP_TOKENS_MAX: usize = 256;
/// Sequences of one request: each takes a place in the queue and in the batch.
pub const SEQUENCES_MAX: u32 = 128;
/// Entries of one request's logit bias: each is applied at every token.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Largest logit bias either way; as OpenAI's, it all but bans a token or all but forces it.
pub const LOGIT_BIAS_ABS_MAX: f32 = 100.0;
/// Largest presence or frequency penalty either way; as OpenAI's.
pub const PENALTY_ABS_MAX: f32 = 2.0;
/// Largest repetition penalty: it divides logits, so more has no further effect.
pub const REPETITION_PENALTY_MAX: f32 = 100.0;
/// Bad words of one request: each is compared at every token.
pub const BAD_WORDS_MAX: usize = 256;
/// Tokens of one bad word.
pub const BAD_WORD_TOKENS_MAX: usize = 64;
/// Bad words of one request as text: each becomes two runs of tokens, with and without a space before it.
pub const BAD_WORD_TEXTS_MAX: usize = BAD_WORDS_MAX / 2;
/// Bytes of one bad word: more would not fit [`BAD_WORD_TOKENS_MAX`] tokens in most languages.
pub const BAD_WORD_BYTES_MAX: usize = 256;
/// Bytes of one cache salt: it is hashed, so more adds nothing.
pub const CACHE_SALT_BYTES_MAX: usize = 1024;
/// Bytes of one session id: it is written into traces, where an id has a few dozen.
pub const SESSION_ID_BYTES_MAX: usize = 256;
/// Temperature above this is noise; OpenAI allows 2.
pub const TEMPERATURE_MAX: f32 = 100.0;
/// Tokens generated when a request does not say how many (and the context allows): enough for an answer, and
/// bounded so that a forgotten field cannot hold a slot for ever.
pub const MAX_TOKENS_DEFAULT: u32 = 1024;
/// Context length no configuration may exceed: positions and token counts fit `u32` with room for sums.
pub const CONTEXT_TOKENS_MAX: u32 = 1 << 24;
/// Priorities go from minus this to this: wide enough for tiers, narrow enough that ageing overtakes every one of them
/// in seconds.
pub const PRIORITY_MAX: i32 = 100;
/// The soonest a caller that is turned away is told to come back: sooner it would only be turned away again.
pub const RETRY_AFTER_MIN: Duration = Duration::from_millis(100);
/// The latest likewise: what is known of a router's pace says nothing of later times.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// Weight of a worker group among the others: the least share is a hundredth of another's.
pub const WEIGHT_MAX: u32 = 100;
/// Size of one gRPC message in bytes: a 1M-token prompt with room to spare.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Bytes of a JSON body that is parsed where it was received: a longer one would hold up the callers that are served by the
/// same thread for longer than it takes to wake another.
pub const JSON_IN_PLACE_BYTES_MAX: usize = 64 << 10;
/// Bytes of one request's headers: ids, keys and trace context take a few hundred.
pub const HEADER_BYTES_MAX: u32 = 64 << 10;

const _: () = assert!(STOP_STRING_BYTES_MAX * STOP_STRINGS_MAX < MESSAGE_BYTES_MAX);
const _: () = assert!(CONTEXT_TOKENS_MAX < u32::MAX / 4);
