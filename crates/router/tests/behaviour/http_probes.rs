use proto::Phase;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{CONTEXT, Leader, TestRouter, config, demo_files, facts, soon, state};

async fn get(router: &TestRouter, path: &str) -> (u16, Value) {
    let mut stream = TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    soon(stream.read_to_string(&mut answer)).await.unwrap();
    let code = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    (code, serde_json::from_str(body).unwrap_or(Value::Null))
}

#[tokio::test]
async fn probes_say_how_far_the_cluster_is() {
    let leader = Leader::start(state(Phase::Loading, 40, None)).await;
    let router = TestRouter::start(config(&[&leader.address]), demo_files()).await;
    assert_eq!(get(&router, "/livez").await.0, 200);
    while get(&router, "/startupz").await.1["phase"] == "connecting" {}
    let loading = json!({ "phase": "loading", "percent": 40 });
    assert_eq!(get(&router, "/startupz").await, (200, loading.clone()));
    assert_eq!(get(&router, "/readyz").await, (503, loading.clone()));
    assert_eq!(get(&router, "/health").await, (503, loading));
    assert_eq!(get(&router, "/v1/models").await, (200, json!({ "object": "list", "data": [] })));

    leader.states.send_replace(state(Phase::Serving, 100, Some(facts("demo"))));
    router.wait_for(ServingStatus::Serving).await;
    let serving = json!({ "phase": "serving", "percent": 100 });
    assert_eq!(get(&router, "/readyz").await, (200, serving.clone()));
    assert_eq!(get(&router, "/health").await, (200, serving));
}

#[tokio::test]
async fn the_model_is_listed_as_openai_lists_models() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let (code, list) = get(&router, "/v1/models").await;
    assert_eq!((code, &list["object"]), (200, &json!("list")));
    let model = &list["data"][0];
    assert_eq!((&model["id"], &model["object"]), (&json!("demo"), &json!("model")));
    assert_eq!(model["max_model_len"], json!(CONTEXT));
    let version = json!({ "version": env!("CARGO_PKG_VERSION") });
    assert_eq!(get(&router, "/version").await, (200, version));
    assert_eq!(get(&router, "/no-such-path").await.0, 404);
    assert_eq!(get(&router, "/v1/models/demo").await, (200, model.clone()));
    assert_eq!(get(&router, "/v1/models/other").await.0, 404);
    assert_eq!(get(&router, "/ping").await.0, 200);
    assert_eq!(get(&router, "/load").await, (200, json!({ "server_load": 0, "waiting": 0, "resumed": 0 })));
}
