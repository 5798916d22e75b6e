//! What can be wrong with a tokenizer or a grammar.

/// Why tokens cannot be constrained.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The tokenizer is not one whose tokens stand for bytes.
    #[error("tokenizer.json {reason}")]
    Tokenizer {
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A grammar cannot be compiled.
    #[error("the grammar does not compile: {reason}")]
    Compile {
        /// The compiler's words.
        reason: String,
    },
    /// A grammar cannot be followed any further.
    #[error("the grammar cannot be followed beyond output token {tokens}: {reason}")]
    Follow {
        /// Tokens that were followed.
        tokens: u32,
        /// The matcher's words.
        reason: String,
    },
}

/// A part of a request that no answer can be made to fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Where inside the part that was asked for: empty for all of it, else such as `/properties/age` or `[3]`.
    pub path: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl Refused {
    pub(crate) fn new(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { path: path.into(), reason: reason.into() }
    }
}
