use proto::Failure;
use router::{Config, Limits, QueueLimits};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{Leader, TestRouter, all, answer, config, demo_files, failure, from_text, soon};

async fn one_at_a_time(leader: &Leader) -> TestRouter {
    let limits = Limits { requests_max: 1, queue: QueueLimits::NONE, ..Limits::default() };
    let router = TestRouter::start(Config { limits, ..config(&[&leader.address]) }, demo_files()).await;
    router.wait_for(ServingStatus::Serving).await;
    router
}

#[tokio::test]
async fn above_the_bound_a_request_is_refused_and_told_when_to_retry() {
    let mut leader = Leader::serving().await;
    let router = one_at_a_time(&leader).await;
    let first = soon(router.client().await.generate(from_text("x"))).await.unwrap();
    let open = leader.next().await;
    let status = all(&router, from_text("y")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    match failure(&status) {
        Failure::Overloaded { max: 1, retry_after, .. } => assert!(!retry_after.is_zero()),
        other => panic!("{other}"),
    }
    drop(first);
    soon(open.chunks.closed()).await;
}

#[tokio::test]
async fn a_finished_request_gives_its_place_back() {
    let leader = Leader::serving().await;
    let router = one_at_a_time(&leader).await;
    leader.play_always(answer("ok"));
    for _ in 0..5 {
        all(&router, from_text("x")).await.unwrap();
    }
}

#[tokio::test]
async fn a_refused_request_gives_its_place_back() {
    let leader = Leader::serving().await;
    let router = one_at_a_time(&leader).await;
    for _ in 0..3 {
        assert_eq!(all(&router, from_text("")).await.unwrap_err().code(), Code::InvalidArgument);
    }
    leader.play_always(answer("ok"));
    all(&router, from_text("x")).await.unwrap();
}
