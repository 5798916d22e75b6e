//! Cohere's `/v2/chat`.

use proto::worker;
use serde_json::{Value, json};

use crate::http_client::{Answer, post, receive, send};
use crate::support::{
    Leader, TestRouter, answer, chunk, config, demo_files, demo_tokenizer, facts, soon, state,
};

const CHAT: &str = "/v2/chat";
const THOUGHT: &str = "Hm.<|END_THINKING|>";
const CALL: &str = "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"get_weather\", \"parameters\": \
    {\"city\": \"Paris\"}}\n]<|END_ACTION|>";
/// A template that knows documents, grounding, safety and results one by one.
const TEMPLATE: &str = "{{ bos_token }}{% if grounding %}[{{ grounding }}]{% endif %}{% if safety_mode %}({{ safety_mode }}){% endif %}\
    {% for t in tools %}{{ t | tojson }}{% endfor %}{% for d in documents %}{{ d | tojson }}{% endfor %}\
    {% for m in messages %}<|START_OF_TURN_TOKEN|>{{ m.role }}: {% if m.content is string %}{{ m.content }}\
    {% else %}{% for c in m.content %}{{ c.document.data | tojson }};{% endfor %}{% endif %}\
    {% if m.reasoning %}~{{ m.reasoning }}~{% endif %}{% endfor %}<|START_THINKING|>{% if reasoning is defined and not reasoning %}<|END_THINKING|>{% endif %}";

fn weather() -> Value {
    let parameters = json!({ "type": "object", "properties": { "city": { "type": "string" } } });
    json!([{ "type": "function", "function": { "name": "get_weather", "parameters": parameters } }])
}

fn body(content: &str, more: Value) -> Value {
    let mut body = json!({ "model": "demo", "messages": [{ "role": "user", "content": content }] });
    let Value::Object(more) = more else { panic!("{more} is no object") };
    for (name, value) in more {
        body[name] = value;
    }
    body
}

async fn leader() -> Leader {
    let facts = worker::ModelFacts { context_tokens_max: 4096, ..facts("demo") };
    Leader::start(state(proto::Phase::Serving, 100, Some(facts))).await
}

async fn router_that_says(text: &str) -> TestRouter {
    let leader = leader().await.play_always(answer(text));
    with_template(&leader).await
}

async fn with_template(leader: &str) -> TestRouter {
    let mut files = demo_files();
    files.chat_template = Some(TEMPLATE.to_owned());
    let router = TestRouter::start(config(&[leader]), files).await;
    router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    router
}

/// The events of a stream, each named after its type.
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.code, 200, "{}", answer.body);
    let mut lines = answer.body.lines();
    let mut events = Vec::new();
    while let Some(line) = lines.next() {
        let Some(name) = line.strip_prefix("event: ") else { continue };
        let event: Value =
            serde_json::from_str(lines.next().unwrap().strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(event["type"], name);
        events.push(event);
    }
    assert!(answer.body.trim_end().ends_with("data: [DONE]"), "{}", answer.body);
    events
}

fn types(events: &[Value]) -> Vec<&str> {
    let mut types: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    types.dedup();
    types
}

#[tokio::test]
async fn a_chat_is_answered_with_thinking_text_and_usage() {
    let router = router_that_says(&format!("{THOUGHT}<|START_TEXT|>Hello!<|END_TEXT|>")).await;
    for path in [CHAT, "/cohere/v2/chat"] {
        let answer = post(&router, path, &body("Hi", json!({}))).await;
        assert_eq!(answer.code, 200, "{}", answer.body);
        let got = answer.json();
        let content =
            json!([{ "type": "thinking", "thinking": "Hm." }, { "type": "text", "text": "Hello!" }]);
        assert_eq!(got["message"], json!({ "role": "assistant", "content": content }));
        assert_eq!(
            (&got["finish_reason"], &got["id"]),
            (&json!("COMPLETE"), &json!(answer.header("x-request-id").unwrap()))
        );
        assert!(got["usage"]["tokens"]["output_tokens"].as_u64().unwrap() > 2);
        assert_eq!(got["usage"]["billed_units"], got["usage"]["tokens"]);
    }
}

