use std::collections::BTreeMap;

use proto::{v1, worker};
use router::{Config, Limits, QueueLimits};
use serde_json::json;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::http_client::{chat, complete};
use crate::support::{
    EOS, Leader, TestRouter, all, answer, chunk, config, demo_files, fields, from_text, ids, last, of, soon,
};

fn asking(n: u32) -> v1::GenerateRequest {
    let sampling = Some(v1::Sampling { n: Some(n), ..v1::Sampling::default() });
    v1::GenerateRequest { sampling, ..from_text("x") }
}

/// The text of each answer, by its index.
fn texts(messages: &[v1::GenerateResponse]) -> BTreeMap<u32, String> {
    let mut texts: BTreeMap<u32, String> = BTreeMap::new();
    for message in messages {
        texts.entry(message.index).or_default().push_str(&message.text);
    }
    texts
}

#[tokio::test]
async fn answers_come_mixed_in_one_stream_and_each_is_whole() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let call = tokio::spawn(async move { all(&router, asking(2)).await });
    let open = leader.next().await;
    assert_eq!(open.sequences(), 2);
    // The bytes of one character come in between those of the other's.
    let (one, two) = (answer("漢字 one"), answer("Grüße two"));
    for index in 0..one.len().max(two.len()) {
        let of = [one.get(index).map(|c| of(0, c.clone())), two.get(index).map(|c| of(1, c.clone()))];
        open.play(of.into_iter().flatten().collect()).await;
    }
    let messages = soon(call).await.unwrap().unwrap();
    assert_eq!(texts(&messages), [(0, "漢字 one".to_owned()), (1, "Grüße two".to_owned())].into());
    assert_eq!(messages.iter().filter(|message| message.prompt.is_some()).count(), 1);
    assert!(messages[0].prompt.is_some());
    let ends: Vec<_> = messages.iter().filter(|message| message.finish.is_some()).collect();
    assert_eq!(ends.len(), 2);
    assert!(ends.iter().all(|end| end.usage.is_some()));
    assert!(messages.last().unwrap().finish.is_some());
}

#[tokio::test]
async fn all_at_once_the_first_holds_the_others() {
    let leader = Leader::serving().await.play_always(answer("ok"));
    let router = TestRouter::ready(&[&leader]).await;
    let whole = soon(router.client().await.generate_once(asking(3))).await.unwrap().into_inner();
    assert_eq!((whole.text.as_str(), whole.others.len()), ("ok", 2));
    assert!(whole.others.iter().all(|one| one.text == "ok" && one.finish.is_some() && one.prompt.is_none()));
}

#[tokio::test]
async fn a_stop_string_ends_one_answer_and_the_others_go_on() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let stopping = Some(v1::Stopping { stop: vec!["STOP".to_owned()], ..v1::Stopping::default() });
    let request = v1::GenerateRequest { stopping, ..asking(2) };
    let call = tokio::spawn(async move { all(&router, request).await });
    let open = leader.next().await;
    let early: Vec<_> = ids("one STOP and more").iter().map(|&id| chunk(&[id])).collect();
    open.play(early).await;
    let cancelled = soon(leader.cancelled.recv()).await.unwrap();
    assert_eq!(cancelled, worker::CancelRequest { key: open.request.key, index: 0 });
    open.play(answer("two").into_iter().map(|chunk| of(1, chunk)).collect()).await;
    soon(open.chunks.closed()).await;
    assert!(leader.cancelled.try_recv().is_err(), "the end of the stream is the cancel of the last");
    let messages = soon(call).await.unwrap().unwrap();
    assert_eq!(texts(&messages), [(0, "one ".to_owned()), (1, "two".to_owned())].into());
}

#[tokio::test]
async fn cached_tokens_are_in_the_usage() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let more = json!({ "n": 2, "stop": "STOP" });
    let (open, answered) = tokio::join!(
        async {
            let open = leader.next().await;
            let found = |tokens, of| worker::GenerateChunk { cached_tokens: Some(tokens), ..of };
            open.play(vec![found(2, chunk(&ids("<|END_THINKING|>")))]).await;
            // A stop string ends it before the leader says the last word.
            open.play(ids("STOP").iter().map(|&id| chunk(&[id])).collect()).await;
            let end = last(&[EOS], worker::FinishReason::Eos, Some(EOS));
            open.play(vec![of(1, found(5, end))]).await;
            open
        },
        chat(&router, "Hi", more)
    );
    drop(open);
    let usage = &answered.json()["usage"];
    assert_eq!(usage["prompt_tokens_details"], json!({ "cached_tokens": 2 }), "{usage}");
}

#[tokio::test]
async fn each_answer_takes_a_place() {
    let mut leader = Leader::serving().await;
    let limits = Limits { requests_max: 3, queue: QueueLimits::NONE, ..Limits::default() };
    let router = TestRouter::start(Config { limits, ..config(&[&leader.address]) }, demo_files()).await;
    router.wait_for(ServingStatus::Serving).await;
    assert_eq!(fields(&all(&router, asking(4)).await.unwrap_err()), ["sampling.n"]);
    let held = soon(router.client().await.generate(asking(2))).await.unwrap();
    let open = leader.next().await;
    let status = all(&router, asking(2)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    drop(held);
    soon(open.chunks.closed()).await;
    let call = tokio::spawn(async move { all(&router, asking(3)).await });
    let open = leader.next().await;
    for index in 0..3 {
        open.play(answer("x").into_iter().map(|chunk| of(index, chunk)).collect()).await;
    }
    assert_eq!(texts(&soon(call).await.unwrap().unwrap()).len(), 3);
}

#[tokio::test]
async fn a_sequence_nobody_asked_for_is_a_broken_leader() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let call = tokio::spawn(async move { all(&router, asking(2)).await });
    let open = leader.next().await;
    open.play(vec![of(2, chunk(&[300]))]).await;
    assert_eq!(soon(call).await.unwrap().unwrap_err().code(), Code::Internal);
}

#[tokio::test]
async fn the_best_of_several_are_shown_the_likeliest_first() {
    let likely = |index: u32, text: &str, logprob: f32| {
        let tokens = ids(text);
        let logprobs = tokens.iter().map(|&token_id| worker::TokenLogprob { token_id, logprob, top: vec![] });
        let logprobs = logprobs.collect();
        of(index, worker::GenerateChunk { logprobs, ..last(&tokens, worker::FinishReason::Length, None) })
    };
    let script = vec![likely(0, "worst", -3.0), likely(1, "best of all", -0.5), likely(2, "good", -1.0)];
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let asked = json!({ "n": 2, "best_of": 3 });
    let (answer, ()) = tokio::join!(complete(&router, json!("x"), asked), async {
        leader.next().await.play(script).await;
    });
    let answer = answer.json();
    let choices = answer["choices"].as_array().unwrap();
    let texts: Vec<&str> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["best of all", "good"]);
    assert!(
        choices.iter().zip(0..).all(|(choice, at)| choice["index"] == at && choice["logprobs"].is_null())
    );
    let tokens = ids("worst").len() + ids("best of all").len() + ids("good").len();
    assert_eq!(answer["usage"]["completion_tokens"], json!(tokens));
    for (more, why) in [
        (json!({ "n": 3, "best_of": 2 }), "at least n"),
        (json!({ "best_of": 2, "stream": true }), "streams"),
    ] {
        let refused = complete(&router, json!("x"), more).await;
        assert_eq!((refused.code, refused.refusal().0.as_deref()), (400, Some("best_of")));
        assert!(refused.refusal().1.contains(why), "{}", refused.body);
    }
}
