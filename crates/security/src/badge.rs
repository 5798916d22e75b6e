//! What callers show: the cluster's secret, or an API key.

use http::{HeaderMap, HeaderName, HeaderValue, header};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::SharedSecret;

/// The header the secret travels in.
pub const SECRET_HEADER: &str = "x-cohort-cluster";

/// A connection whose calls carry a [`Badge`].
pub type Identified = InterceptedService<Channel, Badge>;

/// What a caller shows: the secret of its cluster or its API key, if it has one.
#[derive(Debug, Clone, Default)]
pub struct Badge(Shown);

#[derive(Debug, Clone, Default)]
enum Shown {
    #[default]
    Nothing,
    /// What is in force at each call.
    Secret(SharedSecret),
    Key(HeaderValue),
}

impl Badge {
    /// The badge of a process with this secret.
    #[must_use]
    pub fn new(secret: Option<&SharedSecret>) -> Self {
        Self(secret.map_or(Shown::Nothing, |secret| Shown::Secret(secret.clone())))
    }

    /// The badge of a caller with this API key.
    #[must_use]
    pub fn of_caller(key: Option<&str>) -> Self {
        let header = key.and_then(|key| hidden(&format!("Bearer {key}")));
        Self(header.map_or(Shown::Nothing, Shown::Key))
    }

    /// Adds it to a request's headers.
    pub fn show(&self, headers: &mut HeaderMap) {
        let shown = match &self.0 {
            Shown::Nothing => None,
            Shown::Secret(secret) => {
                secret.header().map(|value| (HeaderName::from_static(SECRET_HEADER), value))
            }
            Shown::Key(value) => Some((header::AUTHORIZATION, value.clone())),
        };
        if let Some((header, value)) = shown {
            headers.insert(header, value);
        }
    }
}

/// A value that debug output shows as `Sensitive`, and HPACK keeps out of its table.
pub(crate) fn hidden(text: &str) -> Option<HeaderValue> {
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
