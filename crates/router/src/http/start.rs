//! The HTTP port while the router's text files are read: probes are answered from the first moment on, all else is told how
//! far the start is.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use proto::{Failure, Phase};
use serde_json::{Value, json};

use super::error::ApiError;
use super::{cohere, livez};
use crate::doorway::Loading;

/// The routes of a start that is as far as `loading` says.
pub(crate) fn routes(loading: Loading) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/startupz", get(startupz))
        .route("/readyz", get(not_ready))
        .route("/health", get(not_ready))
        .route("/ping", get(not_ready).post(not_ready))
        .fallback(not_yet)
        .with_state(loading)
}

async fn startupz(State(loading): State<Loading>) -> Json<Value> {
    shown(&loading)
}

async fn not_ready(State(loading): State<Loading>) -> (StatusCode, Json<Value>) {
    (StatusCode::SERVICE_UNAVAILABLE, shown(&loading))
}

fn shown(loading: &Loading) -> Json<Value> {
    Json(json!({ "phase": Phase::Loading.name(), "percent": loading.percent() }))
}

async fn not_yet(State(loading): State<Loading>, request: Request) -> Response {
    refusal(request.uri().path(), loading.refusal())
}

/// A refusal as the API of this path writes it.
pub(super) fn refusal(path: &str, failure: Failure) -> Response {
    match path {
        "/v2/chat" | "/cohere/v2/chat" => cohere::refuse(failure.into()),
        _ => ApiError::from(failure).into_response(),
    }
}
