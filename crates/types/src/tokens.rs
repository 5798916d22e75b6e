//! Tokens, positions and KV blocks.

use std::fmt;

use crate::Error;
use crate::limits::BLOCK_TOKENS_MAX;

/// An index into the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct TokenId(pub u32);

/// A token's place in its sequence, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Position(pub u32);

/// A physical KV block inside one KV group's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct BlockId(pub u32);

/// Tokens per KV block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockSize(u32);

impl BlockSize {
    /// A block of `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Count`] when `tokens` is 0 or above [`BLOCK_TOKENS_MAX`].
    pub const fn new(tokens: u32) -> Result<Self, Error> {
        if tokens == 0 || tokens > BLOCK_TOKENS_MAX {
            return Err(Error::Count {
                what: "block size",
                got: tokens as u64,
                max: BLOCK_TOKENS_MAX as u64,
            });
        }
        Ok(Self(tokens))
    }

    /// Tokens per block.
    #[must_use]
    pub const fn tokens(self) -> u32 {
        self.0
    }

    /// Blocks needed to hold `tokens` tokens.
    #[must_use]
    pub const fn blocks_for(self, tokens: u32) -> u32 {
        tokens.div_ceil(self.0)
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
