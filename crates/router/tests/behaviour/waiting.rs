//! Requests that come to a full router wait for their turn, within bounds.

use std::time::Duration;

use proto::{Failure, v1};
use router::{Access, Config, Limits, QueueLimits};
use security::{generate_key, key_line};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tonic::{Code, Request, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use types::limits::{RETRY_AFTER_MAX, RETRY_AFTER_MIN};

use crate::http_client::{chat, chat_body, complete, receive, send};
use crate::support::{Leader, TestRouter, all, answer, config, demo_files, failure, from_ids, soon};

const ROOMY: QueueLimits = QueueLimits {
    requests_max: 16,
    tokens_max: 1 << 20,
    bytes_max: 1 << 20,
    key_requests_max: 16,
    wait_max: Duration::from_secs(600),
};

/// A router with one place, and so many as `queue` says in its waiting room.
async fn one_place(leader: &Leader, queue: QueueLimits, access: Access) -> TestRouter {
    places(leader, 1, queue, access).await
}

async fn places(leader: &Leader, requests_max: u32, queue: QueueLimits, access: Access) -> TestRouter {
    let limits = Limits { requests_max, queue, ..Limits::default() };
    let config = Config { limits, access, ..config(&[&leader.address]) };
    let router = TestRouter::start(config, demo_files()).await;
    router.wait_for(ServingStatus::Serving).await;
    router
}

type Answered = Result<Vec<v1::GenerateResponse>, Status>;

/// Sends a request whose prompt is this id, and leaves it alone.
async fn ask(router: &TestRouter, request: Request<v1::GenerateRequest>) -> JoinHandle<Answered> {
    let mut client = router.client().await;
    tokio::spawn(async move {
        let mut stream = client.generate(request).await?.into_inner();
        let mut messages = Vec::new();
        while let Some(message) = stream.message().await? {
            messages.push(message);
        }
        Ok(messages)
    })
}

fn request(id: u32) -> Request<v1::GenerateRequest> {
    Request::new(from_ids(&[id]))
}

fn with_key(mut request: Request<v1::GenerateRequest>, key: &str) -> Request<v1::GenerateRequest> {
    request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    request
}

/// The value of a gauge or counter of the router.
async fn metric(router: &TestRouter, sample: &str) -> u64 {
    let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut page = String::new();
    soon(stream.read_to_string(&mut page)).await.unwrap();
    let value = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {sample} in {page}")).parse().unwrap()
}

/// Until exactly so many wait.
async fn until_waiting(router: &TestRouter, count: u64) {
    soon(async { while metric(router, "cohort_router_requests_waiting").await != count {} }).await;
}

/// Answers whatever comes next, one at a time, and says in which order they came.
async fn serve(leader: &mut Leader, count: usize) -> Vec<u32> {
    let mut order = Vec::new();
    for _ in 0..count {
        let open = leader.next().await;
        order.push(open.request.prompt[0]);
        open.play(answer("x")).await;
    }
    order
}

#[tokio::test]
async fn a_request_that_finds_all_places_taken_is_served_when_one_is_free() {
    let mut leader = Leader::serving().await;
    let router = one_place(&leader, ROOMY, Access::default()).await;
    let first = ask(&router, request(1)).await;
    let open = leader.next().await;
    let second = ask(&router, request(2)).await;
    until_waiting(&router, 1).await;
    assert!(leader.opened.try_recv().is_err());
    assert!(metric(&router, "cohort_router_waiting_tokens").await > 0);
    open.play(answer("x")).await;
    assert_eq!(serve(&mut leader, 1).await, [2]);
    for answered in [first, second] {
        assert!(soon(answered).await.unwrap().unwrap().last().unwrap().finish.is_some());
    }
    until_waiting(&router, 0).await;
    assert_eq!(metric(&router, "cohort_router_stage_seconds_count{stage=\"wait\"}").await, 1);
}

#[tokio::test]
async fn who_is_turned_away_is_told_a_time_from_the_pace_at_which_places_become_free() {
    let mut leader = Leader::serving().await;
    let queue = QueueLimits { requests_max: 2, ..ROOMY };
    let router = one_place(&leader, queue, Access::default()).await;
    let turned = async || {
        let status = all(&router, request(9)).await.unwrap_err();
        failure(&status).retry_after().unwrap()
    };
    let _first = ask(&router, request(1)).await;
    let open = leader.next().await;
    let _second = ask(&router, request(2)).await;
    let _third = ask(&router, request(3)).await;
    until_waiting(&router, 2).await;
    assert!(turned().await >= proto::RETRY_AFTER, "nothing has become free yet");
    open.play(answer("x")).await;
    let open = leader.next().await;
    let _fourth = ask(&router, request(4)).await;
    until_waiting(&router, 2).await;
    let told = turned().await;
    assert_ne!(told, proto::RETRY_AFTER, "a place has become free meanwhile");
    assert!((RETRY_AFTER_MIN..=RETRY_AFTER_MAX).contains(&told), "{told:?}");
    drop(open);
}

#[tokio::test]
async fn the_more_urgent_are_served_first() {
    let mut leader = Leader::serving().await;
    let router = one_place(&leader, ROOMY, Access::default()).await;
    let _first = ask(&router, request(1)).await;
    let open = leader.next().await;
    let mut waiting = Vec::new();
    // Lower numbers are more urgent; a hundred levels are 10 s apart, far more than it takes to get here.
    for (at, priority) in [(2, 100), (3, 0), (4, -100)] {
        let message = v1::GenerateRequest { priority, ..from_ids(&[at]) };
        waiting.push(ask(&router, Request::new(message)).await);
        until_waiting(&router, waiting.len() as u64).await;
    }
    open.play(answer("x")).await;
    assert_eq!(serve(&mut leader, 3).await, [4, 3, 2]);
}

#[tokio::test]
async fn keys_take_turns_however_many_requests_one_of_them_sends() {
    let mut leader = Leader::serving().await;
    let keys = [generate_key().unwrap(), generate_key().unwrap()];
    let file = tempfile::NamedTempFile::new().unwrap();
    let line =
        |(name, key): (&str, &String)| key_line(name, key, &security::Limits::default()).unwrap() + "\n";
    let text: String = ["flood", "other"].into_iter().zip(&keys).map(line).collect();
    std::fs::write(file.path(), text).unwrap();
    let access = Access { keys: Some(file.path().to_owned()), ..Access::default() };
    let router = one_place(&leader, QueueLimits { key_requests_max: 4, ..ROOMY }, access).await;
    let _first = ask(&router, with_key(request(1), &keys[0])).await;
    let open = leader.next().await;
    let mut waiting = Vec::new();
    for id in 2..6 {
        waiting.push(ask(&router, with_key(request(id), &keys[0])).await);
        until_waiting(&router, waiting.len() as u64).await;
    }
    let refused = soon(ask(&router, with_key(request(9), &keys[0])).await).await.unwrap().unwrap_err();
    assert!(refused.message().contains("at most 4 waiting requests of one key"), "{refused:?}");
    waiting.push(ask(&router, with_key(request(7), &keys[1])).await);
    until_waiting(&router, 5).await;
    open.play(answer("x")).await;
    assert_eq!(serve(&mut leader, 5).await, [2, 7, 3, 4, 5]);
}

#[tokio::test]
async fn a_caller_that_leaves_leaves_the_queue() {
    let mut leader = Leader::serving().await;
    let router = one_place(&leader, ROOMY, Access::default()).await;
    let _first = ask(&router, request(1)).await;
    let open = leader.next().await;
    let (gone, stays) = (ask(&router, request(2)).await, ask(&router, request(3)).await);
    until_waiting(&router, 2).await;
    gone.abort();
    until_waiting(&router, 1).await;
    let body = chat_body("x", json!({})).to_string();
    let http =
        send(&router, "/v1/chat/completions", "Content-Type: application/json\r\n", body.as_bytes()).await;
    until_waiting(&router, 2).await;
    drop(http);
    until_waiting(&router, 1).await;
    open.play(answer("x")).await;
    assert_eq!(serve(&mut leader, 1).await, [3]);
    soon(stays).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_deadline_that_passes_in_the_queue_ends_the_request_there() {
    let mut leader = Leader::serving().await;
    let router = one_place(&leader, ROOMY, Access::default()).await;
    let _first = ask(&router, request(1)).await;
    let _open = leader.next().await;
    let mut hasty = request(2);
    hasty.set_timeout(Duration::from_millis(400));
    let status = soon(ask(&router, hasty).await).await.unwrap().unwrap_err();
    assert_eq!(failure(&status), Failure::DeadlineExceeded);
    until_waiting(&router, 0).await;
}

#[tokio::test]
async fn nobody_waits_longer_than_the_bound() {
    let mut leader = Leader::serving().await;
    let queue = QueueLimits { wait_max: Duration::from_millis(50), ..ROOMY };
    let router = one_place(&leader, queue, Access::default()).await;
    let _first = ask(&router, request(1)).await;
    let _open = leader.next().await;
    let status = soon(ask(&router, request(2)).await).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(failure(&status).retry_after().is_some());
    assert_eq!(metric(&router, "cohort_router_overloaded_total{bound=\"wait\"}").await, 1);
    until_waiting(&router, 0).await;
}

#[tokio::test]
async fn beyond_the_queue_requests_are_refused_with_the_bound_and_when_to_come_back() {
    let mut leader = Leader::serving().await;
    let table = [
        (QueueLimits { requests_max: 1, ..ROOMY }, "at most 1 waiting requests"),
        (QueueLimits { requests_max: 100, tokens_max: 1100, ..ROOMY }, "at most 1100 waiting tokens"),
        (QueueLimits { requests_max: 100, bytes_max: 6, ..ROOMY }, "at most 6 bytes of waiting prompts"),
    ];
    for (queue, why) in table {
        // The context bounds what a request may cost: 64 tokens, unless it asks for several answers.
        let mut several = from_ids(&[2]);
        let n = if queue.requests_max == 1 { 1 } else { 10 };
        several.sampling = Some(v1::Sampling { n: Some(n), ..v1::Sampling::default() });
        let router = places(&leader, 10, queue, Access::default()).await;
        let first = v1::GenerateRequest {
            sampling: Some(v1::Sampling { n: Some(10), ..v1::Sampling::default() }),
            ..from_ids(&[1])
        };
        let _first = ask(&router, Request::new(first)).await;
        let _open = leader.next().await;
        let _waits = ask(&router, Request::new(several.clone())).await;
        until_waiting(&router, n.into()).await;
        let status = soon(ask(&router, Request::new(several)).await).await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().contains(why), "{status:?}");
        assert!(failure(&status).retry_after().is_some_and(|wait| !wait.is_zero()));
        let mut long = json!({ "max_tokens": 60, "n": n });
        long["user"] = json!("x");
        let refused = chat(&router, "hello there", long).await;
        assert_eq!(refused.code, 429, "{refused:?}");
        assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1, "{refused:?}");
    }
}

