//! How the routed experts are shared out among the ranks of a group.

use std::fmt;
use std::str::FromStr;

/// What of the routed experts one rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ExpertSharding {
    /// An equal part of the width of every expert: every rank works for every token.
    #[default]
    Tensor,
    /// All of an equal share of the experts, contiguous: a rank works for the tokens that chose its experts.
    Expert,
}

impl ExpertSharding {
    /// The name used in flags and configuration files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Expert => "expert",
        }
    }
}

impl fmt::Display for ExpertSharding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ExpertSharding {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tensor" => Ok(Self::Tensor),
            "expert" => Ok(Self::Expert),
            other => Err(format!("unknown expert sharding `{other}`; use tensor or expert")),
        }
    }
}
