//! The HTTP listener of a rank for what watches it: metrics and probes. Open before anything is loaded.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use proto::Phase;
use proto::worker::{GroupActivity, WorkerState};
use security::Stream;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio_stream::StreamExt;

use super::{FollowerMetrics, Metrics};
use crate::activity::{self, Plan};
use crate::inbox::{Inbox, Message};
use crate::standing::Standing;
use crate::state::StatePublisher;

/// Longest that a page waits for the ranks to tell what they have done; without it those counters stand still.
const TOLD_MAX: Duration = Duration::from_millis(500);

#[derive(Clone)]
struct Watched {
    shown: Shown,
    state: Arc<StatePublisher>,
}

/// Whose page it is.
#[derive(Clone)]
pub(crate) enum Shown {
    /// A leader's, with what its ranks tell.
    Leader(Leading),
    /// That of a rank that follows.
    Follower(Arc<FollowerMetrics>),
}

/// What a leader's page is made of.
#[derive(Clone)]
pub(crate) struct Leading {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) inbox: Inbox,
    pub(crate) plan: Plan,
}

impl Leading {
    /// What the ranks have done, as far as they can tell in time.
    async fn told(&self, state: &WorkerState) -> Option<GroupActivity> {
        if Phase::from_wire(state.phase) != Some(Phase::Serving) {
            return None;
        }
        let (asker, told) = oneshot::channel();
        self.inbox.ask(Message::Activity(asker)).ok()?;
        let ranks = tokio::time::timeout(TOLD_MAX, told).await.ok()?.ok()?;
        Some(activity::wire(&self.plan, &ranks))
    }
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
    shown: Shown,
    state: Arc<StatePublisher>,
) {
    let routes = Router::new()
        .route("/metrics", get(page))
        .route("/livez", get(livez))
        .route("/startupz", get(startupz))
        .route("/readyz", get(readyz))
        .with_state(Watched { shown, state });
    if let Err(error) = axum::serve(Accepted(Box::pin(connections)), routes).await {
        tracing::error!(%error, "metrics are not served any more");
    }
}

async fn page(State(watched): State<Watched>, headers: HeaderMap) -> impl IntoResponse {
    let state = watched.state.subscribe().borrow().clone();
    let page = match &watched.shown {
        Shown::Leader(leading) => leading.metrics.render(&state, leading.told(&state).await.as_ref()),
        Shown::Follower(metrics) => metrics.render(&state),
    };
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let (form, page) = proto::exposed(page, accept);
    ([(header::CONTENT_TYPE, form)], page)
}

async fn livez() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

async fn startupz(State(watched): State<Watched>) -> Json<Value> {
    watched.progress().1
}

async fn readyz(State(watched): State<Watched>) -> (StatusCode, Json<Value>) {
    let (phase, progress) = watched.progress();
    // Routers know leaders only.
    let follows = matches!(watched.shown, Shown::Follower(_));
    let acknowledged = follows || *watched.state.standing().borrow() == Standing::Acknowledged;
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
