//! The HTTP listener: probes, version and the list of models.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::pipeline::Shared;
use crate::service::VERSION;
use crate::workers::Progress;

#[derive(Clone)]
struct Context {
    shared: Arc<Shared>,
    started: u64,
}

/// The routes: `/livez` (this process runs), `/startupz` (it listens), `/readyz` and `/health` (a group serves),
/// `/version`, `/v1/models`.
pub(crate) fn routes(shared: Arc<Shared>) -> Router {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Router::new()
        .route("/livez", get(livez))
        .route("/startupz", get(startupz))
        .route("/readyz", get(readyz))
        .route("/health", get(readyz))
        .route("/version", get(version))
        .route("/v1/models", get(models))
        .with_state(Context { shared, started })
}

async fn livez() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

async fn startupz(State(context): State<Context>) -> Json<Value> {
    let (phase, percent) = context.shared.groups.progress().describe();
    Json(json!({ "phase": phase, "percent": percent }))
}

async fn readyz(State(context): State<Context>) -> (StatusCode, Json<Value>) {
    if context.shared.withdrawn.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "phase": "draining", "percent": 0 })));
    }
    let progress = context.shared.groups.progress();
    let code = match progress {
        Progress::Serving => StatusCode::OK,
        Progress::Phase(..) | Progress::Unreachable(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    let (phase, percent) = progress.describe();
    (code, Json(json!({ "phase": phase, "percent": percent })))
}

async fn version() -> Json<Value> {
    Json(json!({ "version": VERSION }))
}

/// OpenAI's list form; empty until a group has said what it serves.
async fn models(State(context): State<Context>) -> Json<Value> {
    let data: Vec<Value> = match context.shared.served() {
        Err(_) => Vec::new(),
        Ok((name, facts)) => vec![json!({
            "id": name,
            "object": "model",
            "created": context.started,
            "owned_by": "cohort",
            "max_model_len": facts.context_tokens_max,
        })],
    };
    Json(json!({ "object": "list", "data": data }))
}
