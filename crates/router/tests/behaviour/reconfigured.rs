//! A router goes on with another configuration, and no request is lost.

use router::{Config, Error};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{Leader, PATIENCE, TestRouter, all, answer, chunk, config, from_ids, soon};

/// How many groups a router says it has, ready or not.
async fn groups(router: &TestRouter) -> usize {
    let mut client = router.client().await;
    soon(client.get_model_info(proto::v1::GetModelInfoRequest {})).await.unwrap().into_inner().groups as usize
}

#[tokio::test]
async fn a_group_that_joins_gets_requests_once_it_is_ready() {
    let (first, mut second) = (Leader::serving().await, Leader::serving().await);
    let router = TestRouter::ready(&[&first.address]).await;
    router.change(config(&[&first.address, &second.address])).await.unwrap();
    router.wait_for_groups(2).await;
    // Two at once: each gets one.
    let mut client = router.client().await;
    let busy = tokio::spawn(async move { client.generate(from_ids(&[5, 6])).await });
    let mut first = first;
    let open = first.next().await;
    let played = tokio::spawn(async move {
        second.next().await.play(answer("hi")).await;
        second
    });
    all(&router, from_ids(&[7, 8])).await.unwrap();
    let _second = played.await.unwrap();
    drop(open);
    busy.abort();
}

#[tokio::test]
async fn a_group_that_leaves_finishes_what_it_has_and_gets_nothing_new() {
    let (mut leaving, staying) = (Leader::serving().await, Leader::serving().await);
    let router = TestRouter::ready(&[&leaving.address]).await;
    let mut client = router.client().await;
    let open = tokio::spawn(async move {
        let mut stream = client.generate(from_ids(&[5, 6])).await.unwrap().into_inner();
        let mut tokens = 0;
        while let Some(message) = stream.message().await.unwrap() {
            tokens += message.token_ids.len();
        }
        tokens
    });
    let request = leaving.next().await;
    request.play(vec![chunk(&[20])]).await;
    let address = staying.play_always(answer("hi"));
    router.change(config(&[&address])).await.unwrap();
    router.wait_for_groups(1).await;
    assert_eq!(groups(&router).await, 1);
    for _ in 0..5 {
        all(&router, from_ids(&[5, 6])).await.unwrap();
    }
    assert!(leaving.opened.try_recv().is_err(), "it got a new request");
    request.play(answer("yes")).await;
    assert!(soon(open).await.unwrap() > 1);
}

#[tokio::test]
async fn a_group_whose_weight_becomes_0_finishes_what_it_has_and_gets_nothing_new_until_it_has_one_again() {
    let (mut paused, other) = (Leader::serving().await, Leader::serving().await);
    let workers = [paused.address.clone(), other.address.clone()];
    let weighed = |weight| {
        let mut config = config(&[&workers[0], &workers[1]]);
        config.weights.insert(workers[0].clone(), weight);
        config
    };
    let router = TestRouter::ready(&[&workers[0], &workers[1]]).await;
    // Of two idle groups the first gets it.
    let mut client = router.client().await;
    let stream = tokio::spawn(async move { client.generate(from_ids(&[5, 6])).await });
    let open = paused.next().await;
    router.change(weighed(0)).await.unwrap();
    router.wait_for_groups(1).await;
    assert_eq!(groups(&router).await, 2, "it still belongs to the router");
    other.play_always(answer("hi"));
    for _ in 0..5 {
        all(&router, from_ids(&[5, 6])).await.unwrap();
    }
    assert!(paused.opened.try_recv().is_err(), "it got a new request");
    open.play(answer("yes")).await;
    let mut stream = soon(stream).await.unwrap().unwrap().into_inner();
    while soon(stream.message()).await.unwrap().is_some() {}
    router.change(weighed(2)).await.unwrap();
    router.wait_for_groups(2).await;
    let played = tokio::spawn(async move {
        paused.next().await.play(answer("hi")).await;
        paused
    });
    all(&router, from_ids(&[5, 6])).await.unwrap();
    let _paused = played.await.unwrap();
}

