//! Which tokens a request wants more, less, or not at all.

use crate::TokenId;

/// Constraints on single tokens and short runs of them, valid by construction; empty when a request has none.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenRules {
    pub(crate) logit_bias: Vec<(TokenId, f32)>,
    pub(crate) allowed: Vec<TokenId>,
    pub(crate) bad_words: Vec<Vec<TokenId>>,
}

impl TokenRules {
    /// What is added to the logits of some tokens; each token once.
    #[must_use]
    pub fn logit_bias(&self) -> &[(TokenId, f32)] {
        &self.logit_bias
    }

    /// The only tokens that may be drawn, ascending, each once; `None` when all may.
    #[must_use]
    pub fn allowed(&self) -> Option<&[TokenId]> {
        (!self.allowed.is_empty()).then_some(&self.allowed)
    }

    /// Runs of tokens that must not be generated; none is empty.
    #[must_use]
    pub fn bad_words(&self) -> &[Vec<TokenId>] {
        &self.bad_words
    }

    /// Whether there is no rule.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.logit_bias.is_empty() && self.allowed.is_empty() && self.bad_words.is_empty()
    }
}
