use proto::{Failure, Violation, v1, worker};
use serde_json::json;
use types::TokenId;

use crate::http_client::chat;
use crate::support::{
    Leader, Open, TestRouter, all, answer, demo_tokenizer, fields, from_ids, from_text, ids,
};

/// What a leader is asked for by a gRPC request.
async fn asked(request: v1::GenerateRequest) -> worker::GenerateRequest {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let (open, answered) = tokio::join!(play(&mut leader), all(&router, request));
    answered.unwrap();
    open.request
}

async fn play(leader: &mut Leader) -> Open {
    let open = leader.next().await;
    open.play(answer("<|END_THINKING|>ok")).await;
    open
}

fn sampling() -> v1::Sampling {
    v1::Sampling {
        presence_penalty: Some(0.5),
        frequency_penalty: Some(-0.5),
        repetition_penalty: Some(1.5),
        min_p: Some(0.25),
        logit_bias: [(5, -1.0), (300, 2.0)].into(),
        allowed_token_ids: vec![5, 300, 301],
        bad_words: vec!["the end".to_owned()],
        ..v1::Sampling::default()
    }
}

fn check(request: &worker::GenerateRequest) {
    let generation = request.generation.as_ref().unwrap();
    assert_eq!(generation.presence_penalty, Some(0.5));
    assert_eq!(generation.frequency_penalty, Some(-0.5));
    assert_eq!(generation.repetition_penalty, Some(1.5));
    assert_eq!(generation.min_p, Some(0.25));
    assert_eq!(generation.logit_bias, [(5, -1.0), (300, 2.0)].into());
    assert_eq!(generation.allowed_token_ids, [5, 300, 301]);
    let mut words: Vec<&[u32]> = generation.bad_words.iter().map(|word| word.ids.as_slice()).collect();
    words.sort_unstable();
    let (bare, spaced) = (ids("the end"), ids(" the end"));
    let mut expected = [bare.as_slice(), spaced.as_slice()];
    expected.sort_unstable();
    assert_eq!(words, expected);
    assert_eq!(request.priority, -7, "the lowest number goes first for callers, the highest for the engine");
    assert_eq!(request.cache_salt.len(), 16);
}

#[tokio::test]
async fn every_field_of_grpc_reaches_the_leader() {
    let request = v1::GenerateRequest {
        sampling: Some(sampling()),
        priority: 7,
        cache_salt: "tenant a".to_owned(),
        ..from_ids(&[5, 6])
    };
    let request = asked(request).await;
    check(&request);
    let open = asked(from_ids(&[5, 6])).await;
    assert!(open.cache_salt.is_empty() && !open.bypass_prefix_cache && open.priority == 0);
    let bypass = asked(v1::GenerateRequest { bypass_prefix_cache: true, ..from_ids(&[5]) }).await;
    assert!(bypass.bypass_prefix_cache && bypass.resume_tokens.is_empty());
    let salted = |salt: &str| asked(v1::GenerateRequest { cache_salt: salt.to_owned(), ..from_ids(&[5, 6]) });
    assert_eq!(salted("tenant a").await.cache_salt, request.cache_salt);
    assert_ne!(salted("tenant b").await.cache_salt, request.cache_salt);
}

#[tokio::test]
async fn every_field_of_http_reaches_the_leader() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let more = json!({
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5, "min_p": 0.25,
        "logit_bias": { "300": 2, "5": -1.0 }, "allowed_token_ids": [5, 300, 301], "bad_words": ["the end"],
        "priority": 7, "cache_salt": "tenant a",
    });
    let (open, answered) = tokio::join!(play(&mut leader), chat(&router, "Hi", more));
    assert_eq!(answered.code, 200, "{}", answered.body);
    check(&open.request);
    let more = json!({ "bypass_prefix_cache": true });
    let (open, _) = tokio::join!(play(&mut leader), chat(&router, "Hi", more));
    assert!(open.request.bypass_prefix_cache);
}

#[tokio::test]
async fn a_bad_word_that_begins_with_a_space_is_the_same_word() {
    let words = |word: &str| {
        let sampling = v1::Sampling { bad_words: vec![word.to_owned()], ..v1::Sampling::default() };
        asked(v1::GenerateRequest { sampling: Some(sampling), ..from_ids(&[5]) })
    };
    let spaced = words("  end").await.generation.unwrap().bad_words;
    assert_eq!(spaced, words("end").await.generation.unwrap().bad_words);
    let tokenizer = demo_tokenizer();
    let text = |word: &worker::TokenIds| {
        tokenizer.decode(&word.ids.iter().copied().map(TokenId).collect::<Vec<_>>(), true)
    };
    let mut texts: Vec<String> = spaced.iter().map(text).collect();
    texts.sort_unstable();
    assert_eq!(texts, [" end", "end"]);
    assert!(!words(" ").await.generation.unwrap().bad_words.is_empty());
}

#[tokio::test]
async fn wrong_fields_are_named_as_grpc_names_them() {
    let leader = Leader::serving().await.play_always(answer("ok"));
    let router = TestRouter::ready(&[&leader]).await;
    let wrong = v1::Sampling {
        presence_penalty: Some(f32::NAN),
        n: Some(129),
        logit_bias: [(4096, 0.0)].into(),
        bad_words: vec![String::new()],
        ..v1::Sampling::default()
    };
    let request = v1::GenerateRequest {
        sampling: Some(wrong),
        priority: -101,
        cache_salt: "s".to_owned(),
        bypass_prefix_cache: true,
        ..from_text("x")
    };
    let expected = [
        "sampling.presence_penalty",
        "sampling.n",
        "sampling.logit_bias",
        "sampling.bad_words[0]",
        "priority",
        "cache_salt",
    ];
    assert_eq!(fields(&all(&router, request).await.unwrap_err()), expected);
}

#[tokio::test]
async fn what_only_the_leader_can_refuse_is_named_for_the_caller() {
    let leader = Leader::serving().await;
    leader.refuse(Failure::Invalid(vec![
        Violation::new("generation.min_tokens", "all of allowed_token_ids end the sequence"),
        Violation::new("generation.n", "asks for more sequences than may wait at once, 1"),
    ]));
    let router = TestRouter::ready(&[&leader.address]).await;
    let status = all(&router, from_text("x")).await.unwrap_err();
    assert_eq!(fields(&status), ["stopping.min_tokens", "sampling.n"]);
    assert_eq!(chat(&router, "Hi", json!({})).await.refusal().0.unwrap(), "min_tokens");
}
