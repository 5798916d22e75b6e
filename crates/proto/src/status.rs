//! The one table from what went wrong to a gRPC status.
//!
//! | failure | code | details beside `ErrorInfo` |
//! |---|---|---|
//! | [`Failure::Invalid`] | `INVALID_ARGUMENT` | `BadRequest` |
//! | [`Failure::PromptTooLong`] | `OUT_OF_RANGE` | |
//! | [`Failure::UnknownModel`] | `NOT_FOUND` | |
//! | [`Failure::NoTokenizer`], [`Failure::NoChatTemplate`] | `FAILED_PRECONDITION` | `PreconditionFailure` |
//! | [`Failure::Unauthenticated`] | `UNAUTHENTICATED` | |
//! | [`Failure::Forbidden`] | `PERMISSION_DENIED` | |
//! | [`Failure::Overloaded`], [`Failure::Limited`] | `RESOURCE_EXHAUSTED` | `RetryInfo` |
//! | [`Failure::NotServing`], [`Failure::Unavailable`] | `UNAVAILABLE` | `RetryInfo` |
//! | [`Failure::DeadlineExceeded`] | `DEADLINE_EXCEEDED` | |
//! | [`Failure::Cancelled`] | `CANCELLED` | |
//! | [`Failure::GroupLost`] | `ABORTED` | |
//! | [`Failure::Internal`] | `INTERNAL` | |

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::Phase;

/// The domain of every `ErrorInfo`.
const DOMAIN: &str = "cohort";
/// Statuses travel as HTTP/2 headers, and most clients refuse more than 16 KiB of them.
const MESSAGE_BYTES_MAX: usize = 1024;
const VIOLATIONS_MAX: usize = 16;
const VIOLATION_BYTES_MAX: usize = 256;

/// How long a refused caller is asked to wait when nothing better is known.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

/// One refused field of a request, in the words a caller can act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The field as the API names it, for example `sampling.top_p` or `token_ids.ids[3]`.
    pub field: Cow<'static, str>,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl Violation {
    /// Builds a violation of `field`.
    #[must_use]
    pub fn new(field: impl Into<Cow<'static, str>>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

/// Every way a request can fail, with the numbers its caller needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Fields that are wrong; all of them are listed.
    #[error("{}", list(.0))]
    Invalid(Vec<Violation>),
    /// The prompt leaves no room for a single generated token.
    #[error(
        "the prompt has {prompt_tokens} tokens and the context holds {context_tokens_max}; \
         a prompt must leave room for at least one token"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: u64,
        /// Tokens of prompt and output together the model can hold.
        context_tokens_max: u32,
    },
    /// The request names a model that is not served.
    #[error("model `{asked}` is not served here; served: {}", .served.join(", "))]
    UnknownModel {
        /// The name in the request.
        asked: String,
        /// The names that would be right.
        served: Vec<String>,
    },
    /// Text was given or asked for, and the checkpoint cannot turn it into tokens.
    #[error("{needed_for} needs a tokenizer and the served checkpoint has no tokenizer.json; use token_ids")]
    NoTokenizer {
        /// What needed it: a field or rpc.
        needed_for: String,
    },
    /// A chat was given, and the checkpoint does not say how to render it.
    #[error(
        "{needed_for} needs a chat template and the served checkpoint has neither chat_template.jinja nor a \
         chat_template in tokenizer_config.json; use text or token_ids"
    )]
    NoChatTemplate {
        /// What needed it: a field or rpc.
        needed_for: String,
    },
    /// A bound on admitted work was reached.
    #[error("at most {max} {what} are taken at once and all are in use; retry after {} ms", .retry_after.as_millis())]
    Overloaded {
        /// What is bounded, in the plural: `requests`, `waiting prompt tokens`.
        what: String,
        /// The bound.
        max: u64,
        /// How long to wait before the next try.
        retry_after: Duration,
    },
    /// Nobody known is calling.
    #[error("{why}")]
    Unauthenticated {
        /// What was missing or wrong, without showing it.
        why: String,
    },
    /// The caller is known and may not do this.
    #[error("{why}")]
    Forbidden {
        /// What it may not do, and what it may.
        why: String,
    },
    /// The caller has used what it may use.
    #[error("this key may have at most {max} {what}; retry after {} ms", .retry_after.as_millis())]
    Limited {
        /// What is bounded: `requests a minute`, `tokens a minute`, `requests at once`.
        what: String,
        /// The bound.
        max: u64,
        /// How long to wait before the next try.
        retry_after: Duration,
    },
    /// The group that would serve it is starting or stopping.
    #[error("not serving yet or any more: {phase}, {percent} % done; retry after {} ms", .retry_after.as_millis())]
    NotServing {
        /// How far it is.
        phase: Phase,
        /// Of the phase's work, 0 to 100.
        percent: u32,
        /// How long to wait before the next try.
        retry_after: Duration,
    },
    /// Nobody can serve it for another reason, such as a leader that cannot be reached.
    #[error("{why}; retry after {} ms", .retry_after.as_millis())]
    Unavailable {
        /// What is missing.
        why: String,
        /// How long to wait before the next try.
        retry_after: Duration,
    },
    /// The caller's deadline passed before the last token.
    #[error("the request's deadline passed before it was finished")]
    DeadlineExceeded,
    /// The caller gave up.
    #[error("the request was cancelled")]
    Cancelled,
    /// The group that ran the request is gone and its work cannot be replayed.
    #[error("group {group} was lost while it ran the request: {why}")]
    GroupLost {
        /// The group: its address or name.
        group: String,
        /// What was seen, naming the rank where it is known.
        why: String,
    },
    /// A bug, or a peer that broke the protocol.
    #[error("internal error: {why}")]
    Internal {
        /// What was found.
        why: String,
    },
}

