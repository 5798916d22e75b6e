//! Callers that hold a connection for nothing are cut off, and others are served meanwhile.

use std::time::Duration;

use router::{Config, HttpPatience};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::http_client::{chat, receive, send};
use crate::support::{Leader, TestRouter, answer, chunk, config, demo_files, ids, soon};

const CHAT: &str = "/v1/chat/completions";

async fn impatient(leader: &str, patience: HttpPatience) -> TestRouter {
    let router =
        TestRouter::start(Config { http_patience: patience, ..config(&[leader]) }, demo_files()).await;
    router.wait_for(ServingStatus::Serving).await;
    router
}

/// Everything that comes until the connection is closed.
async fn rest(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    // A reset is an end as well.
    let _ = soon(stream.read_to_end(&mut bytes)).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn a_head_that_does_not_come_closes_the_connection() {
    let leader = Leader::serving().await.play_always(answer("<|END_THINKING|>ok"));
    let patience = HttpPatience { head: Duration::from_millis(200), ..HttpPatience::default() };
    let router = impatient(&leader, patience).await;
    for beginning in ["", "P", "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: "] {
        let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        assert_eq!(chat(&router, "Hi", json!({})).await.code, 200);
        assert!(!rest(stream).await.contains("200 OK"), "after `{beginning}`");
    }
}

#[tokio::test]
async fn a_connection_is_kept_for_the_next_request_and_not_for_ever() {
    let leader = Leader::serving().await.play_always(answer("<|END_THINKING|>ok"));
    let patience = HttpPatience { head: Duration::from_millis(300), ..HttpPatience::default() };
    let router = impatient(&leader, patience).await;
    let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
    for _ in 0..2 {
        stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut head = vec![0; 15];
        soon(stream.read_exact(&mut head)).await.unwrap();
        assert_eq!(head, b"HTTP/1.1 200 OK");
        let mut more = String::new();
        while !more.contains("\"ok\"}") {
            let mut byte = [0];
            soon(stream.read_exact(&mut byte)).await.unwrap();
            more.push(char::from(byte[0]));
        }
    }
    assert_eq!(rest(stream).await, "");
}

#[tokio::test]
async fn a_body_that_does_not_come_is_answered_with_408() {
    let leader = Leader::serving().await;
    let patience = HttpPatience { body: Duration::from_millis(200), ..HttpPatience::default() };
    let router = impatient(&leader.address, patience).await;
    let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{{");
    stream.write_all(head.as_bytes()).await.unwrap();
    let refused = receive(stream).await;
    assert_eq!(refused.code, 408);
    assert!(refused.refusal().1.contains("0.2 s"), "{}", refused.body);
}

#[tokio::test]
async fn a_stream_that_nobody_reads_is_cancelled() {
    let mut leader = Leader::serving().await;
    let patience = HttpPatience { write: Duration::from_millis(300), ..HttpPatience::default() };
    let router = impatient(&leader.address, patience).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(router.bound.http.unwrap()).await.unwrap();
    let body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "stream": true }).to_string();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    let open = leader.next().await;
    let many: Vec<u32> = ids("a long answer that goes on ").repeat(2000);
    let full = async { while open.chunks.send(Ok(chunk(&many))).await.is_ok() {} };
    soon(full).await;
    assert!(open.chunks.is_closed());
    drop(stream);
}

#[tokio::test]
async fn a_stream_with_nothing_to_say_says_comments() {
    let mut leader = Leader::serving().await;
    let patience = HttpPatience { quiet: Duration::from_millis(50), ..HttpPatience::default() };
    let router = impatient(&leader.address, patience).await;
    let body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "stream": true }).to_string();
    for path in [CHAT, "/v2/chat"] {
        let mut stream = send(&router, path, "", body.as_bytes()).await;
        let open = leader.next().await;
        let mut seen = Vec::new();
        while !seen.ends_with(b"\n:\n\n") {
            let mut byte = [0];
            soon(stream.read_exact(&mut byte)).await.unwrap();
            seen.push(byte[0]);
        }
        open.play(answer("<|END_THINKING|>ok")).await;
        assert!(rest(stream).await.contains("[DONE]"));
    }
}
