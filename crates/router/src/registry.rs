//! Where leaders register, each with an address and what it serves: a router learns of them without a list.

use std::sync::Arc;

use proto::worker::registry_server::Registry;
use proto::worker::{RegisterRequest, RegisterResponse};
use proto::{Failure, Violation};
use security::{SECRET_HEADER, SharedSecret};
use tonic::{Request, Response, Status};

use crate::discovery::Discovery;
use crate::workers::{Facts, Groups};

/// What its calls begin with; callers' keys are not asked for there.
pub(crate) const PATH: &str = "/cohort.worker.v1.Registry/";

/// Takes registrations of whoever shows the cluster's secret.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) discovery: Arc<Discovery>,
    pub(crate) groups: Arc<Groups>,
    pub(crate) secret: SharedSecret,
}

#[tonic::async_trait]
impl Registry for Desk {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let shown = request.metadata().get(SECRET_HEADER);
        if !shown.is_some_and(|shown| self.secret.is(shown.as_bytes())) {
            let why = "groups of this router's cluster register here: its secret was not shown, or is another one; \
                       give both processes the same cluster.secret_file";
            return Err(Failure::Unauthenticated { why: why.to_owned() }.into());
        }
        let RegisterRequest { url, model } = request.into_inner();
        let refused =
            |field: &'static str, why: String| Status::from(Failure::from(Violation::new(field, why)));
        let facts = Facts::from_wire(model.unwrap_or_default()).map_err(|why| refused("model", why))?;
        // What is served may change once no group that serves it is left.
        let served = self.groups.served().filter(|_| self.groups.counts().1 > 0);
        if let Some(difference) = served.and_then(|served| served.difference(&facts)) {
            tracing::error!(group = %url, %difference, "a group that serves something else wants to join; it is refused");
            let why = format!("it serves something else than the others: {difference}");
            return Err(Status::failed_precondition(why));
        }
        let hold = self.discovery.register(&url).map_err(|error| refused("url", error.to_string()))?;
        let hold_ms = u32::try_from(hold.as_millis()).unwrap_or(u32::MAX);
        Ok(Response::new(RegisterResponse { hold_ms }))
    }
}
