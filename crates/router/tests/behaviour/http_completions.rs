use proto::worker;
use serde_json::json;

use crate::http_client::complete;
use crate::support::{Leader, TestRouter, answer, ids, last, soon};

async fn router_that_says(text: &str) -> TestRouter {
    let leader = Leader::serving().await.play_always(answer(text));
    TestRouter::ready(&[&leader]).await
}

#[tokio::test]
async fn a_text_is_continued() {
    let router = router_that_says(" there").await;
    let body = complete(&router, json!("Hello"), json!({ "model": "demo" })).await.json();
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["choices"][0]["text"], " there");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["usage"]["prompt_tokens"], json!(1 + ids("Hello").len()));
}

#[tokio::test]
async fn every_form_of_prompt_is_taken() {
    let router = router_that_says("!").await;
    let cases = [(json!("a"), 1), (json!(["a", "b"]), 2), (json!([5, 8]), 1), (json!([[5], [8, 9]]), 2)];
    for (prompt, prompts) in cases {
        let body = complete(&router, prompt.clone(), json!({ "n": 2 })).await.json();
        let choices = body["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * prompts, "{prompt}");
        assert!(choices.iter().enumerate().all(|(index, choice)| choice["index"] == json!(index)));
    }
}

#[tokio::test]
async fn sixteen_tokens_are_generated_unless_the_caller_says_otherwise() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    for (more, expected) in [(json!({}), 16), (json!({ "max_tokens": 3 }), 3)] {
        let (open, _) = tokio::join!(
            async {
                let open = leader.next().await;
                open.play(answer("x")).await;
                open
            },
            complete(&router, json!("Hi"), more)
        );
        assert_eq!(open.request.generation.unwrap().max_tokens, Some(expected));
    }
}

#[tokio::test]
async fn completions_stream() {
    let router = router_that_says("One, two").await;
    let answer = complete(&router, json!(["a", "b"]), json!({ "stream": true })).await;
    let events = answer.events();
    for index in 0..2 {
        let of_choice =
            events.iter().map(|event| &event["choices"][0]).filter(|c| c["index"] == json!(index));
        assert_eq!(of_choice.clone().map(|c| c["text"].as_str().unwrap()).collect::<String>(), "One, two");
        assert_eq!(of_choice.filter(|c| c["finish_reason"] == "stop").count(), 1);
    }
    assert!(events.iter().all(|event| event.get("usage").is_none()));
}

#[tokio::test]
async fn log_probabilities_have_the_older_form() {
    let tokens = ids("Hello you");
    let top = vec![worker::Alternative { token_id: tokens[0], logprob: -0.25 }];
    let logprobs =
        tokens.iter().map(|&token_id| worker::TokenLogprob { token_id, logprob: -0.5, top: top.clone() });
    let script = vec![worker::GenerateChunk {
        logprobs: logprobs.collect(),
        prompt_logprobs: vec![
            worker::PromptLogprob { value: None },
            worker::PromptLogprob {
                value: Some(worker::TokenLogprob { token_id: 7, logprob: -2.0, top: Vec::new() }),
            },
        ],
        ..last(&tokens, worker::FinishReason::Length, None)
    }];
    let leader = Leader::serving().await.play_always(script);
    let router = TestRouter::ready(&[&leader]).await;
    let more = json!({ "logprobs": 1, "prompt_logprobs": 0 });
    let body = soon(complete(&router, json!([5, 7]), more)).await.json();
    let logprobs = &body["choices"][0]["logprobs"];
    let texts: Vec<&str> =
        logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(texts.concat(), "Hello you");
    assert_eq!(logprobs["text_offset"][1], json!(texts[0].len()));
    assert_eq!(logprobs["top_logprobs"][0][texts[0]], json!(-0.25));
    assert_eq!(body["prompt_logprobs"][0], json!(null));
    assert_eq!(body["prompt_logprobs"][1]["7"]["logprob"], json!(-2.0));
}