impl From<Violation> for Failure {
    fn from(violation: Violation) -> Self {
        Self::Invalid(vec![violation])
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        failure.to_status()
    }
}

impl Failure {
    /// The status code of this failure.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::PromptTooLong { .. } => Code::OutOfRange,
            Self::UnknownModel { .. } => Code::NotFound,
            Self::NoTokenizer { .. } | Self::NoChatTemplate { .. } => Code::FailedPrecondition,
            Self::Unauthenticated { .. } => Code::Unauthenticated,
            Self::Forbidden { .. } => Code::PermissionDenied,
            Self::Overloaded { .. } | Self::Limited { .. } => Code::ResourceExhausted,
            Self::NotServing { .. } | Self::Unavailable { .. } => Code::Unavailable,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::GroupLost { .. } => Code::Aborted,
            Self::Internal { .. } => Code::Internal,
        }
    }

    /// The constant in `ErrorInfo.reason`, for programs.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "INVALID_FIELD",
            Self::PromptTooLong { .. } => "PROMPT_TOO_LONG",
            Self::UnknownModel { .. } => "UNKNOWN_MODEL",
            Self::NoTokenizer { .. } => "NO_TOKENIZER",
            Self::NoChatTemplate { .. } => "NO_CHAT_TEMPLATE",
            Self::Unauthenticated { .. } => "UNAUTHENTICATED",
            Self::Forbidden { .. } => "FORBIDDEN",
            Self::Overloaded { .. } => "OVERLOADED",
            Self::Limited { .. } => "LIMITED",
            Self::NotServing { .. } => "NOT_SERVING",
            Self::Unavailable { .. } => "UNAVAILABLE",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::Cancelled => "CANCELLED",
            Self::GroupLost { .. } => "GROUP_LOST",
            Self::Internal { .. } => "INTERNAL",
        }
    }

    /// How long the caller should wait before it tries again; `None` when a retry would not help.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded { retry_after, .. }
            | Self::Limited { retry_after, .. }
            | Self::NotServing { retry_after, .. }
            | Self::Unavailable { retry_after, .. } => Some(*retry_after),
            Self::Invalid(_)
            | Self::PromptTooLong { .. }
            | Self::UnknownModel { .. }
            | Self::NoTokenizer { .. }
            | Self::NoChatTemplate { .. }
            | Self::Unauthenticated { .. }
            | Self::Forbidden { .. }
            | Self::DeadlineExceeded
            | Self::Cancelled
            | Self::GroupLost { .. }
            | Self::Internal { .. } => None,
        }
    }

    /// The status with its details. Long messages are cut: they travel as headers, which clients bound.
    #[must_use]
    pub fn to_status(&self) -> Status {
        let mut details = ErrorDetails::with_error_info(self.reason(), DOMAIN, self.metadata());
        if let Some(wait) = self.retry_after() {
            details.set_retry_info(Some(wait));
        }
        match self {
            Self::Invalid(wrong) => {
                for violation in wrong.iter().take(VIOLATIONS_MAX) {
                    let field = cut(&violation.field, VIOLATION_BYTES_MAX);
                    details.add_bad_request_violation(field, cut(&violation.reason, VIOLATION_BYTES_MAX));
                }
            }
            Self::NoTokenizer { needed_for } | Self::NoChatTemplate { needed_for } => {
                let missing = self.reason();
                details.add_precondition_failure_violation(missing, needed_for.as_str(), self.to_string());
            }
            Self::PromptTooLong { .. }
            | Self::UnknownModel { .. }
            | Self::Unauthenticated { .. }
            | Self::Forbidden { .. }
            | Self::Overloaded { .. }
            | Self::Limited { .. }
            | Self::NotServing { .. }
            | Self::Unavailable { .. }
            | Self::DeadlineExceeded
            | Self::Cancelled
            | Self::GroupLost { .. }
            | Self::Internal { .. } => {}
        }
        Status::with_error_details(self.code(), cut(&self.to_string(), MESSAGE_BYTES_MAX), details)
    }

    /// Reads a failure back from a status that [`Failure::to_status`] made, here or in another process; `None` for a
    /// status of anybody else (a transport error, a proxy).
    #[must_use]
    pub fn from_status(status: &Status) -> Option<Self> {
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == DOMAIN)?;
        let text = |key: &str| info.metadata.get(key).cloned();
        let retry_after = details.retry_info().and_then(|retry| retry.retry_delay).unwrap_or(RETRY_AFTER);
        let failure = match info.reason.as_str() {
            "INVALID_FIELD" => {
                let wrong = details.bad_request()?.field_violations.iter();
                Self::Invalid(wrong.map(|v| Violation::new(v.field.clone(), v.description.clone())).collect())
            }
            "PROMPT_TOO_LONG" => Self::PromptTooLong {
                prompt_tokens: text("prompt_tokens")?.parse().ok()?,
                context_tokens_max: text("context_tokens_max")?.parse().ok()?,
            },
            "UNKNOWN_MODEL" => Self::UnknownModel { asked: text("asked")?, served: vec![text("served")?] },
            "NO_TOKENIZER" => Self::NoTokenizer { needed_for: text("needed_for")? },
            "NO_CHAT_TEMPLATE" => Self::NoChatTemplate { needed_for: text("needed_for")? },
            "OVERLOADED" => {
                Self::Overloaded { what: text("what")?, max: text("max")?.parse().ok()?, retry_after }
            }
            "UNAUTHENTICATED" => Self::Unauthenticated { why: text("why")? },
            "FORBIDDEN" => Self::Forbidden { why: text("why")? },
            "LIMITED" => Self::Limited { what: text("what")?, max: text("max")?.parse().ok()?, retry_after },
            "NOT_SERVING" => Self::NotServing {
                phase: Phase::from_name(&text("phase")?)?,
                percent: text("percent")?.parse().ok()?,
                retry_after,
            },
            "UNAVAILABLE" => Self::Unavailable { why: text("why")?, retry_after },
            "DEADLINE_EXCEEDED" => Self::DeadlineExceeded,
            "CANCELLED" => Self::Cancelled,
            "GROUP_LOST" => Self::GroupLost { group: text("group")?, why: text("why")? },
            "INTERNAL" => Self::Internal { why: text("why")? },
            _ => return None,
        };
        Some(failure)
    }

    fn metadata(&self) -> HashMap<String, String> {
        let pairs: Vec<(&str, String)> = match self {
            Self::Invalid(wrong) => vec![("violations", wrong.len().to_string())],
            Self::PromptTooLong { prompt_tokens, context_tokens_max } => vec![
                ("prompt_tokens", prompt_tokens.to_string()),
                ("context_tokens_max", context_tokens_max.to_string()),
            ],
            Self::UnknownModel { asked, served } => {
                vec![("asked", asked.clone()), ("served", served.join(", "))]
            }
            Self::NoTokenizer { needed_for } | Self::NoChatTemplate { needed_for } => {
                vec![("needed_for", needed_for.clone())]
            }
            Self::Overloaded { what, max, .. } | Self::Limited { what, max, .. } => {
                vec![("what", what.clone()), ("max", max.to_string())]
            }
            Self::NotServing { phase, percent, .. } => {
                vec![("phase", phase.name().to_owned()), ("percent", percent.to_string())]
            }
            Self::Unavailable { why, .. }
            | Self::Unauthenticated { why }
            | Self::Forbidden { why }
            | Self::Internal { why } => vec![("why", why.clone())],
            Self::GroupLost { group, why } => vec![("group", group.clone()), ("why", why.clone())],
            Self::DeadlineExceeded | Self::Cancelled => Vec::new(),
        };
        pairs.into_iter().map(|(key, value)| (key.to_owned(), cut(&value, MESSAGE_BYTES_MAX))).collect()
    }
}

fn list(violations: &[Violation]) -> String {
    let lines: Vec<String> = violations.iter().map(|v| format!("{}: {}", v.field, v.reason)).collect();
    lines.join("; ")
}

/// At most `bytes_max` bytes of `text`, ending in `…` when something was left out; never inside a character.
fn cut(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let end = (0..=bytes_max - '…'.len_utf8()).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    format!("{}…", &text[..end])
}
