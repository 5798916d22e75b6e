//! What callers show: the cluster's secret, or an API key.

use http::{HeaderMap, HeaderName, HeaderValue, header};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::Secret;

/// The header the secret travels in.
pub const SECRET_HEADER: &str = "x-cohort-cluster";

/// A connection whose calls carry a [`Badge`].
pub type Identified = InterceptedService<Channel, Badge>;

/// What a caller shows: the secret of its cluster or its API key, if it has one.
#[derive(Debug, Clone, Default)]
pub struct Badge(Option<(HeaderName, HeaderValue)>);

impl Badge {
    /// The badge of a process with this secret.
    #[must_use]
    pub fn new(secret: Option<&Secret>) -> Self {
        Self(
            secret
                .and_then(|secret| Some((HeaderName::from_static(SECRET_HEADER), hidden(secret.expose())?))),
        )
    }

    /// The badge of a caller with this API key.
    #[must_use]
    pub fn of_caller(key: Option<&str>) -> Self {
        Self(key.and_then(|key| Some((header::AUTHORIZATION, hidden(&format!("Bearer {key}"))?))))
    }

    /// Adds it to a request's headers.
    pub fn show(&self, headers: &mut HeaderMap) {
        if let Some((header, value)) = &self.0 {
            headers.insert(header, value.clone());
        }
    }
}

/// A value that debug output shows as `Sensitive`, and HPACK keeps out of its table.
fn hidden(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

impl Interceptor for Badge {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        self.show(request.metadata_mut().as_mut());
        Ok(request)
    }
}
