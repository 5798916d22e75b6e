use std::time::Duration;

use router::Config;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{Leader, TestRouter, answer, chunk, config, demo_files, from_text, soon};

#[tokio::test]
async fn an_open_stream_is_finished_before_the_router_ends() {
    let mut leader = Leader::serving().await;
    let mut router = TestRouter::ready(&[&leader.address]).await;
    let mut stream = soon(router.client().await.generate(from_text("x"))).await.unwrap().into_inner();
    let open = leader.next().await;
    open.chunks.send(Ok(chunk(&[300]))).await.unwrap();
    soon(stream.message()).await.unwrap();
    router.shutdown.cancel();
    open.play(answer("the end")).await;
    drop(open);
    let mut finished = false;
    while let Some(message) = soon(stream.message()).await.unwrap() {
        finished = message.finish.is_some();
    }
    assert!(finished);
    soon(&mut router.served).await.unwrap().unwrap();
}

#[tokio::test]
async fn health_says_so_first_and_requests_are_still_taken() {
    let leader = Leader::serving().await;
    let config = Config { withdraw_grace: Duration::from_secs(600), ..config(&[&leader.address]) };
    let router = TestRouter::start(config, demo_files()).await;
    router.wait_for(ServingStatus::Serving).await;
    let mut client = router.client().await;
    router.shutdown.cancel();
    router.wait_for(ServingStatus::NotServing).await;
    leader.play_always(answer("ok"));
    assert!(soon(client.generate_once(from_text("x"))).await.is_ok());
}

#[tokio::test]
async fn after_the_grace_open_streams_are_ended_with_a_status() {
    let mut leader = Leader::serving().await;
    let config = Config { drain_grace: Duration::ZERO, ..config(&[&leader.address]) };
    let mut router = TestRouter::start(config, demo_files()).await;
    router.wait_for(ServingStatus::Serving).await;
    let mut stream = soon(router.client().await.generate(from_text("x"))).await.unwrap().into_inner();
    let open = leader.next().await;
    router.shutdown.cancel();
    assert_eq!(soon(stream.message()).await.unwrap_err().code(), Code::Unavailable);
    soon(open.chunks.closed()).await;
    soon(&mut router.served).await.unwrap().unwrap();
}
