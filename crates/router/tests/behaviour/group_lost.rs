use proto::Failure;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{Leader, TestRouter, all, chunk, failure, from_text, soon};

#[tokio::test]
async fn a_group_lost_in_the_middle_ends_the_stream_with_its_name() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut stream = soon(router.client().await.generate(from_text("x"))).await.unwrap().into_inner();
    let open = leader.next().await;
    open.chunks.send(Ok(chunk(&[300]))).await.unwrap();
    assert!(soon(stream.message()).await.unwrap().is_some());
    leader.kill().await;
    let status = soon(stream.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    match failure(&status) {
        Failure::GroupLost { group, why } => {
            assert_eq!(group, leader.address);
            assert!(!why.is_empty());
        }
        other => panic!("{other}"),
    }
    router.wait_for(ServingStatus::NotServing).await;
    let status = all(&router, from_text("x")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains(&leader.address), "{}", status.message());
}

#[tokio::test]
async fn a_group_lost_before_the_first_token_with_no_other_is_unavailable() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut stream = soon(router.client().await.generate(from_text("x"))).await.unwrap().into_inner();
    let open = leader.next().await;
    leader.kill().await;
    drop(open);
    let status = soon(stream.message()).await.unwrap_err();
    assert!(matches!(status.code(), Code::Unavailable | Code::Aborted), "{status:?}");
    assert!(status.message().contains(&leader.address), "{}", status.message());
}

#[tokio::test]
async fn a_stream_that_ends_without_a_finish_is_a_lost_group() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let call = tokio::spawn(async move { all(&router, from_text("x")).await });
    let open = leader.next().await;
    open.chunks.send(Ok(chunk(&[300]))).await.unwrap();
    drop(open);
    assert_eq!(soon(call).await.unwrap().unwrap_err().code(), Code::Aborted);
}

#[tokio::test]
async fn a_failure_the_leader_reports_is_passed_on_as_it_is() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let call = tokio::spawn(async move { all(&router, from_text("x")).await });
    let open = leader.next().await;
    open.chunks.send(Ok(chunk(&[300]))).await.unwrap();
    let reported = Failure::GroupLost { group: "g0".to_owned(), why: "rank 1 left".to_owned() };
    open.chunks.send(Err(reported.to_status())).await.unwrap();
    assert_eq!(failure(&soon(call).await.unwrap().unwrap_err()), reported);
}
