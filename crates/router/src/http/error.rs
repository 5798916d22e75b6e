//! Failures as OpenAI's API writes them: `{"error": {"message", "type", "param", "code"}}`.

use std::borrow::Cow;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use proto::{Failure, Violation};
use serde_json::{Value, json};
use tonic::Code;

/// A refusal or failure on its way to an HTTP caller.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<Cow<'static, str>>,
    retry_after_s: Option<u64>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, retry_after_s: None }
    }

    /// What went wrong, in words.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// The body.
    pub(super) fn to_json(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            503 => "service_unavailable_error",
            504 => "timeout_error",
            _ => "server_error",
        };
        json!({ "error": {
            "message": self.message, "type": kind, "param": self.param, "code": self.status.as_u16(),
        }})
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let failure = match failure {
            Failure::Invalid(wrong) => Failure::Invalid(wrong.into_iter().map(renamed).collect()),
            other => other,
        };
        let param = match &failure {
            Failure::Invalid(wrong) => wrong.first().map(|first| first.field.clone()),
            Failure::UnknownModel { .. } => Some("model".into()),
            _ => None,
        };
        let retry_after_s = failure.retry_after().map(|wait| wait.as_millis().div_ceil(1000).max(1));
        Self {
            status: status(failure.code()),
            message: failure.to_string(),
            param,
            retry_after_s: retry_after_s.and_then(|seconds| u64::try_from(seconds).ok()),
        }
    }
}

impl From<Violation> for ApiError {
    fn from(violation: Violation) -> Self {
        Failure::from(violation).into()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The HTTP status of a gRPC code.
const fn status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange | Code::Cancelled => {
            StatusCode::BAD_REQUEST
        }
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Violations name fields as the gRPC API does; here they have the names this API's callers sent.
fn renamed(violation: Violation) -> Violation {
    let Violation { field, reason } = violation;
    let name = ["sampling.", "stopping.", "response.", "chat."].iter().find_map(|p| field.strip_prefix(p));
    let name = name.unwrap_or(&field);
    let name = match name {
        "text" => "prompt".to_owned(),
        "chat" => "messages".to_owned(),
        "template_arguments" => "chat_template_kwargs".to_owned(),
        "thinking_tokens_max" => "thinking_token_budget".to_owned(),
        name => name
            .replace("token_ids.ids", "prompt")
            .replace("template_arguments.", "chat_template_kwargs.")
            .replace("].arguments", "].function.arguments"),
    };
    Violation::new(name, reason)
}
