//! A grammar being followed.

use types::{TokenId, TokenMask};

use crate::Error;

/// One sequence's place in its grammar. A clone goes on from the same place; clones share what they learn about the
/// grammar's terminals, so a grammar that is used often gets faster.
#[derive(Clone)]
pub struct Matcher {
    inner: llguidance::Matcher,
    tokens: u32,
}

impl Matcher {
    pub(crate) fn new(parser: llguidance::TokenParser) -> Result<Self, String> {
        let inner = llguidance::Matcher::new(Ok(parser));
        match inner.get_error() {
            Some(error) => Err(error),
            None => Ok(Self { inner, tokens: 0 }),
        }
    }

    /// The tokens that may come next: those that end the sequence are among them exactly when what was followed is a
    /// whole answer.
    ///
    /// # Errors
    /// [`Error::Follow`] when the grammar became too large to follow, or a token was followed that it does not allow.
    pub fn mask(&mut self) -> Result<TokenMask, Error> {
        let mask = self.inner.compute_mask_or_eos().map_err(|error| self.lost(&error))?;
        Ok(TokenMask::from_words(mask.as_slice().to_vec()))
    }

    /// Follows the next token. After a whole answer that nothing can follow, every token is ignored.
    ///
    /// # Errors
    /// [`Error::Follow`] for a token the grammar does not allow here.
    pub fn follow(&mut self, token: TokenId) -> Result<(), Error> {
        if self.is_over() {
            return Ok(());
        }
        self.inner.consume_token(token.0).map_err(|error| self.lost(&error))?;
        self.tokens += 1;
        Ok(())
    }

    /// Goes back to where it was after `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Follow`] when the grammar could not be followed that far.
    pub fn rewind(&mut self, tokens: u32) -> Result<(), Error> {
        let back = self.tokens.saturating_sub(tokens);
        self.inner.rollback(back as usize).map_err(|error| self.lost(&error))?;
        self.tokens -= back;
        Ok(())
    }

    /// Whether nothing can follow but the end.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.inner.is_stopped() && !self.inner.is_error()
    }

    fn lost(&self, error: &impl ToString) -> Error {
        let text = error.to_string();
        Error::Follow { tokens: self.tokens, reason: text.lines().next().unwrap_or_default().to_owned() }
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher").field("tokens", &self.tokens).finish_non_exhaustive()
    }
}
