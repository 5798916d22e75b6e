//! The HTTP port while the router's text files are read: probes are answered from the first moment on, all else is told how
//! far the start is.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use axum::body::{Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::future::RouteFuture;
use axum::routing::get;
use axum::{BoxError, Json, Router};
use proto::{Failure, Phase, RETRY_AFTER};
use serde_json::{Value, json};
use tower::Service;

use super::error::ApiError;
use super::{cohere, livez};

/// How far the start is, in per cent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Loading(Arc<AtomicU32>);

impl Loading {
    pub(crate) fn set(&self, percent: u32) {
        self.0.store(percent, Ordering::Relaxed);
    }

    fn percent(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    fn shown(&self) -> Json<Value> {
        Json(json!({ "phase": Phase::Loading.name(), "percent": self.percent() }))
    }
}

/// The routes of the start, until the router's own take their place, on open connections too.
#[derive(Debug, Clone)]
pub(crate) struct Doorway {
    start: Router,
    own: Arc<OnceLock<Router>>,
}

impl Doorway {
    /// One that tells how far `loading` is.
    pub(crate) fn new(loading: Loading) -> Self {
        let start = Router::new()
            .route("/livez", get(livez))
            .route("/startupz", get(startupz))
            .route("/readyz", get(not_ready))
            .route("/health", get(not_ready))
            .route("/ping", get(not_ready).post(not_ready))
            .fallback(not_yet)
            .with_state(loading);
        Self { start, own: Arc::default() }
    }

    /// From now on these are the routes.
    pub(crate) fn open(&self, routes: Router) {
        // Nobody opens it twice.
        let _ = self.own.set(routes);
    }
}

impl<B> Service<Request<B>> for Doorway
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = RouteFuture<Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Routers always are.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> RouteFuture<Infallible> {
        self.own.get().unwrap_or(&self.start).clone().call(request)
    }
}

async fn startupz(State(loading): State<Loading>) -> Json<Value> {
    loading.shown()
}

async fn not_ready(State(loading): State<Loading>) -> (StatusCode, Json<Value>) {
    (StatusCode::SERVICE_UNAVAILABLE, loading.shown())
}

async fn not_yet(State(loading): State<Loading>, request: Request) -> Response {
    let failure =
        Failure::NotServing { phase: Phase::Loading, percent: loading.percent(), retry_after: RETRY_AFTER };
    refusal(request.uri().path(), failure)
}

/// A refusal as the API of this path writes it.
pub(super) fn refusal(path: &str, failure: Failure) -> Response {
    match path {
        "/v2/chat" | "/cohere/v2/chat" => cohere::refuse(failure.into()),
        _ => ApiError::from(failure).into_response(),
    }
}