#[tokio::test]
async fn a_stream_has_its_own_events() {
    let router = router_that_says(&format!("{THOUGHT}<|START_TEXT|>Hello there!<|END_TEXT|>")).await;
    let events =
        events(&post(&router, CHAT, &body("Hi", json!({ "stream": true, "logprobs": false }))).await);
    let expected = [
        "message-start",
        "content-start",
        "content-delta",
        "content-end",
        "content-start",
        "content-delta",
        "content-end",
        "message-end",
    ];
    assert_eq!(types(&events), expected);
    assert_eq!(events[1]["delta"]["message"]["content"], json!({ "type": "thinking", "thinking": "" }));
    let said = |kind: &str| -> String {
        let deltas = events.iter().filter(|event| event["type"] == "content-delta");
        deltas.filter_map(|event| event["delta"]["message"]["content"][kind].as_str()).collect()
    };
    assert_eq!((said("thinking").as_str(), said("text").as_str()), ("Hm.", "Hello there!"));
    let index = |event: &Value| event["index"].as_u64();
    let starts: Vec<_> = events.iter().filter(|e| e["type"] == "content-start").map(index).collect();
    assert_eq!(starts, [Some(0), Some(1)]);
    let end = &events.last().unwrap()["delta"];
    assert_eq!(end["finish_reason"], "COMPLETE");
    assert!(end["usage"]["tokens"]["input_tokens"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn tool_calls_come_with_a_plan_when_the_model_does_not_reason() {
    let router = router_that_says(&format!("I look.<|END_THINKING|>{CALL}")).await;
    let asked = json!({ "tools": weather(), "thinking": { "type": "disabled" } });
    // The prompt ends after the thoughts; what is written before the next marker is what a planner would say.
    let planned = router_that_says(&format!("<|START_THINKING|>I look.<|END_THINKING|>{CALL}")).await;
    let got = post(&planned, CHAT, &body("Weather?", asked.clone())).await.json();
    assert_eq!(
        (&got["finish_reason"], &got["message"]["tool_plan"]),
        (&json!("TOOL_CALL"), &json!("I look."))
    );
    let call = &got["message"]["tool_calls"][0];
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("get_weather")));
    assert_eq!(call["function"]["arguments"], "{\"city\": \"Paris\"}");
    assert_eq!(got["message"]["content"], Value::Null);

    let mut asked = asked;
    asked["stream"] = json!(true);
    let streamed = events(&post(&planned, CHAT, &body("Weather?", asked)).await);
    let expected = [
        "message-start",
        "tool-plan-delta",
        "tool-call-start",
        "tool-call-delta",
        "tool-call-end",
        "message-end",
    ];
    assert_eq!(types(&streamed), expected);
    let arguments = |event: &Value| {
        event["delta"]["message"]["tool_calls"]["function"]["arguments"].as_str().map(str::to_owned)
    };
    assert_eq!(streamed.iter().filter_map(arguments).collect::<String>(), "{\"city\": \"Paris\"}");
    assert_eq!(streamed.last().unwrap()["delta"]["finish_reason"], "TOOL_CALL");

    let reasoned = post(&router, CHAT, &body("Weather?", json!({ "tools": weather() }))).await.json();
    assert_eq!(reasoned["message"]["content"], json!([{ "type": "thinking", "thinking": "I look." }]));
}

#[tokio::test]
async fn citations_name_documents_and_results() {
    let said = "Hm.<|END_THINKING|><|START_TEXT|>It is <co>21 degrees</co: 1:[1]>, says <co>the guide</co: 0:[0]>.<|END_TEXT|>";
    let router = router_that_says(said).await;
    let call = json!({ "id": "call_7", "type": "function", "function": { "name": "get_weather", "arguments": "{}" } });
    let results = json!([
        { "type": "text", "text": "one" },
        { "type": "document", "document": { "data": { "temperature": 21 } } },
    ]);
    let messages = json!([
        { "role": "user", "content": "Weather?" },
        { "role": "assistant", "tool_plan": "I look.", "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "call_7", "content": results },
    ]);
    let asked = json!({ "messages": messages, "tools": weather(),
        "documents": [{ "id": "guide", "data": { "title": "Guide" } }, "second"] });
    let got = post(&router, CHAT, &asked).await;
    assert_eq!(got.code, 200, "{}", got.body);
    let got = got.json();
    assert_eq!(got["message"]["content"][1]["text"], "It is 21 degrees, says the guide.");
    let tool = json!({ "type": "tool", "id": "call_7:1", "tool_output": { "temperature": 21 } });
    let document =
        json!({ "type": "document", "id": "guide", "document": { "title": "Guide", "id": "guide" } });
    let cited = json!([
        { "start": 6, "end": 16, "text": "21 degrees", "sources": [tool], "type": "TEXT_CONTENT", "content_index": 1 },
        { "start": 23, "end": 32, "text": "the guide", "sources": [document], "type": "TEXT_CONTENT", "content_index": 1 },
    ]);
    assert_eq!(got["message"]["citations"], cited);

    let mut streamed = asked.clone();
    streamed["stream"] = json!(true);
    let streamed = events(&post(&router, CHAT, &streamed).await);
    let citations: Vec<&Value> = streamed.iter().filter(|event| event["type"] == "citation-start").collect();
    assert_eq!(citations.len(), 2);
    assert_eq!(citations[1]["delta"]["message"]["citations"], cited[1]);
    assert_eq!(citations[1]["index"], 1);

    let mut plain = asked;
    plain["citation_options"] = json!({ "mode": "OFF" });
    let plain = post(&router, CHAT, &plain).await.json();
    assert_eq!(plain["message"]["content"][1]["text"], "It is 21 degrees, says the guide.");
    assert_eq!(plain["message"]["citations"], Value::Null);
}

#[tokio::test]
async fn the_model_sees_the_conversation_as_it_was() {
    let mut leader = leader().await;
    let router = with_template(&leader.address).await;
    let call = json!({ "id": "call_7", "type": "function", "function": { "name": "get_weather", "arguments": "{}" } });
    let sources = json!([{ "type": "tool", "id": "call_7:0" }]);
    let messages = json!([
        { "role": "system", "content": [{ "type": "text", "text": "Be brief." }] },
        { "role": "user", "content": "Weather?" },
        { "role": "assistant", "tool_plan": "I look.", "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "call_7", "content": [{ "type": "document", "document": { "data": "ORDERED" } },
            { "type": "text", "text": "warm" }] },
        { "role": "assistant", "content": [{ "type": "thinking", "thinking": "So." }, { "type": "text", "text": "It is wärm now." }],
          "citations": [{ "start": 6, "end": 10, "text": "wärm", "sources": sources, "type": "TEXT_CONTENT" }] },
        { "role": "user", "content": "Thanks" },
    ]);
    let asked = json!({ "messages": messages, "documents": ["a document"], "safety_mode": "STRICT", "k": 3, "p": 0.5,
        "temperature": 0.25, "seed": 7, "max_tokens": 9, "stop_sequences": ["x"], "citation_options": { "mode": "FAST" } });
    // The order of keys is kept, here and by the router: the model was trained on one.
    let asked = asked.to_string().replace("\"ORDERED\"", "{\"b\": 1, \"a\": 2}");
    let connection = send(&router, CHAT, "", asked.as_bytes()).await;
    let open = leader.next().await;
    let prompt: Vec<types::TokenId> = open.request.prompt.iter().map(|&id| types::TokenId(id)).collect();
    let rendered = demo_tokenizer().decode(&prompt, true);
    for part in [
        "[enabled](strict)",
        "{\"content\": \"a document\"}",
        "system: Be brief.",
        "assistant: ~I look.~",
        "tool: {\"b\": 1, \"a\": 2};{\"content\": \"warm\"};",
        "It is <co>wärm</co: 1:[0]> now.~So.~",
    ] {
        assert!(rendered.contains(part), "{part} is not in {rendered}");
    }
    let generation = open.request.generation.clone().unwrap();
    assert_eq!(
        (generation.top_k, generation.top_p, generation.temperature),
        (Some(3), Some(0.5), Some(0.25))
    );
    assert_eq!((generation.seed, generation.max_tokens), (Some(7), Some(9)));
    open.play(answer("ok")).await;
    assert_eq!(receive(connection).await.code, 200);
}

#[tokio::test]
async fn defaults_are_coheres_and_endings_are_named() {
    let mut leader = leader().await;
    let router = with_template(&leader.address).await;
    let ask = async |more: Value| send(&router, CHAT, "", body("Hi", more).to_string().as_bytes()).await;
    let connection = ask(json!({ "stop_sequences": ["two"] })).await;
    let open = leader.next().await;
    let generation = open.request.generation.clone().unwrap();
    assert_eq!((generation.temperature, generation.top_p, generation.top_k), (Some(0.3), Some(0.75), None));
    open.play(answer("<|END_THINKING|><|START_TEXT|>one two three")).await;
    let stopped = receive(connection).await.json();
    assert_eq!(
        (&stopped["finish_reason"], &stopped["message"]["content"][0]["text"]),
        (&json!("STOP_SEQUENCE"), &json!("one "))
    );

    let connection = ask(json!({ "max_tokens": 1, "logprobs": true })).await;
    let open = leader.next().await;
    let mut end = crate::support::last(&[300], worker::FinishReason::Length, None);
    end.logprobs = vec![worker::TokenLogprob { token_id: 300, logprob: -0.5, top: vec![] }];
    open.play(vec![end]).await;
    let cut = receive(connection).await.json();
    assert_eq!(cut["finish_reason"], "MAX_TOKENS");
    let item = &cut["logprobs"][0];
    assert_eq!((&item["token_ids"], &item["logprobs"]), (&json!([300]), &json!([-0.5])));
}

#[tokio::test]
async fn refusals_name_the_field_in_coheres_form() {
    let router = router_that_says("x").await;
    let image =
        json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "x" } }] }]);
    let cases = [
        (json!({ "colour": "red" }), "colour"),
        (json!({ "p": 2.0 }), "p: "),
        (json!({ "k": 99_999_999 }), "k: "),
        (json!({ "temperature": -1 }), "temperature"),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "stop_sequences": [""] }), "stop_sequences[0]"),
        (json!({ "strict_tools": "yes" }), "strict_tools"),
        (json!({ "tool_choice": "auto" }), "tool_choice"),
        (json!({ "tool_choice": "REQUIRED" }), "tool_choice"),
        (json!({ "response_format": { "type": "json_schema" } }), "response_format"),
        (
            json!({ "response_format": { "type": "json_object", "json_schema": { "items": { "uniqueItems": true } } } }),
            "response_format.json_schema/items: ",
        ),
        (json!({ "thinking": { "type": "enabled", "token_budget": -1 } }), "thinking"),
        (json!({ "safety_mode": "LOOSE" }), "safety_mode"),
        (json!({ "tools": [{}] }), "tools[0]"),
        (json!({ "documents": [{ "id": "x" }] }), "documents[0]"),
        (json!({ "documents": [{ "data": { "a": 1 }, "colour": 1 }] }), "documents[0]"),
        (json!({ "messages": image }), "messages[0]"),
        (json!({ "messages": [{ "role": "robot", "content": "x" }] }), "messages[0]"),
        (json!({ "messages": [{ "role": "user", "content": "x", "colour": 1 }] }), "messages[0]"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "thinking", "thinking": "x" }] }] }),
            "messages[0]",
        ),
        (json!({ "messages": [] }), "messages"),
    ];
    for (more, field) in cases {
        let refused = post(&router, CHAT, &body("Hi", more.clone())).await;
        let got = refused.json();
        assert_eq!(refused.code, 400, "{more}: {got}");
        assert!(got["message"].as_str().unwrap().contains(field), "{more}: {got}");
        assert_eq!(got.as_object().unwrap().keys().collect::<Vec<_>>(), ["id", "message"]);
    }
    let unknown = post(&router, CHAT, &body("Hi", json!({ "model": "gpt" }))).await;
    assert_eq!(unknown.code, 404);
    assert_eq!(receive(send(&router, CHAT, "", b"{").await).await.code, 400);
}