#[tokio::test]
async fn the_prompts_of_one_call_do_not_wait_for_each_other() {
    let leader = Leader::serving().await;
    let router = places(&leader, 2, ROOMY, Access::default()).await;
    leader.play_always(answer("ok"));
    // Each of these would hold one place and wait for another, if they entered one by one.
    let calls = (0..8).map(|_| complete(&router, json!(["a", "b"]), json!({ "max_tokens": 2 })));
    for answer in futures::future::join_all(calls).await {
        assert_eq!((answer.code, answer.json()["choices"].as_array().unwrap().len()), (200, 2), "{answer:?}");
    }
    let refused = complete(&router, json!(["a", "b", "c"]), json!({})).await;
    assert_eq!(refused.code, 400);
    let (field, why) = refused.refusal();
    assert!(field.as_deref() == Some("prompt") && why.contains("at most 2 requests at once"), "{why}");
}

#[tokio::test]
async fn a_request_with_a_mistake_is_told_so_at_once() {
    let mut leader = Leader::serving().await;
    let router = one_place(&leader, ROOMY, Access::default()).await;
    let _first = ask(&router, request(1)).await;
    let _open = leader.next().await;
    let status = all(&router, from_ids(&[])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
}

#[tokio::test]
async fn who_waits_is_served_before_a_router_that_was_told_to_stop_ends() {
    let mut leader = Leader::serving().await;
    let mut router = one_place(&leader, ROOMY, Access::default()).await;
    let _first = ask(&router, request(1)).await;
    let open = leader.next().await;
    let second = ask(&router, request(2)).await;
    until_waiting(&router, 1).await;
    router.shutdown.cancel();
    open.play(answer("x")).await;
    assert_eq!(serve(&mut leader, 1).await, [2]);
    soon(second).await.unwrap().unwrap();
    soon(&mut router.served).await.unwrap().unwrap();
}

#[tokio::test]
async fn an_http_caller_waits_too() {
    let mut leader = Leader::serving().await;
    let router = one_place(&leader, ROOMY, Access::default()).await;
    let _first = ask(&router, request(1)).await;
    let open = leader.next().await;
    let body = chat_body("x", json!({ "max_tokens": 2 })).to_string();
    let http =
        send(&router, "/v1/chat/completions", "Content-Type: application/json\r\n", body.as_bytes()).await;
    until_waiting(&router, 1).await;
    open.play(answer("x")).await;
    leader.next().await.play(answer("ok")).await;
    assert_eq!(receive(http).await.code, 200);
}
