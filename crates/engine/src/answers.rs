//! The results of logit rows as numbers, in which ranks exchange them: every rank knows from a row's kind how many there
//! are.
//!
//! A row takes `token + 2`, or 0 for [`RowOutput::NoToken`] and 1 for [`RowOutput::NotANumber`]; then, when
//! log-probabilities are asked for, that of the token, and of each alternative its token and log-probability.

use types::{Logprobs, TokenId};

use crate::{RowOutput, RowPurpose, TokenLogprob};

/// Codes before that of token 0.
const CODES: u32 = 2;
/// In place of the token, in an alternative that does not exist: a vocabulary may be smaller than what is asked for.
const NONE: f32 = -1.0;

/// What is asked of a logit row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKind {
    /// A token, with log-probabilities when they are asked for.
    Sample(Option<Logprobs>),
    /// The log-probabilities of a prompt token.
    PromptLogprob(Logprobs),
}

impl RowKind {
    /// Of a row that is for this.
    #[must_use]
    pub const fn of(purpose: &RowPurpose) -> Self {
        match purpose {
            RowPurpose::Sample { logprobs, .. } => Self::Sample(*logprobs),
            RowPurpose::PromptLogprob { top, .. } => Self::PromptLogprob(*top),
        }
    }

    const fn logprobs(self) -> Option<Logprobs> {
        match self {
            Self::Sample(logprobs) => logprobs,
            Self::PromptLogprob(top) => Some(top),
        }
    }

    /// How many numbers a result takes.
    #[must_use]
    pub fn width(self) -> usize {
        1 + self.logprobs().map_or(0, |asked| 1 + 2 * asked.top() as usize)
    }

    /// Appends the numbers of `output`, [`RowKind::width`] of them. Token ids are exact below 2^24 - 2.
    pub fn put(self, output: &RowOutput, numbers: &mut Vec<f32>) {
        let end = numbers.len() + self.width();
        let (token, logprob) = match output {
            RowOutput::NoToken => (None, None),
            RowOutput::NotANumber => (Some(1), None),
            RowOutput::Sampled { token, logprob } => (Some(token.0 + CODES), logprob.as_ref()),
            RowOutput::PromptLogprob(logprob) => (Some(logprob.token.0 + CODES), Some(logprob)),
        };
        numbers.push(token.unwrap_or(0) as f32);
        if let Some(TokenLogprob { logprob, top, .. }) = logprob {
            numbers.push(*logprob);
            numbers.extend(top.iter().flat_map(|&(token, logprob)| [token.0 as f32, logprob]));
        }
        numbers.resize(end, NONE);
    }

    /// The result that `numbers` tell, [`RowKind::width`] of them.
    #[must_use]
    pub fn read(self, numbers: &[f32]) -> RowOutput {
        let Some(token) = (numbers[0] as u32).checked_sub(CODES).map(TokenId) else {
            return if numbers[0] == 0.0 { RowOutput::NoToken } else { RowOutput::NotANumber };
        };
        let logprob = self.logprobs().map(|_| {
            let told = numbers[2..].chunks_exact(2).take_while(|pair| pair[0] != NONE);
            let top = told.map(|pair| (TokenId(pair[0] as u32), pair[1])).collect();
            TokenLogprob { token, logprob: numbers[1], top }
        });
        match (self, logprob) {
            (Self::PromptLogprob(_), Some(logprob)) => RowOutput::PromptLogprob(logprob),
            (_, logprob) => RowOutput::Sampled { token, logprob },
        }
    }
}
