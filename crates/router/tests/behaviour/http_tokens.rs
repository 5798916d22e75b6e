use serde_json::json;

use crate::http_client::post;
use crate::support::{CONTEXT, Leader, TestRouter, ids};

#[tokio::test]
async fn texts_and_conversations_become_tokens_and_text_again() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut tokens = vec![5];
    tokens.extend(ids("Hello you"));
    let body = json!({ "model": "demo", "prompt": "Hello you", "return_token_strs": true });
    let answer = post(&router, "/tokenize", &body).await.json();
    assert_eq!(answer["tokens"], json!(tokens));
    assert_eq!((&answer["count"], &answer["max_model_len"]), (&json!(tokens.len()), &json!(CONTEXT)));
    assert_eq!(answer["token_strs"][0], "<BOS_TOKEN>");
    let text = post(&router, "/detokenize", &json!({ "tokens": tokens })).await.json();
    assert_eq!(text["prompt"], "<BOS_TOKEN>Hello you");

    let chat = json!({ "messages": [{ "role": "user", "content": "Hi" }], "reasoning_effort": "none" });
    let answer = post(&router, "/tokenize", &chat).await.json();
    let text = post(&router, "/detokenize", &json!({ "tokens": answer["tokens"] })).await.json();
    let rendered = "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>\
                    <|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>";
    assert_eq!(text["prompt"], rendered);
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_by_its_field() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let cases = [
        ("/tokenize", json!({ "prompt": "x", "add_special_tokens": false }), "add_special_tokens"),
        ("/tokenize", json!({ "prompt": "x", "model": "gpt" }), "model"),
        ("/tokenize", json!({ "prompt": 7 }), "prompt"),
        ("/tokenize", json!({}), "messages"),
        ("/detokenize", json!({ "tokens": [1, 4096] }), "tokens[1]"),
        ("/detokenize", json!({ "tokens": [-1] }), "tokens"),
        ("/detokenize", json!({ "tokens": [1], "colour": 1 }), "colour"),
    ];
    for (path, body, field) in cases {
        assert_eq!(post(&router, path, &body).await.refusal().0.as_deref(), Some(field), "{body}");
    }
}
