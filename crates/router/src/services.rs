//! The gRPC services as one, found by the paths of calls.

use std::convert::Infallible;
use std::task::{Context, Poll};

use futures::future::Either;
use proto::v1::cohort_server::CohortServer;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::service::Routes;

use crate::service::Service;

/// What paths of [`Service`] begin with.
const COHORT: &str = "/cohort.v1.Cohort/";

/// The service that most calls are for, and all others. Its calls do without the tree of routes, which copies all services
/// for each call, and boxes its future and its body anew.
#[derive(Debug, Clone)]
pub(crate) struct Services {
    /// Not there before the router can serve: then the others say so.
    pub(crate) cohort: Option<CohortServer<Service>>,
    pub(crate) others: Routes,
}

impl tower::Service<Request<Body>> for Services {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<
        <CohortServer<Service> as tower::Service<Request<Body>>>::Future,
        <Routes as tower::Service<Request<Body>>>::Future,
    >;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // All of them always are.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match &mut self.cohort {
            Some(cohort) if request.uri().path().starts_with(COHORT) => Either::Left(cohort.call(request)),
            Some(_) | None => Either::Right(self.others.call(request)),
        }
    }
}
