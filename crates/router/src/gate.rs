//! Who may call. The check comes before anything of a request's body is read, so that refusing costs next to nothing.

use std::convert::Infallible;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Instant;

use futures::future::{Either, Ready, ready};
use proto::Failure;
use security::{KeyFile, Limited, Meter, Tokens, Visit};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response, header};
use tower::{Layer, Service};

use crate::call::{REQUEST_ID, is_request_id};
use crate::metrics::Metrics;
use crate::registry;

/// What anybody may ask of the HTTP listener: probes have no key, and what is counted names nobody.
const OPEN_PATHS: [&str; 6] = ["/livez", "/startupz", "/readyz", "/health", "/ping", "/metrics"];
/// What anybody may ask of the gRPC listener.
const OPEN_SERVICE: &str = "/grpc.health.v1.Health/";

/// Whether the other end of a request's connection has shown a certificate that the listener's authority signed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Certified(pub(crate) bool);

/// Looks at every request of both listeners.
#[derive(Debug)]
pub(crate) struct Gate {
    callers: RwLock<Callers>,
    metrics: Arc<Metrics>,
}

/// Who is let in: the holders of these keys, and of these tokens. With neither of both, everybody.
#[derive(Debug, Default)]
pub(crate) struct Callers {
    pub(crate) keys: Option<KeyFile>,
    pub(crate) tokens: Option<Tokens>,
}

impl Callers {
    /// Reads their files again whenever they change. Inside a runtime.
    pub(crate) fn watch(&self) {
        self.keys.iter().for_each(KeyFile::watch);
        self.tokens.iter().for_each(Tokens::watch);
    }

    const fn everybody(&self) -> bool {
        self.keys.is_none() && self.tokens.is_none()
    }

    /// The meter of whoever shows this.
    fn find(&self, shown: &str, now: Instant) -> Result<Meter, Failure> {
        let refuse = |why: String| Failure::Unauthenticated { why };
        if let Some(tokens) = self.tokens.as_ref().filter(|_| Tokens::looks_like_one(shown)) {
            return tokens.find(shown, now).map_err(|why| refuse(format!("the token is not taken: {why}")));
        }
        let Some(keys) = &self.keys else {
            return Err(refuse("a JSON Web Token is needed, and this is none".to_owned()));
        };
        let meter = keys.keys().find(shown).cloned();
        meter.ok_or_else(|| refuse("the API key is not one of this cluster's, or is not any more".to_owned()))
    }
}

impl Gate {
    /// Lets these callers in.
    pub(crate) fn new(callers: Callers, metrics: Arc<Metrics>) -> Self {
        Self { callers: RwLock::new(callers), metrics }
    }

    /// From now on these keys are asked for.
    pub(crate) fn set_keys(&self, keys: Option<KeyFile>) {
        self.callers.write().unwrap_or_else(PoisonError::into_inner).keys = keys;
    }

    /// Lets a request in or refuses it. One that is let in carries its [`Visit`] and its key no more.
    ///
    /// # Errors
    /// [`Failure::Unauthenticated`] without a key of the file or a token that is believed, [`Failure::Limited`] for a key that has used up a bound.
    pub(crate) fn admit<B>(&self, request: &mut Request<B>) -> Result<(), Failure> {
        let visit = self.visit(request).inspect_err(|failure| {
            self.metrics.refused(failure);
            let id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
            let id = id.filter(|id| is_request_id(id));
            tracing::debug!(request = id, path = request.uri().path(), %failure, "refused at the door");
        })?;
        request.headers_mut().remove(header::AUTHORIZATION);
        if let Some(visit) = visit {
            request.extensions_mut().insert(Arc::new(visit));
        }
        Ok(())
    }

    fn visit<B>(&self, request: &Request<B>) -> Result<Option<Visit>, Failure> {
        let path = request.uri().path();
        // The registry asks for the cluster's secret itself.
        if OPEN_PATHS.contains(&path) || path.starts_with(OPEN_SERVICE) || path.starts_with(registry::PATH) {
            return Ok(None);
        }
        if let Some(Certified(false)) = request.extensions().get() {
            let why = "this listener wants a client certificate that its authority signed";
            return Err(Failure::Unauthenticated { why: why.to_owned() });
        }
        let callers = self.callers.read().unwrap_or_else(PoisonError::into_inner);
        if callers.everybody() {
            return Ok(None);
        }
        let now = Instant::now();
        let meter = callers.find(bearer(request.headers())?, now)?;
        meter.enter(now).map(Some).map_err(|Limited { what, max, retry_after }| Failure::Limited {
            what: what.to_owned(),
            max,
            retry_after,
        })
    }
}

/// The key or token a caller sent.
fn bearer(headers: &HeaderMap) -> Result<&str, Failure> {
    let missing = || {
        let why = "an API key is needed: send the header `authorization: Bearer KEY`";
        Failure::Unauthenticated { why: why.to_owned() }
    };
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let (scheme, key) = value.and_then(|value| value.trim().split_once(' ')).ok_or_else(missing)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(key.trim()) } else { Err(missing()) }
}

/// Puts a [`Gate`] before the gRPC services.
#[derive(Debug, Clone)]
pub(crate) struct GateLayer(pub(crate) Arc<Gate>);

impl<S> Layer<S> for GateLayer {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { gate: Arc::clone(&self.0), inner }
    }
}

/// Services behind a [`Gate`].
#[derive(Debug, Clone)]
pub(crate) struct Gated<S> {
    gate: Arc<Gate>,
    inner: S,
}

impl<S, B> Service<Request<B>> for Gated<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<Ready<Result<S::Response, S::Error>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        match self.gate.admit(&mut request) {
            Ok(()) => Either::Right(self.inner.call(request)),
            Err(failure) => Either::Left(ready(Ok(Status::from(failure).into_http()))),
        }
    }
}
