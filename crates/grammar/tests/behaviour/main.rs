//! Grammars over the demo's vocabulary: what is drawn from them, and what is refused.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may unwrap as tests do")]

mod chat_format;
mod forms;
mod refusals;
mod support;
