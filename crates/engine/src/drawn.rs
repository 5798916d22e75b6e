//! What a step drew, for the next one.

use types::TokenId;

use crate::{Error, RowOutput};

/// The tokens a step drew, by logit row: what the inputs of the next step refer to as [`crate::Input::Drawn`]. The leader
/// sends it to every rank as soon as it has sampled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drawn {
    pub(crate) step: u64,
    pub(crate) tokens: Vec<Option<TokenId>>,
}

impl Drawn {
    /// The number of the step that drew them; 0 when none did.
    #[must_use]
    pub const fn step(&self) -> u64 {
        self.step
    }

    /// The token of each logit row; `None` where none was drawn.
    #[must_use]
    pub fn tokens(&self) -> &[Option<TokenId>] {
        &self.tokens
    }

    /// Takes the tokens from the results of `step`. The memory is kept.
    pub fn take(&mut self, step: u64, rows: &[RowOutput]) {
        self.step = step;
        self.tokens.clear();
        self.tokens.extend(rows.iter().map(|row| match row {
            RowOutput::Sampled { token, .. } => Some(*token),
            RowOutput::PromptLogprob(_) | RowOutput::NoToken | RowOutput::NotANumber => None,
        }));
    }

    /// Whether these are the tokens of `step`.
    ///
    /// # Errors
    /// When they are another step's.
    pub(crate) const fn answers(&self, step: u64) -> Result<(), Error> {
        if self.step == step { Ok(()) } else { Err(Error::DrawnStep { got: self.step, expected: step }) }
    }
}
