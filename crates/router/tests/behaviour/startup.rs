use router::{Config, Error, ModelFiles, serve};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::support::{any_port, config, soon};

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
async fn a_tokenizer_that_cannot_be_used_stops_the_start() {
    let files = ModelFiles { tokenizer_json: Some(b"not json".to_vec()), ..ModelFiles::default() };
    match start(config(&[WORKER]), files).await {
        Error::File { file: "tokenizer.json", .. } => {}
        other => panic!("{other}"),
    }
}