#[tokio::test]
async fn a_router_whose_groups_all_have_weight_0_is_not_ready_and_says_why() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut paused = config(&[&leader.address]);
    paused.weights.insert(leader.address.clone(), 0);
    router.change(paused).await.unwrap();
    router.wait_for(ServingStatus::NotServing).await;
    let refused = all(&router, from_ids(&[5, 6])).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("every group that serves has weight 0"), "{refused:?}");
}

#[tokio::test]
async fn a_group_that_left_and_comes_back_is_used_again() {
    let (mut first, second) = (Leader::serving().await, Leader::serving().await);
    let router = TestRouter::ready(&[&first.address, &second.address]).await;
    for _ in 0..3 {
        router.change(config(&[&second.address])).await.unwrap();
        router.wait_for_groups(1).await;
        router.change(config(&[&first.address])).await.unwrap();
        router.wait_for_groups(1).await;
    }
    let played = tokio::spawn(async move {
        first.next().await.play(answer("hi")).await;
        first
    });
    all(&router, from_ids(&[5, 6])).await.unwrap();
    let _first = played.await.unwrap();
}

#[tokio::test]
async fn a_lower_limit_holds_for_new_requests_and_a_higher_one_lets_more_in() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let limited = |requests_max| {
        let mut config = config(&[&leader.address]);
        config.limits.requests_max = requests_max;
        config.limits.queue = router::QueueLimits::NONE;
        config
    };
    let (one, two) = (limited(1), limited(2));
    let mut streams = Vec::new();
    let mut open = Vec::new();
    let begin = async |leader: &mut Leader| {
        let mut client = router.client().await;
        let stream = tokio::spawn(async move { client.generate(from_ids(&[5, 6])).await });
        (leader.next().await, stream)
    };
    for _ in 0..2 {
        let (request, stream) = begin(&mut leader).await;
        open.push(request);
        streams.push(stream);
    }
    router.change(one).await.unwrap();
    let refused = all(&router, from_ids(&[5, 6])).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("1"), "{refused:?}");
    // Both go on to their end; then there is one place.
    for (request, stream) in open.into_iter().zip(streams) {
        request.play(answer("hi")).await;
        let mut stream = soon(stream).await.unwrap().unwrap().into_inner();
        while soon(stream.message()).await.unwrap().is_some() {}
    }
    let (request, _stream) = begin(&mut leader).await;
    assert_eq!(all(&router, from_ids(&[5, 6])).await.unwrap_err().code(), Code::ResourceExhausted);
    router.change(two).await.unwrap();
    let (_other, _second) = begin(&mut leader).await;
    drop(request);
}

#[tokio::test]
async fn keys_are_asked_for_from_the_moment_a_file_is_named() {
    let address = Leader::serving().await.play_always(answer("hi"));
    let router = TestRouter::ready(&[&address]).await;
    all(&router, from_ids(&[5, 6])).await.unwrap();
    let key = security::generate_key().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let line = security::key_line("alice", &key, &security::Limits::default()).unwrap();
    std::fs::write(file.path(), line).unwrap();
    let mut locked = config(&[&address]);
    locked.access.keys = Some(file.path().to_owned());
    router.change(locked).await.unwrap();
    assert_eq!(all(&router, from_ids(&[5, 6])).await.unwrap_err().code(), Code::Unauthenticated);
    let mut request = tonic::Request::new(from_ids(&[5, 6]));
    request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    all(&router, request).await.unwrap();
    router.change(config(&[&address])).await.unwrap();
    all(&router, from_ids(&[5, 6])).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_by_name_and_nothing_changes() {
    let address = Leader::serving().await.play_always(answer("hi"));
    let router = TestRouter::ready(&[&address]).await;
    let mut keyless = config(&[&address]);
    keyless.access.keys = Some("/nowhere/keys.toml".into());
    keyless.limits.requests_max = 1;
    let mut unencrypted = config(&[&address, "https://127.0.0.1:1"]);
    unencrypted.drain_grace = PATIENCE;
    let refused = |outcome: Result<(), Error>, named: &str| {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    };
    refused(router.change(keyless).await, "/nowhere/keys.toml");
    refused(router.change(unencrypted).await, "cluster.tls.ca");
    refused(router.change(Config { workers: Vec::new(), ..config(&[&address]) }).await, "no worker");
    assert_eq!(groups(&router).await, 1);
    all(&router, from_ids(&[5, 6])).await.unwrap();
}
