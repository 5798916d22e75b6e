//! The form an answer must have, as a request says it.

/// A constraint on a whole answer; nothing of it has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Constraint {
    /// JSON that matches this schema.
    Json(String),
    /// Text that this regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of this Lark grammar.
    Grammar(String),
    /// Any JSON object.
    JsonObject,
    /// Tagged parts with schemas of their own, as this JSON object says.
    StructuralTag(String),
}

impl Constraint {
    /// The name of its field in every API.
    #[must_use]
    pub const fn field(&self) -> &'static str {
        match self {
            Self::Json(_) => "json",
            Self::Regex(_) => "regex",
            Self::Choice(_) => "choice",
            Self::Grammar(_) => "grammar",
            Self::JsonObject => "json_object",
            Self::StructuralTag(_) => "structural_tag",
        }
    }
}
