//! What is to be made of a row of logits, resolved to what matters for this one row: whoever has the logits, a device or
//! the host, needs to know no more.

use types::{History, TokenId, TokenMask};

use super::{Draw, Plain, uniform};

/// What to make of one row of logits.
#[derive(Debug, Clone, PartialEq)]
pub enum Ask<'a> {
    /// Nothing: its logits are not looked at.
    Nothing,
    /// A token.
    Token(Recipe<'a>),
    /// How likely a known token is.
    Likelihood {
        /// The token.
        token: TokenId,
        /// How many of the most likely tokens to report beside it.
        top: u32,
    },
}

impl Ask<'_> {
    /// The most likely token and nothing else.
    pub const GREEDY: Self = Ask::Token(Recipe::plain(Plain::GREEDY));

    /// How many of the most likely tokens are to be reported; `None` when no log-probability is.
    #[must_use]
    pub const fn report(&self) -> Option<u32> {
        match self {
            Ask::Nothing => None,
            Ask::Token(recipe) => recipe.report,
            Ask::Likelihood { top, .. } => Some(*top),
        }
    }
}

/// How to draw one token. Applied in the order of the fields, `how` last.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe<'a> {
    /// Added to the logits of some tokens, each named once.
    pub bias: &'a [(TokenId, f32)],
    /// What the tokens so far take from the logits.
    pub penalties: Option<Penalties>,
    /// The only tokens that may be drawn, ascending, each once, when the request says.
    pub allowed: Option<&'a [TokenId]>,
    /// The only tokens that may be drawn, when a grammar says.
    pub mask: Option<&'a TokenMask>,
    /// Tokens that must not be drawn.
    pub banned: &'a [TokenId],
    /// Tokens that would complete a bad word, ascending, each once: not drawn unless nothing else is left.
    pub bad_ends: Vec<TokenId>,
    /// Temperature, filters, and the uniform number.
    pub how: Plain,
    /// How many of the most likely tokens to report with their log-probabilities beside the drawn one's; `None` to report
    /// nothing.
    pub report: Option<u32>,
}

/// Penalties for the tokens of prompt and output.
#[derive(Debug, Clone, PartialEq)]
pub struct Penalties {
    /// Divides a positive logit, multiplies another.
    pub repetition: f32,
    /// Subtracted for each time a token was generated.
    pub frequency: f32,
    /// Subtracted once from a token that was generated.
    pub presence: f32,
    /// The tokens that any of this changes, each once in any order, and how often each was generated.
    pub seen: Vec<(TokenId, u32)>,
}

impl Penalties {
    /// `logit` of a token that was generated so many times.
    #[must_use]
    pub fn of(&self, logit: f32, times: u32) -> f32 {
        let repeated = if logit > 0.0 { logit / self.repetition } else { logit * self.repetition };
        if times > 0 { repeated - (self.frequency * times as f32 + self.presence) } else { repeated }
    }
}

impl<'a> Recipe<'a> {
    /// To draw from logits as they are.
    #[must_use]
    pub const fn plain(how: Plain) -> Self {
        Self {
            bias: &[],
            penalties: None,
            allowed: None,
            mask: None,
            banned: &[],
            bad_ends: Vec::new(),
            how,
            report: None,
        }
    }

    /// Whether the logits are used as they are.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        let Self { bias, penalties, allowed, mask, banned, bad_ends, .. } = self;
        bias.is_empty()
            && penalties.is_none()
            && allowed.is_none()
            && mask.is_none()
            && banned.is_empty()
            && bad_ends.is_empty()
    }
}

impl<'a> Draw<'a> {
    /// What the next token of a sequence with this `history` takes, and how many alternatives to `report`.
    #[must_use]
    pub fn recipe(&self, history: &History, report: Option<u32>) -> Recipe<'a> {
        let params = self.params;
        Recipe {
            bias: self.rules.logit_bias(),
            penalties: self.penalties(history),
            allowed: self.rules.allowed(),
            mask: self.mask,
            banned: self.banned,
            bad_ends: self.bad_ends(history),
            how: Plain {
                temperature: params.temperature(),
                top_k: params.top_k(),
                top_p: params.top_p(),
                min_p: params.min_p(),
                at: uniform(params.seed(), self.stream, self.position),
            },
            report,
        }
    }

    fn penalties(&self, history: &History) -> Option<Penalties> {
        let params = self.params;
        if !params.has_penalties() {
            return None;
        }
        let repetition = params.repetition_penalty();
        // Without a repetition penalty the prompt changes nothing.
        let seen = history.seen().filter(|&(_, times)| repetition != 1.0 || times > 0).collect();
        let (frequency, presence) = (params.frequency_penalty(), params.presence_penalty());
        Some(Penalties { repetition, frequency, presence, seen })
    }

    /// Tokens that would complete a bad word.
    fn bad_ends(&self, history: &History) -> Vec<TokenId> {
        let ends = self.rules.bad_words().iter().filter_map(|word| {
            let (&last, begin) = word.split_last()?;
            history.generated().ends_with(begin).then_some(last)
        });
        let mut ends: Vec<TokenId> = ends.collect();
        ends.sort_unstable();
        ends.dedup();
        ends
    }
}
