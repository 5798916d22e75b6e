use proto::v1::cohort_client::CohortClient;
use proto::{Failure, Phase};
use router::{Config, Error, ModelFiles, Start, serve};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::http_client::get;
use crate::support::{Leader, any_port, config, demo_files, failure, from_ids, soon};

const WORKER: &str = "http://127.0.0.1:9";

async fn start(config: Config, files: ModelFiles) -> Error {
    soon(serve(config, files, |_| {}, CancellationToken::new())).await.unwrap_err()
}

#[tokio::test]
async fn a_port_in_use_is_named_with_its_flag() {
    let taken = TcpListener::bind(any_port()).await.unwrap();
    let address = taken.local_addr().unwrap();
    let grpc = Config { grpc_listen: address, ..config(&[WORKER]) };
    let http = Config { http_listen: Some(address), ..config(&[WORKER]) };
    for (config, flag) in [(grpc, "--grpc-listen"), (http, "--http-listen")] {
        let error = start(config, ModelFiles::default()).await.to_string();
        assert!(error.contains(&address.to_string()) && error.contains(flag), "{error}");
    }
}

#[tokio::test]
async fn a_worker_address_must_be_a_url_with_a_port() {
    for address in [
        "",
        "127.0.0.1:7100",
        "http://",
        "https://127.0.0.1:7100",
        "ftp://127.0.0.1:7100",
        "http://127.0.0.1",
    ] {
        match start(config(&[address]), ModelFiles::default()).await {
            Error::WorkerAddress { address: named, .. } => assert_eq!(named, address),
            other => panic!("{address}: {other}"),
        }
    }
    assert!(matches!(start(config(&[]), ModelFiles::default()).await, Error::NoWorkers));
}

#[tokio::test]
async fn probes_are_answered_while_the_text_files_are_read_and_all_else_is_told_how_far_that_is() {
    let leader = Leader::serving().await;
    let (go_on, told) = std::sync::mpsc::channel::<()>();
    let files = move || {
        // Until the test says so.
        told.recv().unwrap();
        Ok(demo_files())
    };
    let (starts, mut started) = tokio::sync::mpsc::unbounded_channel();
    let (_changes, changed) = tokio::sync::mpsc::channel(1);
    let serving = router::serve_changing(
        config(&[&leader.address]),
        files,
        move |start| starts.send(start).unwrap(),
        CancellationToken::new(),
        changed,
    );
    let serving = tokio::spawn(serving);
    let Start::Listening(bound) = soon(started.recv()).await.unwrap() else {
        panic!("it listens before anything is read")
    };
    let http = bound.http.unwrap();
    assert_eq!(get(http, "/livez").await.code, 200);
    for (path, code) in [("/startupz", 200), ("/readyz", 503), ("/health", 503)] {
        let answer = get(http, path).await;
        assert_eq!(
            (answer.code, answer.json()),
            (code, json!({ "phase": "loading", "percent": 0 })),
            "{path}"
        );
    }
    for path in ["/v1/models", "/v2/chat"] {
        let answer = get(http, path).await;
        assert_eq!((answer.code, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
        assert!(answer.body.contains("loading, 0 % done"), "{answer:?}");
    }
    let channel = Channel::from_shared(format!("http://{}", bound.grpc)).unwrap().connect().await.unwrap();
    let (mut health, mut client) = (HealthClient::new(channel.clone()), CohortClient::new(channel));
    let named = |service: &str| HealthCheckRequest { service: service.to_owned() };
    for name in ["", "cohort.v1.Cohort"] {
        let status = health.check(named(name)).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::NotServing, "{name:?}");
    }
    let mut states = health.watch(named("")).await.unwrap().into_inner();
    let refused = client.generate_once(from_ids(&[5])).await.unwrap_err();
    let expected = Failure::NotServing { phase: Phase::Loading, percent: 0, retry_after: proto::RETRY_AFTER };
    assert_eq!(failure(&refused), expected);
    go_on.send(()).unwrap();
    assert_eq!(soon(started.recv()).await.unwrap(), Start::Serving(bound));
    let ready = async { while get(http, "/readyz").await.code != 200 {} };
    soon(ready).await;
    assert_eq!(get(http, "/v1/models").await.code, 200);
    // On the same connection, and to whoever has watched from the start.
    soon(async { while states.message().await.unwrap().unwrap().status() != ServingStatus::Serving {} })
        .await;
    let info = client.get_model_info(proto::v1::GetModelInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.groups_ready, 1);
    serving.abort();
}

#[tokio::test]
async fn a_tokenizer_that_cannot_be_used_stops_the_start() {
    let files = ModelFiles { tokenizer_json: Some(b"not json".to_vec()), ..ModelFiles::default() };
    match start(config(&[WORKER]), files).await {
        Error::File { file: "tokenizer.json", .. } => {}
        other => panic!("{other}"),
    }
}
