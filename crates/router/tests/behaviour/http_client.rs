//! A client of the HTTP listener that shows everything that comes over the wire.
#![allow(clippy::needless_pass_by_value, reason = "callers write json!(…) in place")]

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{TestRouter, soon};

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of all events but the last, which must be `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Value> {
        let mut events: Vec<&str> =
            self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{}", self.body);
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// The refused field and the message.
    pub(crate) fn refusal(&self) -> (Option<String>, String) {
        let body = self.json();
        let error = &body["error"];
        assert_eq!(error["code"], json!(self.code), "{body}");
        (error["param"].as_str().map(str::to_owned), error["message"].as_str().unwrap().to_owned())
    }
}

/// Opens a connection and sends a request on it.
pub(crate) async fn send(router: &TestRouter, path: &str, headers: &str, body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    stream
}

/// What is at this path.
pub(crate) async fn get(at: SocketAddr, path: &str) -> Answer {
    let mut stream = TcpStream::connect(at).await.unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    receive(stream).await
}

pub(crate) async fn receive(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    soon(stream.read_to_end(&mut bytes)).await.unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text}"));
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut answer = Answer { code, head: head.to_owned(), body: body.to_owned() };
    if answer.header("transfer-encoding") == Some("chunked") {
        answer.body = unchunk(body);
    }
    answer
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole.push_str(&rest[..size]);
        body = rest[size..].strip_prefix("\r\n").unwrap();
    }
    whole
}

pub(crate) async fn post(router: &TestRouter, path: &str, body: &Value) -> Answer {
    let headers = "Content-Type: application/json\r\n";
    receive(send(router, path, headers, body.to_string().as_bytes()).await).await
}

/// A chat completion for one message of the user, with further fields.
pub(crate) async fn chat(router: &TestRouter, content: &str, more: Value) -> Answer {
    post(router, "/v1/chat/completions", &chat_body(content, more)).await
}

pub(crate) fn chat_body(content: &str, more: Value) -> Value {
    let body = json!({ "model": "demo", "messages": [{ "role": "user", "content": content }] });
    with(body, more)
}

/// A completion, with further fields.
pub(crate) async fn complete(router: &TestRouter, prompt: Value, more: Value) -> Answer {
    post(router, "/v1/completions", &with(json!({ "prompt": prompt }), more)).await
}

fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more} is no object") };
    for (name, value) in more {
        body[name] = value;
    }
    body
}
