use proto::{Failure, Phase};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::{
    Leader, TestRouter, all, answer, config, demo_files, facts, failure, from_ids, from_text, soon, state,
};

async fn check(router: &TestRouter, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.to_owned() };
    soon(HealthClient::new(router.channel().await).check(request)).await.unwrap().get_ref().status()
}

#[tokio::test]
async fn health_follows_the_groups() {
    let leader = Leader::start(state(Phase::Loading, 40, Some(facts("demo")))).await;
    let router = TestRouter::start(config(&[&leader.address]), demo_files()).await;
    for service in ["", "cohort.v1.Cohort"] {
        assert_eq!(check(&router, service).await, ServingStatus::NotServing);
    }
    leader.states.send_replace(state(Phase::Serving, 100, Some(facts("demo"))));
    router.wait_for(ServingStatus::Serving).await;
    assert_eq!(check(&router, "").await, ServingStatus::Serving);
    leader.states.send_replace(state(Phase::Draining, 0, Some(facts("demo"))));
    router.wait_for(ServingStatus::NotServing).await;
}

#[tokio::test]
async fn an_unknown_service_is_not_found() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let request = HealthCheckRequest { service: "cohort.v2.Cohort".to_owned() };
    let status = soon(HealthClient::new(router.channel().await).check(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

#[tokio::test]
async fn a_group_that_is_loading_is_told_with_its_phase_and_percent() {
    let leader = Leader::start(state(Phase::Loading, 40, Some(facts("demo")))).await;
    let router = TestRouter::start(config(&[&leader.address]), demo_files()).await;
    let refused = loop {
        let refused = failure(&all(&router, from_text("x")).await.unwrap_err());
        if !matches!(refused, Failure::Unavailable { .. }) {
            break refused;
        }
        tokio::task::yield_now().await;
    };
    match refused {
        Failure::NotServing { phase: Phase::Loading, percent: 40, retry_after } => {
            assert!(!retry_after.is_zero())
        }
        other => panic!("{other}"),
    }
    let invalid = all(&router, from_ids(&[])).await.unwrap_err();
    assert_eq!(invalid.code(), Code::InvalidArgument, "a bad request is bad while loading, too");
}

#[tokio::test]
async fn a_group_that_comes_back_is_used_again() {
    let mut first = Leader::serving().await;
    let second = Leader::start(state(Phase::Warming, 0, Some(facts("demo")))).await;
    let router = TestRouter::start(config(&[&first.address, &second.address]), demo_files()).await;
    router.wait_for(ServingStatus::Serving).await;
    first.kill().await;
    router.wait_for(ServingStatus::NotServing).await;
    second.states.send_replace(state(Phase::Serving, 100, Some(facts("demo"))));
    router.wait_for(ServingStatus::Serving).await;
    second.play_always(answer("ok"));
    assert!(all(&router, from_text("x")).await.is_ok());
}

#[tokio::test]
async fn a_restarted_group_is_found_again_at_its_address() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    leader.kill().await;
    router.wait_for(ServingStatus::NotServing).await;
    let address = leader.address.trim_start_matches("http://").parse().unwrap();
    let again = Leader::start_at(address, state(Phase::Serving, 100, Some(facts("demo")))).await;
    router.wait_for(ServingStatus::Serving).await;
    again.play_always(answer("ok"));
    assert!(all(&router, from_text("x")).await.is_ok());
}
