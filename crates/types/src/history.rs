//! What a sequence has had so far, in the form penalties and bad words need it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::TokenId;

/// The tokens of one sequence: how often each was generated, and in what order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// Every token of the prompt or the output, and how often it was generated.
    seen: HashMap<TokenId, u32>,
    generated: Vec<TokenId>,
}

impl History {
    /// The history of a sequence that has a prompt and has generated some tokens.
    #[must_use]
    pub fn new(prompt: &[TokenId], generated: &[TokenId]) -> Self {
        let seen = prompt.iter().map(|&token| (token, 0)).collect();
        let mut history = Self { seen, generated: Vec::with_capacity(generated.len()) };
        generated.iter().for_each(|&token| history.push(token));
        history
    }

    /// Adds the token generated next.
    pub fn push(&mut self, token: TokenId) {
        *self.seen.entry(token).or_default() += 1;
        self.generated.push(token);
    }

    /// Each token of prompt and output once, in no particular order, with how often it was generated.
    pub fn seen(&self) -> impl Iterator<Item = (TokenId, u32)> + '_ {
        self.seen.iter().map(|(&token, &times)| (token, times))
    }

    /// The tokens generated, in order.
    #[must_use]
    pub fn generated(&self) -> &[TokenId] {
        &self.generated
    }
}

/// A history that only grows by drawing from it: the sampler is its one reader and its one writer, in the order of
/// steps, and whoever hands it to the sampler can do neither. The lock is never waited for, because the rows
/// of a sequence are sampled one after the other.
#[derive(Debug, Clone)]
pub struct SharedHistory(Arc<Mutex<History>>);

impl SharedHistory {
    /// Shares `history`.
    #[must_use]
    pub fn new(history: History) -> Self {
        Self(Arc::new(Mutex::new(history)))
    }

    /// Lets `choose` see the history and draw the next token, which is added to it.
    pub fn draw(&self, choose: impl FnOnce(&History) -> TokenId) -> TokenId {
        let mut history = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let token = choose(&history);
        history.push(token);
        token
    }

    /// Lets `read` see the history as it is now.
    pub fn look<T>(&self, read: impl FnOnce(&History) -> T) -> T {
        read(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What it holds now.
    #[must_use]
    pub fn snapshot(&self) -> History {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl PartialEq for SharedHistory {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.snapshot() == other.snapshot()
    }
}
