//! Who may call: API keys, and what a key may use.

use std::io::Write;
use std::path::Path;

use proto::{Failure, v1};
use router::{Access, Config};
use security::{Limits, generate_key, key_line};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::{Code, Request, Status};

use crate::http_client::{Answer, chat_body, receive, send};
use crate::support::{
    Leader, TestRouter, all, answer, chunk, config, demo_files, failure, from_ids, last, soon,
};

/// A file of keys, and the keys.
pub(crate) struct KeyRing {
    pub(crate) file: tempfile::NamedTempFile,
    pub(crate) keys: Vec<String>,
}

impl KeyRing {
    /// One key for each of these bounds.
    pub(crate) fn new(limits: &[Limits]) -> Self {
        let keys: Vec<String> = limits.iter().map(|_| generate_key().unwrap()).collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for (index, (key, limits)) in keys.iter().zip(limits).enumerate() {
            writeln!(file, "{}", key_line(&format!("key-{index}"), key, limits).unwrap()).unwrap();
        }
        Self { file, keys }
    }

    async fn router(&self, leader: &str) -> TestRouter {
        let access = Access { keys: Some(self.file.path().to_owned()), ..Access::default() };
        let router = TestRouter::start(Config { access, ..config(&[leader]) }, demo_files()).await;
        router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
        router
    }
}

pub(crate) fn with_key<T>(message: T, key: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    request
}

pub(crate) async fn chat_with(router: &TestRouter, headers: &str) -> Answer {
    let headers = format!("Content-Type: application/json\r\n{headers}");
    let body = chat_body("hello", json!({ "max_tokens": 2 })).to_string();
    receive(send(router, "/v1/chat/completions", &headers, body.as_bytes()).await).await
}

pub(crate) fn refusal(result: Result<Vec<v1::GenerateResponse>, Status>) -> (Code, Failure) {
    let status = result.unwrap_err();
    (status.code(), failure(&status))
}

#[tokio::test]
async fn only_a_key_of_the_file_gets_an_answer() {
    let leader = Leader::serving().await.play_always(answer("hi"));
    let ring = KeyRing::new(&[Limits::default()]);
    let router = ring.router(&leader).await;
    let key = &ring.keys[0];
    all(&router, with_key(from_ids(&[1]), key)).await.unwrap();
    let good = chat_with(&router, &format!("authorization: bearer {key}\r\n")).await;
    assert_eq!(good.code, 200, "{good:?}");

    for message in [Request::new(from_ids(&[1])), with_key(from_ids(&[1]), "cohort-wrong")] {
        let (code, failure) = refusal(all(&router, message).await);
        assert_eq!(code, Code::Unauthenticated, "{failure}");
    }
    for headers in ["", "authorization: Basic x\r\n", "authorization: Bearer nope\r\n"] {
        let refused = chat_with(&router, headers).await;
        assert_eq!((refused.code, refused.header("www-authenticate")), (401, Some("Bearer")), "{refused:?}");
        assert_eq!(refused.json()["error"]["type"], "authentication_error");
    }
    let cohere = receive(send(&router, "/v2/chat", "", b"{}").await).await;
    assert_eq!(cohere.code, 401);
    assert!(cohere.json()["message"].as_str().unwrap().contains("an API key is needed"), "{cohere:?}");
}

#[tokio::test]
async fn probes_and_metrics_need_no_key() {
    let leader = Leader::serving().await;
    let router = KeyRing::new(&[]).router(&leader.address).await;
    for (path, open) in [
        ("/livez", true),
        ("/startupz", true),
        ("/readyz", true),
        ("/health", true),
        ("/ping", true),
        ("/metrics", true),
        ("/version", false),
        ("/v1/models", false),
        ("/load", false),
        ("/no/such/path", false),
    ] {
        let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let code = receive(stream).await.code;
        assert_eq!(code == 401, !open, "{path}: {code}");
    }
}

#[tokio::test]
async fn a_thousand_strangers_are_refused_unread_while_a_request_is_served() {
    let mut leader = Leader::serving().await;
    let ring = KeyRing::new(&[Limits { concurrency: Some(1), ..Limits::default() }]);
    let router = ring.router(&leader.address).await;
    let mut client = router.client().await;
    let request = with_key(from_ids(&[1]), &ring.keys[0]);
    let generating = tokio::spawn(async move { client.generate(request).await });
    let open = leader.next().await;
    open.chunks.send(Ok(chunk(&[5]))).await.unwrap();
    let mut stream = soon(generating).await.unwrap().unwrap().into_inner();
    assert_eq!(soon(stream.message()).await.unwrap().unwrap().token_ids, [5]);
    for _ in 0..20 {
        let strangers = (0..50).map(|_| async {
            // The body never comes, and nobody waits for it.
            let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
            let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
                        Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n";
            stream.write_all(head.as_bytes()).await.unwrap();
            receive(stream).await.code
        });
        let codes = futures::future::join_all(strangers).await;
        assert!(codes.iter().all(|&code| code == 401), "{codes:?}");
    }
    let end = last(&[9], proto::worker::FinishReason::Eos, Some(9));
    open.chunks.send(Ok(end)).await.unwrap();
    assert!(soon(stream.message()).await.unwrap().unwrap().finish.is_some());
    assert!(leader.opened.try_recv().is_err(), "no stranger reached the group");
}

