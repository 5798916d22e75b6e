//! Answers of a given form: what a caller asks for ([`types::Constraint`], [`Calls`]), put into the chat format as one grammar
//! ([`Form`]), compiled over the bytes of a vocabulary ([`TokenTable`], [`Compiler`]) and followed token by token
//! ([`Matcher`]). The grammars are llguidance's; nothing of it shows outside this crate.
//!
//! The router composes a grammar and compiles it once, so that one which cannot be used never reaches a worker. The
//! leader of a group compiles the same text and follows it.
#![forbid(unsafe_code)]

mod compiler;
mod compose;
mod constraint;
mod error;
pub mod limits;
mod matcher;
mod structural;
mod table;

pub use compiler::Compiler;
pub use compose::{Begin, Calls, Form, Marks, Tool};
pub use error::{Error, Refused};
pub use matcher::Matcher;
pub use table::TokenTable;
