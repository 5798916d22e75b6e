//! What a cluster answers is what the reference answers (transformers 5.23.0, float32): 30 conversations, through
//! the chat template, the tokenizer, gRPC, the scheduler and two tensor-parallel processes.

use std::process::Command;

use proto::v1::{ChatMessage, ChatPrompt, GenerateRequest, Response, generate_request};
use serde_json::Value;

use crate::support::{Cluster, demo, tokens};

/// The reference rounds its log-probabilities to 1e-6.
const LOGPROB_TOLERANCE: f64 = 2e-4;
/// A choice nearer than this may fall either way in another order of summation.
const MARGIN_MIN: f64 = 5e-4;

fn reference() -> Vec<Value> {
    let text = std::fs::read_to_string(demo().join("reference.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["cases"].as_array().unwrap().clone()
}

fn list<T: serde::de::DeserializeOwned>(case: &Value, key: &str) -> Vec<T> {
    serde_json::from_value(case[key].clone()).unwrap()
}

/// Tokens before the first choice the reference itself was not sure of.
fn sure(case: &Value) -> usize {
    let margins: Vec<f64> = list(case, "margin");
    margins.iter().position(|&margin| margin < MARGIN_MIN).unwrap_or(margins.len())
}

fn check(cluster: &Cluster) {
    let mut compared = 0;
    for (i, case) in reference().iter().enumerate() {
        let prompt: Vec<u32> = list(case, "prompt_ids");
        let (greedy, logprobs): (Vec<u32>, Vec<f64>) = (list(case, "greedy_ids"), list(case, "logprobs"));
        let mut request = tokens(&prompt, greedy.len() as u32);
        request.stopping.as_mut().unwrap().ignore_eos = false;
        request.response.as_mut().unwrap().logprobs = Some(0);
        let answer = cluster.generate(request).unwrap();
        let sure = sure(case);
        assert_eq!(answer.token_ids[..sure], greedy[..sure], "case {i}");
        for (at, (ours, theirs)) in answer.logprobs.iter().zip(&logprobs[..sure]).enumerate() {
            let off = (f64::from(ours.logprob) - theirs).abs();
            assert!(off <= LOGPROB_TOLERANCE, "case {i}, token {at}: log-probability off by {off:e}");
        }
        compared += sure;
    }
    assert!(compared > 500, "only {compared} tokens compared");
}

#[test]
fn one_rank_gives_the_references_tokens_and_log_probabilities() {
    check(&Cluster::up(&["--tensor-parallel=1"]));
}

#[test]
fn two_ranks_give_the_references_tokens_and_log_probabilities() {
    check(&Cluster::up(&["--tensor-parallel=2"]));
}

#[test]
fn two_ranks_with_whole_experts_give_the_references_tokens_and_log_probabilities() {
    check(&Cluster::up(&["--tensor-parallel=2", "--experts=expert"]));
}

#[test]
fn two_ranks_that_send_rows_to_their_experts_give_the_references_tokens_and_log_probabilities() {
    check(&Cluster::up(&["--tensor-parallel=2", "--experts=expert", "--dispatch=all-to-all"]));
}

#[test]
fn sub_groups_with_sequences_of_their_own_give_the_references_tokens_and_log_probabilities() {
    for tensor in ["--tensor-parallel=1", "--tensor-parallel=2"] {
        check(&Cluster::up(&[tensor, "--data-parallel=2", "--experts=expert"]));
    }
}

#[test]
fn four_ranks_with_copies_of_experts_where_a_file_says_give_the_references_tokens_and_log_probabilities() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("placement.json");
    let out = format!("--placement-out={}", file.display());
    let plan = [
        "plan",
        "--tensor-parallel=4",
        "--experts=expert",
        "--expert-load=zipf:3",
        "--expert-replicas=1",
        &out,
    ];
    let planned = Command::new(env!("CARGO_BIN_EXE_cohort")).args(plan).output().unwrap();
    assert!(planned.status.success(), "{planned:?}");
    let placement = format!("--expert-placement={}", file.display());
    for dispatch in ["--dispatch=replicated", "--dispatch=all-to-all"] {
        check(&Cluster::up(&["--tensor-parallel=4", "--experts=expert", dispatch, &placement]));
    }
}

#[test]
fn a_conversation_is_rendered_tokenized_answered_and_detokenized_as_the_reference_does() {
    let cluster = Cluster::up(&["--tensor-parallel=2"]);
    let mut asked = 0;
    for (i, case) in reference().iter().enumerate().filter(|(_, case)| case["tools"].is_null()) {
        let messages = case["messages"].as_array().unwrap().iter();
        let plain = |m: &Value| Some((m["role"].as_str()?.to_owned(), m["content"].as_str()?.to_owned()));
        let Some(messages) = messages.map(plain).collect::<Option<Vec<_>>>() else { continue };
        let greedy: Vec<u32> = list(case, "greedy_ids");
        if sure(case) < greedy.len()
            || case["messages"].as_array().unwrap().iter().any(|m| m["tool_calls"].is_array())
        {
            continue;
        }
        let messages = messages
            .into_iter()
            .map(|(role, content)| ChatMessage { role, content, ..ChatMessage::default() })
            .collect();
        let chat = ChatPrompt { messages, reasoning: case["reasoning"].as_bool(), ..ChatPrompt::default() };
        let request = GenerateRequest {
            prompt: Some(generate_request::Prompt::Chat(chat)),
            response: Some(Response { keep_special_tokens: true, ..Response::default() }),
            stopping: Some(proto::v1::Stopping {
                max_tokens: Some(greedy.len() as u32),
                ..Default::default()
            }),
            sampling: Some(proto::v1::Sampling { temperature: Some(0.0), ..Default::default() }),
            ..GenerateRequest::default()
        };
        let answer = cluster.generate(request).unwrap();
        assert_eq!(answer.prompt.unwrap().token_ids, list::<u32>(case, "prompt_ids"), "case {i}");
        let expected = case["text"].as_str().unwrap();
        // The stop token that ends an answer is not part of its text.
        let expected = expected.strip_suffix("<|END_OF_TURN_TOKEN|>").unwrap_or(expected);
        let text = answer.text.strip_suffix("<|END_OF_TURN_TOKEN|>").unwrap_or(&answer.text);
        assert_eq!(text, expected, "case {i}");
        asked += 1;
    }
    assert!(asked >= 10, "only {asked} conversations compared");
}
