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

/// How a token's row reaches the ranks that hold its experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dispatch {
    /// Every rank has all rows, works on those that chose its experts, and the layer's all-reduce adds them up.
    Replicated,
    /// Every rank routes a slice of the rows and sends each to the ranks that hold its experts, which send their part
    /// of the result back. Needs [`ExpertSharding::Expert`].
    AllToAll,
}

/// What a configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DispatchChoice {
    /// See [`DispatchChoice::resolve`].
    #[default]
    Auto,
    /// This one.
    Of(Dispatch),
}

impl DispatchChoice {
    /// In one sub-group, `auto` is replicated: attention leaves every row on every rank, so sending rows could only add to
    /// the bytes of the all-reduce that is needed anyway. All-to-all saves router work on long prompts only. In several
    /// sub-groups (`data` of them) it is all-to-all: their rows differ.
    #[must_use]
    pub const fn resolve(self, data: u32) -> Dispatch {
        match self {
            Self::Auto if data > 1 => Dispatch::AllToAll,
            Self::Auto => Dispatch::Replicated,
            Self::Of(dispatch) => dispatch,
        }
    }

    /// The name used in flags and configuration files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Of(dispatch) => dispatch.name(),
        }
    }
}

impl Dispatch {
    /// The name used in flags and configuration files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Replicated => "replicated",
            Self::AllToAll => "all-to-all",
        }
    }
}

impl fmt::Display for Dispatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for DispatchChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DispatchChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "replicated" => Ok(Self::Of(Dispatch::Replicated)),
            "all-to-all" => Ok(Self::Of(Dispatch::AllToAll)),
            other => Err(format!("unknown dispatch `{other}`; use auto, replicated or all-to-all")),
        }
    }
}
