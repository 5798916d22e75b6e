use proto::worker;
use serde_json::{Value, json};

use crate::http_client::{chat, chat_body, receive, send};
use crate::support::{
    EOS, Leader, TestRouter, answer, chunk, demo_tokenizer, facts, ids, last, of, soon, state,
};

const THOUGHT: &str = "Hm.<|END_THINKING|>";
const CALL: &str = "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"get_weather\", \"parameters\": \
    {\"city\": \"Paris\"}}\n]<|END_ACTION|>";

fn weather() -> Value {
    let parameters = json!({ "type": "object", "properties": { "city": { "type": "string" } } });
    json!([{ "type": "function", "function": { "name": "get_weather", "parameters": parameters } }])
}

/// With room for tool definitions.
async fn leader() -> Leader {
    let facts = worker::ModelFacts { context_tokens_max: 4096, ..facts("demo") };
    Leader::start(state(proto::Phase::Serving, 100, Some(facts))).await
}

async fn router_that_says(text: &str) -> TestRouter {
    let leader = leader().await.play_always(answer(text));
    TestRouter::ready(&[&leader]).await
}

#[tokio::test]
async fn a_chat_is_answered_with_its_reasoning_and_usage() {
    let said = format!("{THOUGHT}<|START_TEXT|>Hello!<|END_TEXT|>");
    let router = router_that_says(&said).await;
    let answer = chat(&router, "Hi", json!({ "user": "somebody" })).await;
    assert_eq!(answer.code, 200, "{}", answer.body);
    let body = answer.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "demo");
    assert_eq!(body["choices"].as_array().unwrap().len(), 1);
    let choice = &body["choices"][0];
    let message = json!({ "role": "assistant", "content": "Hello!", "reasoning": "Hm.", "refusal": null });
    assert_eq!((&choice["message"], &choice["finish_reason"]), (&message, &json!("stop")));
    assert_eq!(choice["stop_reason"], Value::Null);
    let (output, thought) = (ids(&said).len() + 1, ids(THOUGHT).len());
    let usage = &body["usage"];
    assert_eq!(usage["completion_tokens"], json!(output));
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], json!(thought));
    let total = usage["prompt_tokens"].as_u64().unwrap() + output as u64;
    assert_eq!(usage["total_tokens"], json!(total));
    let id = answer.header("x-request-id").unwrap();
    assert_eq!(body["id"], json!(format!("chatcmpl-{id}")));
    assert!(body["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
}

#[tokio::test]
async fn a_stream_has_the_same_answer_in_pieces() {
    let router = router_that_says(&format!("{THOUGHT}<|START_TEXT|>Grüße, 漢字!<|END_TEXT|>")).await;
    let options = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let answer = chat(&router, "Hi", options).await;
    assert_eq!(answer.code, 200, "{}", answer.body);
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let mut events = answer.events();
    let usage = events.pop().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert!(usage["usage"]["completion_tokens"].as_u64().unwrap() > 0);
    assert!(
        events.iter().all(|event| event["object"] == "chat.completion.chunk" && event["usage"].is_null())
    );
    assert_eq!(events[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    let all = |field: &str| -> String {
        events.iter().filter_map(|event| event["choices"][0]["delta"][field].as_str()).collect()
    };
    assert_eq!((all("content").as_str(), all("reasoning").as_str()), ("Grüße, 漢字!", "Hm."));
    let (end, before) = events.split_last().unwrap();
    assert_eq!(end["choices"][0]["finish_reason"], "stop");
    assert!(before.iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
}

#[tokio::test]
async fn tool_calls_are_given_in_openais_form() {
    let router = router_that_says(&format!("{THOUGHT}{CALL}")).await;
    let asked = json!({ "tools": weather(), "tool_choice": "auto", "parallel_tool_calls": true });
    let body = chat(&router, "Weather?", asked).await.json();
    let choice = &body["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &Value::Null)
    );
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({ "name": "get_weather", "arguments": "{\"city\": \"Paris\"}" }));
    assert_eq!(call["type"], "function");

    let streamed = chat(&router, "Weather?", json!({ "tools": weather(), "stream": true })).await.events();
    let deltas: Vec<&Value> =
        streamed.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"].get(0)).collect();
    assert!(deltas.len() > 3, "{deltas:?}");
    assert!(deltas[0]["id"].as_str().unwrap().starts_with("call_"));
    assert_eq!(deltas[0]["function"]["name"], "get_weather");
    let arguments: String = deltas.iter().filter_map(|d| d["function"]["arguments"].as_str()).collect();
    assert_eq!(arguments, "{\"city\": \"Paris\"}");
    assert_eq!(streamed.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn a_conversation_goes_back_to_the_model_whole() {
    let mut leader = leader().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let messages = json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": [{ "type": "text", "text": "Weather " }, { "type": "text", "text": "in Paris?" }] },
        { "role": "assistant", "content": null, "reasoning": "I look.", "refusal": null, "audio": null,
          "tool_calls": [{ "id": "call_7", "type": "function",
                           "function": { "name": "get_weather", "arguments": "{\"city\":\"Paris\"}" } }] },
        { "role": "tool", "tool_call_id": "call_7", "content": "{\"temperature\": 21}" },
    ]);
    // The order of keys is kept, here and by the router: the model was trained on one.
    let tools = r#"[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "a": 1}}}]"#;
    let body = format!(r#"{{"messages": {messages}, "tools": {tools}, "reasoning_effort": "none"}}"#);
    let connection = send(&router, "/v1/chat/completions", "", body.as_bytes()).await;
    let open = leader.next().await;
    let prompt: Vec<types::TokenId> = open.request.prompt.iter().map(|&id| types::TokenId(id)).collect();
    let rendered = demo_tokenizer().decode(&prompt, true);
    for part in [
        "Be brief.\nAvailable tools:\n[{\"name\": \"get_weather\", \"parameters\": {\"type\": \"object\", \"a\": 1}}]",
        "Weather in Paris?",
        "<|START_THINKING|>I look.<|END_THINKING|><|START_ACTION|>",
        "\"tool_name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}",
        "<|START_TOOL_RESULT|>",
        "{\"temperature\": 21}",
    ] {
        assert!(rendered.contains(part), "{part} is not in {rendered}");
    }
    assert!(rendered.ends_with("<|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>"), "{rendered}");
    open.play(answer("<|START_TEXT|>21 degrees.<|END_TEXT|>")).await;
    let answer = receive(connection).await;
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "21 degrees.");
}

#[tokio::test]
async fn without_tools_to_call_a_call_is_content() {
    let router = router_that_says(&format!("{THOUGHT}{CALL}")).await;
    let body = chat(&router, "Weather?", json!({ "tools": weather(), "tool_choice": "none" })).await.json();
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    assert!(choice["message"]["content"].as_str().unwrap().contains("get_weather"));
    assert_eq!(choice["message"].get("tool_calls"), None);
}

#[tokio::test]
async fn several_answers_are_one_request_to_one_leader() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let call = tokio::spawn(async move { chat(&router, "Hi", json!({ "n": 3, "seed": -1 })).await });
    let open = leader.next().await;
    let generation = open.request.generation.as_ref().unwrap();
    assert_eq!((generation.n, generation.seed), (Some(3), Some(u64::MAX)));
    let scripts = [0, 2, 1].map(|index| (index, answer(&format!("<|END_THINKING|>{index}"))));
    for (index, script) in scripts {
        let script = script.into_iter().map(|chunk| of(index, chunk)).collect();
        open.play(script).await;
    }
    let body = soon(call).await.unwrap().json();
    let choices = body["choices"].as_array().unwrap();
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(
            (&choice["index"], choice["message"]["content"].as_str()),
            (&json!(index), Some(["0", "1", "2"][index]))
        );
    }
    assert_eq!(choices.len(), 3);
    let prompt = body["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(prompt < 20, "the prompt counts once, not {prompt}");
    assert!(leader.opened.try_recv().is_err());
}

#[tokio::test]
async fn log_probabilities_come_with_texts_and_bytes() {
    let token = ids("Hello")[0];
    let top = vec![worker::Alternative { token_id: EOS, logprob: -1.5 }];
    let logprob = worker::TokenLogprob { token_id: token, logprob: -0.5, top };
    let script = vec![
        chunk(&ids("<|END_THINKING|>")),
        worker::GenerateChunk {
            logprobs: vec![logprob],
            ..last(&[token], worker::FinishReason::Length, None)
        },
    ];
    let leader = Leader::serving().await.play_always(script);
    let router = TestRouter::ready(&[&leader]).await;
    let body = chat(&router, "Hi", json!({ "logprobs": true, "top_logprobs": 1 })).await.json();
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    let position = &choice["logprobs"]["content"][0];
    let text = position["token"].as_str().unwrap();
    assert_eq!(position["bytes"], json!(text.as_bytes()));
    assert_eq!(position["logprob"], json!(-0.5));
    assert_eq!(position["top_logprobs"][0]["token"], "<|END_OF_TURN_TOKEN|>");
}

#[tokio::test]
async fn what_stopped_an_answer_is_named_and_shown_on_request() {
    let router = router_that_says("<|END_THINKING|>One, two, three.").await;
    let body = chat(&router, "Count", json!({ "stop": ", th" })).await.json();
    let choice = &body["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["stop_reason"]), (&json!("One, two"), &json!(", th")));
    let shown = json!({ "stop": [", th"], "include_stop_str_in_output": true, "return_token_ids": true });
    let body = chat(&router, "Count", shown).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "One, two, th");
    assert!(!body["choices"][0]["token_ids"].as_array().unwrap().is_empty());
    assert_eq!(body["prompt_token_ids"][0], json!(5));
    let raw = chat(&router, "Count", json!({ "skip_special_tokens": false })).await.json();
    let content = raw["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(content, "<|END_THINKING|>One, two, three.<|END_OF_TURN_TOKEN|>");
}

#[tokio::test]
async fn a_closed_connection_cancels_at_the_leader() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    for stream in [true, false] {
        let body = chat_body("Hi", json!({ "stream": stream, "n": 2 })).to_string();
        let connection = send(&router, "/v1/chat/completions", "", body.as_bytes()).await;
        let open = leader.next().await;
        open.chunks.send(Ok(chunk(&[300]))).await.unwrap();
        drop(connection);
        soon(open.chunks.closed()).await;
    }
}

#[tokio::test]
async fn a_failure_in_the_middle_ends_the_stream_with_an_error() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let body = chat_body("Hi", json!({ "stream": true })).to_string();
    let connection = send(&router, "/v1/chat/completions", "", body.as_bytes()).await;
    let open = leader.next().await;
    open.chunks.send(Ok(chunk(&ids("Hm")))).await.unwrap();
    drop(open);
    let answer = receive(connection).await;
    assert_eq!(answer.code, 200);
    let events = answer.events();
    let error = &events.last().unwrap()["error"];
    assert_eq!(error["code"], json!(409), "{}", answer.body);
    assert!(error["message"].as_str().unwrap().contains("lost"));
}
