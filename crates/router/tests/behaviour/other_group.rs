use std::time::Duration;

use proto::{Failure, Phase};
use tonic::Code;

use crate::support::{Leader, TestRouter, all, answer, facts, failure, from_text, soon, state};

const WAIT: Duration = Duration::from_millis(100);

async fn with_both(first: &Leader, second: &Leader) -> TestRouter {
    TestRouter::ready(&[&first.address, &second.address]).await
}

#[tokio::test]
async fn a_group_that_refuses_before_the_first_token_is_replaced() {
    let refusals = [
        Failure::NotServing { phase: Phase::Draining, percent: 0, retry_after: WAIT },
        Failure::Overloaded { what: "requests".to_owned(), max: 2, retry_after: WAIT },
        Failure::GroupLost { group: "a".to_owned(), why: "rank 1 left".to_owned() },
        // It does not know this router: one of the two has not read the cluster's new secret yet.
        Failure::Unauthenticated { why: "not of this cluster".to_owned() },
    ];
    for refusal in refusals {
        let (first, second) = (Leader::serving().await, Leader::serving().await);
        first.refuse(refusal.clone());
        let router = with_both(&first, &second).await;
        second.play_always(answer("from the second"));
        let messages = all(&router, from_text("x")).await.unwrap();
        let text: String = messages.into_iter().map(|m| m.text).collect();
        assert_eq!(text, "from the second", "{refusal}");
    }
}

#[tokio::test]
async fn when_every_group_refuses_the_last_refusal_is_passed_on() {
    let (first, second) = (Leader::serving().await, Leader::serving().await);
    let refusal = Failure::Overloaded { what: "requests".to_owned(), max: 2, retry_after: WAIT };
    first.refuse(refusal.clone());
    second.refuse(refusal.clone());
    let router = with_both(&first, &second).await;
    let status = all(&router, from_text("x")).await.unwrap_err();
    assert_eq!((status.code(), failure(&status)), (Code::ResourceExhausted, refusal));
}

#[tokio::test]
async fn a_refusal_that_would_be_the_same_everywhere_is_not_retried() {
    let (first, mut second) = (Leader::serving().await, Leader::serving().await);
    let refusal = Failure::Internal { why: "NaN logits".to_owned() };
    first.refuse(refusal.clone());
    let router = with_both(&first, &second).await;
    assert_eq!(failure(&all(&router, from_text("x")).await.unwrap_err()), refusal);
    assert!(second.opened.try_recv().is_err());
}

#[tokio::test]
async fn two_requests_go_to_two_groups() {
    let (mut first, mut second) = (Leader::serving().await, Leader::serving().await);
    let router = with_both(&first, &second).await;
    let mut client = router.client().await;
    let one = soon(client.generate(from_text("x"))).await.unwrap();
    let two = soon(client.generate(from_text("y"))).await.unwrap();
    first.next().await;
    second.next().await;
    drop((one, two));
}

#[tokio::test]
async fn a_group_that_serves_something_else_is_not_used() {
    let (first, mut second) = (Leader::serving().await, Leader::serving().await);
    let router = with_both(&first, &second).await;
    let mut odd = facts("demo");
    odd.config_hash = "other".to_owned();
    second.states.send_replace(state(Phase::Serving, 100, Some(odd)));
    router.wait_for_groups(1).await;
    first.play_always(answer("ok"));
    for _ in 0..4 {
        all(&router, from_text("x")).await.unwrap();
    }
    assert!(second.opened.try_recv().is_err());
}

#[tokio::test]
async fn a_group_that_dies_costs_no_request_that_has_no_token_yet() {
    let (mut first, second) = (Leader::serving().await, Leader::serving().await);
    let router = with_both(&first, &second).await;
    let mut client = router.client().await;
    let mut waiting = soon(client.generate(from_text("x"))).await.unwrap().into_inner();
    first.next().await;
    second.play_always(answer("from the second"));
    first.kill().await;
    let mut text = String::new();
    while let Some(message) = soon(waiting.message()).await.unwrap() {
        text.push_str(&message.text);
    }
    assert_eq!(text, "from the second");
}