#[tokio::test]
async fn a_template_without_citations_refuses_them_by_name() {
    let leader = leader().await.play_always(answer("x"));
    let router = TestRouter::ready(&[&leader]).await;
    for (more, field) in [
        (json!({ "citation_options": { "mode": "ENABLED" } }), "citation_options"),
        (json!({ "safety_mode": "STRICT" }), "safety_mode"),
        (json!({ "documents": ["x"] }), "documents"),
    ] {
        let refused = post(&router, CHAT, &body("Hi", more)).await;
        assert_eq!(refused.code, 400);
        assert!(refused.json()["message"].as_str().unwrap().contains(field), "{}", refused.body);
    }
    let harmless =
        json!({ "citation_options": { "mode": "OFF" }, "safety_mode": "OFF", "strict_tools": false });
    assert_eq!(post(&router, CHAT, &body("Hi", harmless)).await.code, 200);
}

#[tokio::test]
async fn a_failure_ends_the_stream_and_a_caller_that_leaves_frees_the_request() {
    let mut leader = leader().await;
    let router = with_template(&leader.address).await;
    let asked = body("Hi", json!({ "stream": true })).to_string();
    let connection = send(&router, CHAT, "", asked.as_bytes()).await;
    let open = leader.next().await;
    open.chunks.send(Ok(chunk(&[300]))).await.unwrap();
    open.chunks.send(Err(tonic::Status::internal("gone"))).await.unwrap();
    let events = events(&receive(connection).await);
    let end = &events.last().unwrap()["delta"];
    assert_eq!(end["finish_reason"], "ERROR");
    assert!(end["error"].as_str().unwrap().contains("lost"), "{end}");

    let connection = send(&router, CHAT, "", asked.as_bytes()).await;
    let open = leader.next().await;
    drop(connection);
    soon(open.chunks.closed()).await;
}
