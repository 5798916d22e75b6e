//! What a sequence may draw next: a grammar, a limit to its thoughts, or both.
//!
//! A mask belongs to a position of a sequence. It is prepared by threads of its own as soon as the token before is
//! drawn, while the model computes the next row ([`Guides`]); the sampler takes it when it comes to that row. One that
//! is not ready by then is computed by the sampler itself, so a row never waits for another one's mask, and what is
//! drawn does not depend on who was faster. How long that can take is bounded by the grammar's fuel, see
//! [`grammar::limits`].

mod choices;
mod guides;
mod kitchen;
mod thinking;

use std::sync::{Mutex, MutexGuard, PoisonError};

use grammar::{Error, Matcher};
use types::{TokenId, TokenMask};

pub(crate) use choices::{Choices, Limit};
pub(crate) use guides::Guides;
pub(crate) use kitchen::Kitchen;
pub(crate) use thinking::Thinking;

/// What a request asks of its sequences, before any has drawn a token.
#[derive(Debug, Clone)]
pub(crate) struct Guidance {
    pub(crate) matcher: Option<Matcher>,
    pub(crate) thinking: Option<Thinking>,
}

impl Guidance {
    /// A guide behind `tokens` that were generated already.
    ///
    /// # Errors
    /// When the grammar does not allow them.
    pub(crate) fn resume(&self, tokens: &[TokenId]) -> Result<Guide, Error> {
        let Self { mut matcher, thinking } = self.clone();
        if let Some(matcher) = &mut matcher {
            tokens.iter().try_for_each(|&token| matcher.follow(token))?;
        }
        let state = State { matcher, thinking, tokens: tokens.to_vec(), drawn: None, ready: None };
        Ok(Guide(Mutex::new(state)))
    }
}

/// One sequence's guide.
#[derive(Debug)]
pub(crate) struct Guide(Mutex<State>);

#[derive(Debug)]
struct State {
    matcher: Option<Matcher>,
    /// As it was at the beginning of the output.
    thinking: Option<Thinking>,
    /// The output that was followed.
    tokens: Vec<TokenId>,
    /// The token drawn behind it, not followed yet.
    drawn: Option<TokenId>,
    /// What may come behind `tokens`.
    ready: Option<Result<Choice, Error>>,
}

/// The tokens that may come next.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Choice {
    /// Whatever the request's own rules allow.
    Any,
    /// These.
    Of(TokenMask),
}

/// A choice, and whether it was there when it was asked for.
#[derive(Debug, PartialEq)]
pub(crate) struct Asked {
    pub(crate) choice: Choice,
    pub(crate) was_ready: bool,
}

impl Guide {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What may be drawn behind `position` tokens of output.
    ///
    /// # Errors
    /// When the grammar cannot be followed there.
    pub(crate) fn choice(&self, position: u32) -> Result<Asked, Error> {
        let mut state = self.lock();
        state.go_to(position)?;
        let was_ready = state.drawn.is_none() && state.ready.is_some();
        state.prepare();
        let choice = state.ready.clone().unwrap_or(Ok(Choice::Any))?;
        Ok(Asked { choice, was_ready })
    }

    /// Takes note of the token drawn at `position`. What follows is prepared by [`Guide::prepare`], elsewhere.
    pub(crate) fn drew(&self, position: u32, token: TokenId) {
        let mut state = self.lock();
        if state.tokens.len() == position as usize {
            state.drawn = Some(token);
        }
    }

    /// Computes what may come next, unless that is known.
    pub(crate) fn prepare(&self) {
        self.lock().prepare();
    }
}

impl State {
    /// Makes the output that is known `position` tokens long. It can only be shorter than what was followed when a
    /// token was drawn that did not count, and is drawn again.
    fn go_to(&mut self, position: u32) -> Result<(), Error> {
        let known = self.tokens.len() + usize::from(self.drawn.is_some());
        if known == position as usize {
            return Ok(());
        }
        self.drawn = None;
        self.ready = None;
        if self.tokens.len() < position as usize {
            let reason = format!("output token {position} was asked for, and {known} are known");
            return Err(Error::Follow { tokens: position, reason });
        }
        self.tokens.truncate(position as usize);
        self.matcher.as_mut().map_or(Ok(()), |matcher| matcher.rewind(position))
    }

    fn prepare(&mut self) {
        if let Some(token) = self.drawn.take() {
            self.ready = None;
            self.tokens.push(token);
            if let Some(Err(error)) = self.matcher.as_mut().map(|matcher| matcher.follow(token)) {
                self.ready = Some(Err(error));
            }
        }
        if self.ready.is_none() {
            self.ready = Some(self.compute());
        }
    }

    fn compute(&mut self) -> Result<Choice, Error> {
        let mask = self.matcher.as_mut().map(Matcher::mask).transpose()?;
        let forced = self.thinking.as_ref().and_then(|thinking| thinking.must_end(&self.tokens));
        match (mask, forced) {
            // Inside a character the grammar does not let the thoughts end; the next token completes it.
            (Some(mask), Some(end)) if !mask.allows(end) => Ok(Choice::Of(mask)),
            (_, Some(end)) => Ok(Choice::Of(TokenMask::of(&[end]))),
            (Some(mask), None) => Ok(Choice::Of(mask)),
            (None, None) => Ok(Choice::Any),
        }
    }
}

#[cfg(test)]
mod tests;
