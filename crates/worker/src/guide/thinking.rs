//! A limit to what a model thinks before it answers.

use types::TokenId;

/// At most so many tokens of thoughts, after which the marker that ends them must come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Thinking {
    /// Most tokens between the markers, over the whole output.
    pub(crate) tokens_max: u32,
    /// The marker that begins thoughts.
    pub(crate) start: TokenId,
    /// The marker that ends them.
    pub(crate) end: TokenId,
    /// Whether the prompt has begun them.
    pub(crate) open: bool,
}

impl Thinking {
    /// The marker that must come behind `output`, if the thoughts have gone on long enough.
    pub(crate) fn must_end(&self, output: &[TokenId]) -> Option<TokenId> {
        let (mut open, mut spent) = (self.open, 0_u32);
        for &token in output {
            match open {
                true if token == self.end => open = false,
                true => spent += 1,
                false => open = token == self.start,
            }
        }
        (open && spent >= self.tokens_max).then_some(self.end)
    }
}
