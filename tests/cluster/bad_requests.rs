//! Bad requests get their status with the field in it, and the cluster goes on serving others.

use proto::v1::{GenerateRequest, Sampling, generate_request};
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{Cluster, demo, tokens};

type Change = fn(&mut GenerateRequest);

fn sampling(request: &mut GenerateRequest) -> &mut Sampling {
    request.sampling.as_mut().unwrap()
}

const BAD: &[(&str, Code, &str, Change)] = &[
    ("no prompt", Code::InvalidArgument, "prompt", |r| r.prompt = None),
    ("empty text", Code::InvalidArgument, "text", |r| {
        r.prompt = Some(generate_request::Prompt::Text(String::new()))
    }),
    ("no tokens", Code::InvalidArgument, "token_ids", |r| *r = tokens(&[], 4)),
    ("a token beyond the vocabulary", Code::InvalidArgument, "token_ids", |r| *r = tokens(&[5, 4096], 4)),
    ("a prompt longer than the model", Code::OutOfRange, "", |r| *r = tokens(&[5; 3000], 4)),
    ("NaN temperature", Code::InvalidArgument, "sampling.temperature", |r| {
        sampling(r).temperature = Some(f32::NAN)
    }),
    ("NaN top_p", Code::InvalidArgument, "sampling.top_p", |r| sampling(r).top_p = Some(f32::NAN)),
    ("NaN min_p", Code::InvalidArgument, "sampling.min_p", |r| sampling(r).min_p = Some(f32::NAN)),
    ("max_tokens 0", Code::InvalidArgument, "stopping.max_tokens", |r| {
        r.stopping.as_mut().unwrap().max_tokens = Some(0);
    }),
    ("min above max", Code::InvalidArgument, "stopping.min_tokens", |r| {
        r.stopping.as_mut().unwrap().min_tokens = Some(99);
    }),
    ("too many alternatives", Code::InvalidArgument, "response.logprobs", |r| {
        r.response.as_mut().unwrap().logprobs = Some(100_000);
    }),
    ("an empty stop string", Code::InvalidArgument, "stopping.stop[0]", |r| {
        r.stopping.as_mut().unwrap().stop = vec![String::new()];
    }),
    ("another model", Code::NotFound, "", |r| r.model = "gpt-2".into()),
];

#[test]
fn each_bad_request_is_refused_by_its_field_and_others_are_served() {
    let cluster = Cluster::up(&["--tensor-parallel=2"]);
    let good = cluster.generate(tokens(&[5, 600], 4)).unwrap().token_ids;
    for (what, code, field, change) in BAD {
        let mut request = tokens(&[5, 600], 4);
        change(&mut request);
        let status = cluster.generate(request).unwrap_err();
        assert_eq!(status.code(), *code, "{what}: {status:?}");
        let details = status.get_error_details();
        assert!(details.error_info().is_some(), "{what}: no ErrorInfo");
        if !field.is_empty() {
            let violations =
                &details.bad_request().unwrap_or_else(|| panic!("{what}: {status:?}")).field_violations;
            let named = violations.iter().any(|v| v.field.contains(field));
            assert!(named, "{what}: {violations:?}");
        }
        assert_eq!(cluster.generate(tokens(&[5, 600], 4)).unwrap().token_ids, good, "after {what}");
    }
}

#[test]
fn a_checkpoint_without_a_tokenizer_serves_token_ids_only() {
    let model = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        std::fs::copy(demo().join(file), model.path().join(file)).unwrap();
    }
    let path = format!("--model={}", model.path().display());
    let cluster = Cluster::up(&["--tensor-parallel=2", &path]);
    let answer = cluster.generate(tokens(&[5, 600], 4)).unwrap();
    assert_eq!((answer.token_ids.len(), answer.text.as_str()), (4, ""));
    let mut request = tokens(&[5], 4);
    request.prompt = Some(generate_request::Prompt::Text("hello".into()));
    let status = cluster.generate(request).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("tokenizer"), "{status:?}");
}

#[test]
fn a_cache_smaller_than_the_context_is_the_context() {
    let cluster = Cluster::up(&["--tensor-parallel=1", "--kv-tokens=100"]);
    let mut client = cluster.client();
    let info =
        cluster.block_on(client.get_model_info(proto::v1::GetModelInfoRequest {})).unwrap().into_inner();
    assert_eq!(info.context_tokens_max, 112, "100 tokens are seven blocks of 16");
    let mut request = tokens(&[5, 600], 1);
    request.stopping.as_mut().unwrap().max_tokens = None;
    assert_eq!(cluster.generate(request).unwrap().token_ids.len(), 110);
    let status = cluster.generate(tokens(&[5; 112], 1)).unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
}

#[test]
fn token_ids_beyond_the_vocabulary_are_not_detokenized() {
    let cluster = Cluster::up(&["--tensor-parallel=1"]);
    let mut client = cluster.client();
    let request = proto::v1::DetokenizeRequest { token_ids: vec![5, 4096], keep_special_tokens: false };
    let status = cluster.block_on(client.detokenize(request)).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("token_ids[1]"), "{status:?}");
}
