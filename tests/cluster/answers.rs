//! Requests share the running batch without changing each other, stream as they go, and leave when they are done.

use std::time::Duration;

use futures::future::join_all;
use proto::v1::{FinishReason, GenerateRequest, Sampling, finish};
use tonic::{Code, Request};

use crate::support::{Cluster, cohort, tokens};

fn prompts(count: u32) -> Vec<Vec<u32>> {
    (0..count).map(|i| (0..1 + i * 7 % 40).map(|k| (k * 31 + i * 97) % 4000 + 20).collect()).collect()
}

fn sampled(ids: &[u32], max_tokens: u32, seed: u64) -> GenerateRequest {
    let mut request = tokens(ids, max_tokens);
    request.sampling = Some(Sampling {
        temperature: Some(0.9),
        top_k: Some(50),
        top_p: Some(0.95),
        min_p: Some(0.01),
        seed: Some(seed),
        ..Sampling::default()
    });
    request
}

#[test]
fn requests_in_one_batch_get_the_tokens_they_get_alone() {
    let cluster = Cluster::up(&["--tensor-parallel=2"]);
    let requests: Vec<GenerateRequest> =
        prompts(12).iter().zip(0..).map(|(ids, i)| sampled(ids, 10 + i * 3, u64::from(i))).collect();
    let alone: Vec<_> =
        requests.iter().map(|request| cluster.generate(request.clone()).unwrap().token_ids).collect();
    let client = cluster.client();
    let together = cluster.block_on(join_all(requests.into_iter().map(|request| {
        let mut client = client.clone();
        async move { client.generate_once(request).await.unwrap().into_inner().token_ids }
    })));
    assert_eq!(alone, together);
    assert!(alone.iter().zip(0_u32..).all(|(ids, i)| ids.len() as u32 == 10 + i * 3));
}

#[test]
fn a_seed_decides_and_no_seed_varies() {
    let cluster = Cluster::up(&["--tensor-parallel=1"]);
    let ask = |seed: Option<u64>| {
        let mut request = sampled(&[5, 700, 800], 24, 0);
        request.sampling.as_mut().unwrap().seed = seed;
        cluster.generate(request).unwrap().token_ids
    };
    assert_eq!(ask(Some(3)), ask(Some(3)));
    assert_ne!(ask(Some(3)), ask(Some(4)));
    assert_ne!(ask(None), ask(None));
}

#[test]
fn tokens_arrive_one_after_the_other_with_the_facts_at_both_ends() {
    let cluster = Cluster::up(&["--tensor-parallel=2"]);
    let mut client = cluster.client();
    let mut request = tokens(&[5, 600, 601], 40);
    request.response.as_mut().unwrap().prompt_logprobs = Some(2);
    let messages = cluster.block_on(async {
        let mut stream = client.generate(request).await.unwrap().into_inner();
        let mut messages = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            messages.push(message);
        }
        messages
    });
    assert!(messages.len() > 10, "{} messages for 40 tokens", messages.len());
    let prompt = messages[0].prompt.as_ref().unwrap();
    assert_eq!(prompt.token_ids, [5, 600, 601]);
    let known: Vec<Option<u32>> =
        prompt.logprobs.iter().map(|entry| entry.value.as_ref().map(|value| value.token_id)).collect();
    assert_eq!(known, [None, Some(600), Some(601)]);
    assert_eq!(messages.iter().map(|m| m.token_ids.len()).sum::<usize>(), 40);
    let last = messages.last().unwrap();
    assert_eq!(last.finish.clone().unwrap_or_default().reason(), FinishReason::Length);
    let usage = last.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.output_tokens), (3, 40));
}

#[test]
fn the_command_line_shows_several_answers_and_what_was_found_computed() {
    let cluster = Cluster::up(&["--tensor-parallel=1"]);
    let ids: Vec<String> = (100..140).map(|id: u32| id.to_string()).collect();
    let server = cluster.server();
    let ask = |flags: &[&str]| -> serde_json::Value {
        let base = [
            "generate",
            "--server",
            &server,
            "--token-ids",
            &ids.join(","),
            "--max-tokens=5",
            "--seed=1",
            "--json",
        ];
        let output = cohort(&[base.as_slice(), flags].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (first, second) = (ask(&[]), ask(&[]));
    assert_eq!(first["token_ids"], second["token_ids"]);
    let cached = |answer: &serde_json::Value| answer["usage"]["cached_tokens"].as_u64().unwrap();
    assert_eq!((cached(&first), cached(&second), cached(&ask(&["--bypass-prefix-cache"]))), (0, 32, 0));
    let several = ask(&["-n", "3", "--ignore-eos"]);
    assert_eq!(several["others"].as_array().unwrap().len(), 2);
    let one = ask(&["--logit-bias", "77=100", "--ignore-eos"]);
    assert_eq!(one["token_ids"], serde_json::json!([77, 77, 77, 77, 77]));
}

#[test]
fn a_stop_token_ends_an_answer_and_is_named() {
    let cluster = Cluster::up(&["--tensor-parallel=1"]);
    let free = cluster.generate(tokens(&[5, 600, 601], 20)).unwrap().token_ids;
    let mut request = tokens(&[5, 600, 601], 20);
    request.stopping.as_mut().unwrap().stop_token_ids = vec![free[4]];
    let stopped = cluster.generate(request).unwrap();
    let end = free.iter().position(|&id| id == free[4]).unwrap() + 1;
    assert_eq!(stopped.token_ids, free[..end]);
    let finish = stopped.finish.unwrap();
    assert_eq!(finish.reason(), FinishReason::Stop);
    assert_eq!(finish.matched, Some(finish::Matched::TokenId(free[4])));
}

/// One slot and one place in the queue: a request that does not leave keeps everybody else out.
#[test]
fn a_dropped_stream_and_a_deadline_free_their_place() {
    let cluster = Cluster::up(&["--tensor-parallel=2", "--running-max=1"]);
    let mut client = cluster.client();
    for _ in 0..3 {
        cluster.block_on(async {
            let mut stream = client.generate(tokens(&[5, 600], 2000)).await.unwrap().into_inner();
            stream.message().await.unwrap().unwrap();
        });
    }
    let mut late = Request::new(tokens(&[5, 600], 2000));
    late.set_timeout(Duration::from_millis(60));
    let status = cluster.block_on(async {
        let mut stream = match client.generate(late).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => return status,
        };
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("2000 tokens in 60 ms"),
                Err(status) => return status,
            }
        }
    });
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    // Four requests of 2000 tokens would keep this one slot for longer than that, did they not leave.
    let mut quick = Request::new(tokens(&[5, 600], 3));
    quick.set_timeout(Duration::from_secs(2));
    let answer = cluster.block_on(client.generate_once(quick)).unwrap().into_inner();
    assert_eq!(answer.token_ids.len(), 3);
}
