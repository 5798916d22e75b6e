use std::time::Duration;

use proto::Failure;
use tonic::{Code, Request};

use crate::support::{Leader, TestRouter, all, chunk, failure, from_text, soon};

fn with_deadline(millis: u64) -> Request<proto::v1::GenerateRequest> {
    let mut request = Request::new(from_text("x"));
    request.set_timeout(Duration::from_millis(millis));
    request
}

#[tokio::test]
async fn a_deadline_ends_a_request_that_waits_for_its_first_token() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let call = tokio::spawn(async move { all(&router, with_deadline(800)).await });
    let open = leader.next().await;
    assert!(open.headers.get("grpc-timeout").is_some(), "the leader is told the deadline");
    soon(open.chunks.closed()).await;
    let status = soon(call).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_eq!(failure(&status), Failure::DeadlineExceeded);
}

#[tokio::test]
async fn a_deadline_ends_a_request_in_the_middle_of_its_answer() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut stream = soon(router.client().await.generate(with_deadline(800))).await.unwrap().into_inner();
    let open = leader.next().await;
    open.chunks.send(Ok(chunk(&[300]))).await.unwrap();
    assert!(soon(stream.message()).await.unwrap().is_some());
    let status = soon(stream.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    soon(open.chunks.closed()).await;
}

#[tokio::test]
async fn a_leaders_own_deadline_status_is_passed_on() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let call = tokio::spawn(async move { all(&router, from_text("x")).await });
    let open = leader.next().await;
    open.chunks.send(Err(Failure::DeadlineExceeded.to_status())).await.unwrap();
    assert_eq!(failure(&soon(call).await.unwrap().unwrap_err()), Failure::DeadlineExceeded);
}
