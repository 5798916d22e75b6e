//! Listeners that answer before the router can serve: with how far its start is, until its own routes take the place of
//! those.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use proto::{Failure, Phase, RETRY_AFTER};
use tower::{Layer, Service};

/// How far the start is, in per cent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Loading(Arc<AtomicU32>);

impl Loading {
    pub(crate) fn set(&self, percent: u32) {
        self.0.store(percent, Ordering::Relaxed);
    }

    pub(crate) fn percent(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// What a request is told that comes too early.
    pub(crate) fn refusal(&self) -> Failure {
        Failure::NotServing { phase: Phase::Loading, percent: self.percent(), retry_after: RETRY_AFTER }
    }
}

/// The routes of the start, until the router's own take their place, on open connections too. Routes are always ready.
#[derive(Debug, Clone)]
pub(crate) struct Doorway<S> {
    start: S,
    own: Arc<OnceLock<S>>,
}

impl<S> Doorway<S> {
    /// One with these routes for now.
    pub(crate) fn new(start: S) -> Self {
        Self { start, own: Arc::default() }
    }

    /// From now on these are the routes.
    pub(crate) fn open(&self, own: S) {
        // Nobody opens it twice.
        let _ = self.own.set(own);
    }
}

impl<S: Service<R> + Clone, R> Service<R> for Doorway<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.start.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> S::Future {
        self.own.get().unwrap_or(&self.start).clone().call(request)
    }
}

/// In place of whatever a server was given.
impl<S: Clone, Other> Layer<Other> for Doorway<S> {
    type Service = Self;

    fn layer(&self, _: Other) -> Self {
        self.clone()
    }
}
