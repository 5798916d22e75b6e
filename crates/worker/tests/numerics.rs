//! A value that is no number fails the request that met it, names its layer when that is looked at, and nobody else.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says when there is no card, and a test that cannot go on says where"
)]

mod support;

use std::fs;
use std::net::SocketAddr;

use support::{Client, Rank, config, demo, request};
use tempfile::TempDir;
use tonic::Code;
use worker::{Device, Error, Report};

/// The demo model with a bf16 NaN as the first element of a tensor.
fn damaged(tensor: &str) -> TempDir {
    let model = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json"] {
        fs::copy(demo().join(file), model.path().join(file)).unwrap();
    }
    let mut bytes = fs::read(demo().join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let start = tensors[tensor]["data_offsets"][0].as_u64().unwrap() as usize + 8 + header;
    bytes[start..start + 2].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    fs::write(model.path().join("model.safetensors"), bytes).unwrap();
    model
}

/// A rank of `model` that serves, and where; or why it does not.
fn serving(model: &TempDir, check_numerics: bool, device: Device) -> Result<(Rank, SocketAddr), Error> {
    let files = model::Files::Directory(model.path().into());
    let rank = Rank::start(worker::Config { model: files, check_numerics, device, ..config(0, 1) });
    let mut address = None;
    for report in &rank.reports {
        match report {
            Report::Listening(at) => address = Some(at),
            Report::Ready { .. } => return Ok((rank, address.unwrap())),
            _ => {}
        }
    }
    Err(rank.end().unwrap_err())
}

/// One-token requests: the messages of those that fail, and how many are answered.
fn failures((rank, address): (Rank, SocketAddr)) -> (Vec<String>, usize) {
    let client = Client::connect(address);
    let (mut failed, mut answered) = (Vec::new(), 0);
    for token in (0..4096).step_by(97) {
        match client.generate(request(vec![token], 1)) {
            Ok(_) => answered += 1,
            Err(status) => {
                assert_eq!(status.code(), Code::Internal, "{status}");
                failed.push(status.message().to_owned());
            }
        }
    }
    drop(client);
    rank.shutdown.cancel();
    rank.end().unwrap();
    (failed, answered)
}

/// Whether there is a card to test on; said when not.
fn no_card() -> bool {
    let missing = ops_cuda::probe().err();
    missing.inspect(|error| println!("no CUDA driver: skipped ({error})")).is_some()
}

fn a_damaged_expert_is_named(device: Device) {
    // The first expert that the warm-up does not choose and some request does.
    for expert in 0..16 {
        let model = damaged(&format!("model.layers.2.mlp.experts.{expert}.down_proj.weight"));
        let outcome = serving(&model, true, device);
        let (failed, answered) = match outcome {
            Ok(serving) => failures(serving),
            Err(error) => {
                assert!(error.to_string().contains("layer 2"), "the warm-up is told too: {error}");
                continue;
            }
        };
        if failed.is_empty() {
            continue;
        }
        assert!(answered > 0, "expert {expert}: others go on being served");
        assert!(failed.iter().all(|said| said.contains("layer 2")), "{failed:?}");
        let (unchecked, others) = failures(serving(&model, false, device).unwrap());
        assert_eq!((unchecked.len(), others), (failed.len(), answered));
        assert!(unchecked.iter().all(|said| said.contains("not a number") && !said.contains("layer")));
        return;
    }
    panic!("every expert is chosen by the warm-up, or by no request");
}

#[test]
fn the_layer_of_a_damaged_expert_is_named_to_the_requests_that_chose_it() {
    a_damaged_expert_is_named(Device::Cpu);
}

#[test]
fn on_a_card_the_layer_of_a_damaged_expert_is_named_to_the_requests_that_chose_it() {
    if no_card() {
        return;
    }
    a_damaged_expert_is_named(Device::Cuda);
}

#[test]
fn a_damaged_embedding_is_named_by_the_warm_up() {
    for device in [Device::Cpu, Device::Cuda] {
        if device == Device::Cuda && no_card() {
            return;
        }
        let error = serving(&damaged("model.embed_tokens.weight"), true, device).err().unwrap();
        let named = error.to_string().contains("the embedding");
        assert!(matches!(error, Error::WarmUp { .. }) && named, "{device:?}: {error}");
    }
}
