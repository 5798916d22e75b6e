//! A leader hears what a router makes of its group, once it serves.

use proto::{Phase, worker};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{Leader, TestRouter, config, demo_files, facts, soon, state};

#[tokio::test]
async fn a_group_is_acknowledged_once_it_serves_and_not_while_it_loads() {
    let mut leader = Leader::start(state(Phase::Loading, 50, Some(facts("demo")))).await;
    let router = TestRouter::start(config(&[&leader.address]), demo_files()).await;
    leader.states.send_replace(state(Phase::Warming, 0, Some(facts("demo"))));
    leader.states.send_replace(state(Phase::Serving, 100, Some(facts("demo"))));
    assert_eq!(soon(leader.acknowledged.recv()).await.unwrap(), "");
    router.wait_for(ServingStatus::Serving).await;
    assert!(leader.acknowledged.try_recv().is_err(), "it is said once");
}

#[tokio::test]
async fn a_group_that_has_not_heard_is_told_again() {
    let mut leader = Leader::start(state(Phase::Loading, 50, Some(facts("demo")))).await;
    leader.miss(2);
    let router = TestRouter::start(config(&[&leader.address]), demo_files()).await;
    leader.states.send_replace(state(Phase::Serving, 100, Some(facts("demo"))));
    assert_eq!(soon(leader.acknowledged.recv()).await.unwrap(), "");
    router.wait_for(ServingStatus::Serving).await;
}

#[tokio::test]
async fn a_group_with_another_model_or_configuration_is_told_the_difference() {
    let mut first = Leader::serving().await;
    let router = TestRouter::ready(&[&first.address]).await;
    assert_eq!(soon(first.acknowledged.recv()).await.unwrap(), "");
    let others = [
        (facts("other"), "model other, where the cluster has demo"),
        (
            worker::ModelFacts { config_hash: "def".to_owned(), ..facts("demo") },
            "configuration hash def, where the cluster has abc",
        ),
    ];
    for (other, difference) in others {
        let mut leader = Leader::start(state(Phase::Serving, 100, Some(other))).await;
        router.change(config(&[&first.address, &leader.address])).await.unwrap();
        let told = soon(leader.acknowledged.recv()).await.unwrap();
        assert_eq!(told, format!("it serves something else than the others: {difference}"));
    }
}

#[tokio::test]
async fn a_group_that_was_refused_is_acknowledged_when_the_others_are_gone() {
    let first = Leader::serving().await;
    let router = TestRouter::ready(&[&first.address]).await;
    let mut other = Leader::start(state(Phase::Serving, 100, Some(facts("other")))).await;
    router.change(config(&[&first.address, &other.address])).await.unwrap();
    assert!(soon(other.acknowledged.recv()).await.unwrap().contains("model other"));
    router.change(config(&[&other.address])).await.unwrap();
    assert_eq!(soon(other.acknowledged.recv()).await.unwrap(), "");
}
