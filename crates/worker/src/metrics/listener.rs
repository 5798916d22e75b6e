//! The leader's HTTP listener for what watches it: metrics and probes. Open as early as the one for routers.

use std::io;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use proto::Phase;
use security::Stream;
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use super::Metrics;
use crate::state::{Standing, StatePublisher};

/// What the OpenMetrics text format is called.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone)]
struct Watched {
    metrics: Arc<Metrics>,
    state: Arc<StatePublisher>,
}

/// Connections for axum, as somebody else accepts them.
struct Accepted<C>(C);

impl<C> axum::serve::Listener for Accepted<C>
where
    C: tokio_stream::Stream<Item = io::Result<Stream>> + Send + Unpin + 'static,
{
    type Io = Stream;
    type Addr = ();

    async fn accept(&mut self) -> (Stream, ()) {
        match self.0.next().await {
            Some(Ok(stream)) => (stream, ()),
            // Nobody comes any more.
            Some(Err(_)) | None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Serves `/metrics`, `/livez` (this process answers), `/startupz` (it listens, with phase and percent) and `/readyz` (it
/// takes requests, and a router sends them) for as long as the process lives.
pub(crate) async fn serve(
    connections: impl tokio_stream::Stream<Item = io::Result<Stream>> + Send + 'static,
    metrics: Arc<Metrics>,
    state: Arc<StatePublisher>,
) {
    let routes = Router::new()
        .route("/metrics", get(page))
        .route("/livez", get(livez))
        .route("/startupz", get(startupz))
        .route("/readyz", get(readyz))
        .with_state(Watched { metrics, state });
    if let Err(error) = axum::serve(Accepted(Box::pin(connections)), routes).await {
        tracing::error!(%error, "metrics are not served any more");
    }
}

async fn page(State(watched): State<Watched>) -> impl IntoResponse {
    let state = watched.state.subscribe().borrow().clone();
    ([(header::CONTENT_TYPE, OPEN_METRICS)], watched.metrics.render(&state))
}

async fn livez() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

async fn startupz(State(watched): State<Watched>) -> Json<Value> {
    watched.progress().1
}

async fn readyz(State(watched): State<Watched>) -> (StatusCode, Json<Value>) {
    let (phase, progress) = watched.progress();
    let acknowledged = *watched.state.standing().borrow() == Standing::Acknowledged;
    let ready = phase == Phase::Serving && acknowledged;
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, progress)
}

impl Watched {
    fn progress(&self) -> (Phase, Json<Value>) {
        let state = self.state.subscribe().borrow().clone();
        let phase = Phase::from_wire(state.phase).unwrap_or(Phase::Starting);
        let router = self.state.standing().borrow().describe();
        (phase, Json(json!({ "phase": phase.name(), "percent": state.percent, "router": router })))
    }
}