#[tokio::test]
async fn a_bound_that_is_reached_is_named_with_the_time_to_wait() {
    let leader = Leader::serving().await.play_always(answer("hi"));
    let ring = KeyRing::new(&[
        Limits { requests_per_minute: Some(1), ..Limits::default() },
        Limits { tokens_per_minute: Some(2), ..Limits::default() },
    ]);
    let router = ring.router(&leader).await;
    for (key, what) in ring.keys.iter().zip(["requests a minute", "tokens a minute"]) {
        all(&router, with_key(from_ids(&[1, 2, 3]), key)).await.unwrap();
        let (code, failure) = refusal(all(&router, with_key(from_ids(&[1]), key)).await);
        assert_eq!(code, Code::ResourceExhausted);
        assert!(failure.to_string().contains(what), "{failure}");
        let refused = chat_with(&router, &format!("authorization: Bearer {key}\r\n")).await;
        let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!(refused.code == 429 && (1..=180).contains(&wait), "{refused:?}");
    }
}

#[tokio::test]
async fn calls_at_once_are_counted_until_their_streams_end() {
    let mut leader = Leader::serving().await;
    let ring = KeyRing::new(&[Limits { concurrency: Some(1), ..Limits::default() }]);
    let router = ring.router(&leader.address).await;
    let mut client = router.client().await;
    let request = with_key(from_ids(&[1]), &ring.keys[0]);
    let generating = tokio::spawn(async move { client.generate(request).await });
    let open = leader.next().await;
    open.chunks.send(Ok(chunk(&[5]))).await.unwrap();
    let stream = soon(generating).await.unwrap().unwrap();
    let (_, failure) = refusal(all(&router, with_key(from_ids(&[1]), &ring.keys[0])).await);
    assert!(failure.to_string().contains("at most 1 requests at once"), "{failure}");
    drop(stream);
    soon(open.chunks.closed()).await;
    let ended = async {
        let request = || with_key(v1::GetModelInfoRequest {}, &ring.keys[0]);
        while router.client().await.get_model_info(request()).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon(ended).await;
}

#[tokio::test]
async fn a_key_may_not_be_more_urgent_than_its_bound() {
    let leader = Leader::serving().await.play_always(answer("hi"));
    let ring = KeyRing::new(&[Limits { priority_min: Some(0), ..Limits::default() }]);
    let router = ring.router(&leader).await;
    let asking = |priority| with_key(v1::GenerateRequest { priority, ..from_ids(&[1]) }, &ring.keys[0]);
    all(&router, asking(0)).await.unwrap();
    let (code, failure) = refusal(all(&router, asking(-1)).await);
    assert_eq!(code, Code::PermissionDenied);
    assert!(failure.to_string().contains("priority 0 or higher numbers, not for -1"), "{failure}");
}

#[tokio::test]
async fn a_key_that_leaves_the_file_is_refused_and_one_that_comes_is_let_in() {
    let leader = Leader::serving().await.play_always(answer("hi"));
    let ring = KeyRing::new(&[Limits::default()]);
    let router = ring.router(&leader).await;
    let next = generate_key().unwrap();
    let line = key_line("next", &next, &Limits::default()).unwrap();
    replace(ring.file.path(), "not a file of keys");
    // The keys that were read stay in force until there are others.
    all(&router, with_key(from_ids(&[1]), &ring.keys[0])).await.unwrap();
    replace(ring.file.path(), &line);
    let changed = async {
        while all(&router, with_key(from_ids(&[1]), &next)).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon(changed).await;
    let (code, _) = refusal(all(&router, with_key(from_ids(&[1]), &ring.keys[0])).await);
    assert_eq!(code, Code::Unauthenticated);
}

fn replace(path: &Path, text: &str) {
    let next = path.with_extension("next");
    std::fs::write(&next, text).unwrap();
    std::fs::rename(next, path).unwrap();
}

#[tokio::test]
async fn a_file_of_keys_that_cannot_be_read_stops_the_start() {
    let access = Access { keys: Some("/nonexistent/keys.toml".into()), ..Access::default() };
    let config = Config { access, ..config(&["http://127.0.0.1:9"]) };
    let ended = router::serve(config, demo_files(), |_| {}, tokio_util::sync::CancellationToken::new());
    let error = soon(ended).await.unwrap_err().to_string();
    assert!(error.contains("/nonexistent/keys.toml"), "{error}");
}

#[tokio::test]
async fn headers_above_the_bound_are_refused() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    // Well above it: what has been read already when the bound is reached is still looked at.
    let long = "x".repeat(4 * types::limits::HEADER_BYTES_MAX as usize);
    let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
    let head = format!("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-long: {long}\r\n\r\n");
    let _ = stream.write_all(head.as_bytes()).await;
    let mut refused = Vec::new();
    // The connection is closed with the rest unread, which may overtake the answer.
    let _ = soon(stream.read_to_end(&mut refused)).await;
    assert!(refused.is_empty() || refused.starts_with(b"HTTP/1.1 431 "), "{refused:?}");
    // Others go on being served.
    router.client().await.get_model_info(v1::GetModelInfoRequest {}).await.unwrap();
    assert!(leader.opened.try_recv().is_err());
}
