//! Models of seeded random weights: a `config.json` is enough to serve token ids, in groups of any size.

use std::fs;

use proto::v1::{GenerateRequest, generate_request};
use tonic::Code;

use crate::support::{Cluster, demo, ended, root, tokens};

/// The shape of a golden checkpoint, with no weights and no tokenizer.
fn shape() -> tempfile::TempDir {
    let shape = tempfile::tempdir().unwrap();
    fs::copy(root().join("tests/golden/north/config.json"), shape.path().join("config.json")).unwrap();
    shape
}

#[test]
fn one_rank_and_two_of_a_dummy_model_say_the_same() {
    let shape = shape();
    let model = format!("--model={}", shape.path().display());
    let said = |ranks: &str| {
        let cluster = Cluster::up(&["--load-format=dummy", &model, ranks, "--threads=1"]);
        let answer = |ids: &[u32]| cluster.generate(tokens(ids, 12)).unwrap().token_ids.clone();
        [answer(&[1, 2, 3]), answer(&[40; 20])]
    };
    let alone = said("--tensor-parallel=1");
    assert!(alone.iter().all(|answer| answer.len() == 12), "{alone:?}");
    assert_eq!(alone, said("--tensor-parallel=2"));
}

#[test]
fn without_a_tokenizer_text_is_refused_and_token_ids_are_served() {
    let shape = shape();
    let model = format!("--model={}", shape.path().display());
    let cluster = Cluster::up(&["--load-format=dummy", &model, "--layers=2"]);
    let prompt = Some(generate_request::Prompt::Text("x".to_owned()));
    let status = cluster.generate(GenerateRequest { prompt, ..GenerateRequest::default() }).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("tokenizer"), "{}", status.message());
    assert_eq!(cluster.generate(tokens(&[5], 3)).unwrap().token_ids.len(), 3);
}

#[test]
fn what_dummy_weights_cannot_be_made_for_is_refused() {
    let demo = format!("--model={}", demo().display());
    let table: &[(&[&str], &[&str])] = &[
        (&["--preset=north-mini-code"], &["model.preset", "model.load_format"]),
        (&["--layers=2"], &["model.layers", "model.load_format"]),
        (&["--load-format=dummy", "--layers=99"], &["99 layers"]),
        (&["--load-format=dummy", "--layers=0"], &["model.layers", "between 1 and"]),
        (&["--load-format=dummy", "--preset=north-mini-code", &demo], &["--preset", "--model"]),
        (&["--load-format=zeros"], &["checkpoint", "dummy"]),
    ];
    for (flags, names) in table {
        let mut args = vec!["up", "--grpc-listen=127.0.0.1:0", "--http-listen=off", "--device=cpu"];
        args.extend(*flags);
        let (status, said) = ended(&args);
        assert!(!status.success(), "{flags:?} was accepted: {said}");
        for name in *names {
            assert!(said.contains(name), "{flags:?}: no `{name}` in: {said}");
        }
    }
}
