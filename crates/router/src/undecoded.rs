//! Messages that cannot be read are refused by the transport, before any code of ours runs and without details: these
//! are added here.

use proto::{Failure, Violation};
use tonic::codegen::http::{HeaderMap, Response};
use tonic::{Code, Status};
use types::limits::MESSAGE_BYTES_MAX;

const DETAILS: &str = "grpc-status-details-bin";

/// The same response; one that refuses a message which could not be read says so as all refusals do.
pub(crate) fn explain<B>(mut response: Response<B>) -> Response<B> {
    if let Some(failure) = failure(response.headers()) {
        // A status that cannot be written leaves the headers as they were.
        _ = failure.to_status().add_header(response.headers_mut());
    }
    response
}

fn failure(headers: &HeaderMap) -> Option<Failure> {
    if headers.contains_key(DETAILS) {
        return None;
    }
    let status = Status::from_header_map(headers)?;
    let reason = match status.code() {
        Code::OutOfRange => format!("has more than {MESSAGE_BYTES_MAX} bytes"),
        Code::Internal => format!("cannot be read: {}", status.message()),
        _ => return None,
    };
    Some(Violation::new("message", reason).into())
}
