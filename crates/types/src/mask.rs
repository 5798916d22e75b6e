//! Which tokens of a vocabulary may be drawn at one position.

use crate::TokenId;

/// A set of tokens, one bit each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `i % 32` of word `i / 32` is token `i`. Tokens beyond the last word are not in the set.
    words: Vec<u32>,
}

impl TokenMask {
    /// The set whose bits are `words`, token 0 in the lowest bit of the first one.
    #[must_use]
    pub const fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// The set of these tokens.
    #[must_use]
    pub fn of(tokens: &[TokenId]) -> Self {
        let words = tokens.iter().map(|token| token.0 / 32 + 1).max().unwrap_or(0);
        let mut mask = Self { words: vec![0; words as usize] };
        for token in tokens {
            mask.words[token.0 as usize / 32] |= 1 << (token.0 % 32);
        }
        mask
    }

    /// Whether `token` is in the set.
    #[must_use]
    pub fn allows(&self, token: TokenId) -> bool {
        self.words.get(token.0 as usize / 32).is_some_and(|word| word & (1 << (token.0 % 32)) != 0)
    }

    /// Whether the set has a token that is not in `banned`.
    #[must_use]
    pub fn leaves(&self, banned: &[TokenId]) -> bool {
        let own: u64 = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
        let mut taken: Vec<TokenId> = banned.iter().copied().filter(|&token| self.allows(token)).collect();
        taken.sort_unstable();
        taken.dedup();
        own > taken.len() as u64
    }

    /// The words, for whoever applies the set to logits.
    #[must_use]
    pub fn words(&self) -> &[u32] {
        &self.words
    }
}
