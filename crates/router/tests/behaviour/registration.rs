//! Leaders register at a router, which needs no list of them.

use std::time::Duration;

use proto::worker::registry_client::RegistryClient;
use proto::worker::{ModelFacts, RegisterRequest};
use router::{Config, Error};
use security::{Badge, Identified, Secret, SharedSecret};
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{Leader, TestRouter, all, answer, config, demo_files, facts, from_ids, soon};

fn secret() -> SharedSecret {
    Secret::parse(&"s".repeat(32)).unwrap().into()
}

/// A router without a list, that remembers groups for so long.
async fn router(hold: Duration) -> TestRouter {
    let access = router::Access { secret: Some(secret()), ..router::Access::default() };
    let config = Config { registration_hold: Some(hold), access, ..config(&[]) };
    TestRouter::start(config, demo_files()).await
}

const LONG: Duration = Duration::from_secs(3600);

async fn desk(router: &TestRouter, secret: Option<&SharedSecret>) -> RegistryClient<Identified> {
    RegistryClient::with_interceptor(router.channel().await, Badge::new(secret))
}

async fn register(router: &TestRouter, url: &str, model: ModelFacts) -> Result<u32, Status> {
    let request = RegisterRequest { url: url.to_owned(), model: Some(model) };
    let answer = soon(desk(router, Some(&secret())).await.register(request)).await?;
    Ok(answer.into_inner().hold_ms)
}

#[tokio::test]
async fn a_group_that_registers_gets_requests() {
    let router = router(LONG).await;
    let address = Leader::serving().await.play_always(answer("hi"));
    assert_eq!(register(&router, &address, facts("demo")).await.unwrap(), 3_600_000);
    router.wait_for(ServingStatus::Serving).await;
    all(&router, from_ids(&[5, 6])).await.unwrap();
}

#[tokio::test]
async fn a_group_that_is_not_heard_of_any_more_leaves_and_one_that_is_stays() {
    let router = router(Duration::from_millis(100)).await;
    let (one, other) = (Leader::serving().await, Leader::serving().await);
    register(&router, &one.address, facts("demo")).await.unwrap();
    register(&router, &other.address, facts("demo")).await.unwrap();
    router.wait_for(ServingStatus::Serving).await;
    let mut client = router.client().await;
    loop {
        register(&router, &other.address, facts("demo")).await.unwrap();
        let info = soon(client.get_model_info(proto::v1::GetModelInfoRequest {})).await.unwrap().into_inner();
        if (info.groups, info.groups_ready) == (1, 1) {
            break;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn who_does_not_show_the_clusters_secret_is_refused() {
    let router = router(LONG).await;
    let stranger = SharedSecret::from(Secret::parse(&"x".repeat(32)).unwrap());
    for shown in [None, Some(&stranger)] {
        let request = RegisterRequest { url: "http://127.0.0.1:1".to_owned(), model: Some(facts("demo")) };
        let refused = soon(desk(&router, shown).await.register(request)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        assert!(refused.message().contains("cluster.secret_file"), "{refused:?}");
    }
}

#[tokio::test]
async fn a_group_with_another_model_or_configuration_is_refused_by_name() {
    let router = router(LONG).await;
    let leader = Leader::serving().await;
    register(&router, &leader.address, facts("demo")).await.unwrap();
    router.wait_for(ServingStatus::Serving).await;
    let others = [
        (facts("other"), "model other, where the cluster has demo"),
        (ModelFacts { config_hash: "def".to_owned(), ..facts("demo") }, "configuration hash def"),
    ];
    for (model, named) in others {
        let refused = register(&router, "http://127.0.0.1:1", model).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains(named), "{refused:?}");
    }
}

#[tokio::test]
async fn what_is_no_address_and_no_model_is_refused() {
    let router = router(LONG).await;
    for (url, model) in [("groups:7000", facts("demo")), ("http://127.0.0.1:1", ModelFacts::default())] {
        let refused = register(&router, url, model).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    }
}

#[tokio::test]
async fn without_a_secret_nobody_can_register_so_the_router_does_not_start() {
    let config = Config { registration_hold: Some(LONG), ..config(&[]) };
    let ended = router::serve(config, demo_files(), |_| {}, tokio_util::sync::CancellationToken::new());
    let error = soon(ended).await.unwrap_err();
    assert!(matches!(error, Error::NoSecret), "{error}");
}

#[tokio::test]
async fn a_router_that_takes_no_registrations_does_not_know_the_call() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let refused = register(&router, "http://127.0.0.1:1", facts("demo")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
}
