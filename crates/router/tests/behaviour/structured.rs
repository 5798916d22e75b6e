//! Forms of answers over HTTP: what is asked for reaches the leader as a grammar, and what it draws from that is taken
//! apart into what was asked for.

use serde_json::{Value, json};

use crate::http_client::{chat, chat_body, complete, send};
use crate::obedient::obedient;
use crate::support::{Leader, TestRouter, answer};

fn weather() -> Value {
    json!({ "type": "function", "function": { "name": "get_weather", "parameters": {
        "type": "object", "required": ["city", "days"], "additionalProperties": false,
        "properties": { "city": { "type": "string", "maxLength": 10 }, "days": { "type": "integer", "minimum": 1, "maximum": 5 } },
    } } })
}

fn tools() -> Value {
    json!([weather(), { "type": "function", "function": { "name": "now" } }])
}

async fn ready() -> TestRouter {
    let leader = obedient(20_260).await;
    TestRouter::ready(&[&leader]).await
}

fn content(answer: &crate::http_client::Answer) -> String {
    assert_eq!(answer.code, 200, "{}", answer.body);
    let body = answer.json();
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "stop", "{body}");
    choice["message"]["content"].as_str().unwrap_or_else(|| panic!("{body}")).to_owned()
}

#[tokio::test]
async fn a_schema_in_the_response_format_is_kept() {
    let router = ready().await;
    let schema = json!({ "type": "object", "properties": { "a": { "enum": [1, 2, 3] }, "b": { "type": "boolean" } },
        "required": ["a", "b"], "additionalProperties": false });
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "ab", "strict": true, "schema": schema } });
    for effort in ["none", "high"] {
        let answer =
            chat(&router, "Go", json!({ "response_format": format, "reasoning_effort": effort })).await;
        let value: Value = serde_json::from_str(&content(&answer)).unwrap();
        assert!((1..=3).contains(&value["a"].as_i64().unwrap()) && value["b"].is_boolean(), "{value}");
        assert_eq!(value.as_object().unwrap().len(), 2);
    }
}

#[tokio::test]
async fn every_form_of_structured_outputs_is_kept() {
    let router = ready().await;
    let schema = json!({ "type": "array", "items": { "type": "null" }, "minItems": 2, "maxItems": 2 });
    let forms = [
        (json!({ "json": schema }), r#"^\[\s*null\s*,\s*null\s*\]$"#),
        (json!({ "json": schema.to_string() }), r#"^\[\s*null\s*,\s*null\s*\]$"#),
        (json!({ "regex": "[a-c]{4}" }), "^[a-c]{4}$"),
        (json!({ "choice": ["left", "right"] }), "^(left|right)$"),
        (json!({ "grammar": "start: \"x\" \"y\"{2,3}" }), "^xyyy?$"),
    ];
    for (form, pattern) in forms {
        let asked = json!({ "structured_outputs": form });
        let (said, plain) =
            (chat(&router, "Go", asked.clone()).await, complete(&router, json!("Go"), asked).await);
        let pattern = types_regex(pattern);
        assert!(pattern(&content(&said)), "{form}: {}", said.body);
        assert!(pattern(plain.json()["choices"][0]["text"].as_str().unwrap()), "{form}: {}", plain.body);
    }
}

/// The few patterns of these tests, checked by hand.
fn types_regex(pattern: &'static str) -> impl Fn(&str) -> bool {
    move |text: &str| match pattern {
        "^[a-c]{4}$" => text.len() == 4 && text.bytes().all(|b| (b'a'..=b'c').contains(&b)),
        "^(left|right)$" => ["left", "right"].contains(&text),
        "^xyyy?$" => ["xyy", "xyyy"].contains(&text),
        _ => serde_json::from_str::<Value>(text).is_ok_and(|value| value == json!([null, null])),
    }
}

#[tokio::test]
async fn any_object_and_tagged_parts_reach_the_leader_as_grammars() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let tag = json!({ "structures": [{ "begin": "<a>", "schema": { "type": "null" }, "end": "</a>" }], "triggers": ["<a"] });
    let forms = [
        json!({ "response_format": { "type": "json_object" } }),
        json!({ "structured_outputs": { "json_object": true } }),
        json!({ "structured_outputs": { "structural_tag": tag.to_string() } }),
        json!({ "response_format": { "type": "structural_tag", "structures": tag["structures"], "triggers": tag["triggers"] } }),
    ];
    for form in forms {
        let body = chat_body("Go", form.clone()).to_string();
        let _connection = send(&router, "/v1/chat/completions", "", body.as_bytes()).await;
        let guide = leader.next().await.request.guide.unwrap_or_else(|| panic!("no guide for {form}"));
        crate::obedient::compiler().compile(&guide.grammar).unwrap();
    }
}

#[tokio::test]
async fn a_required_call_is_made() {
    let router = ready().await;
    let mut names = std::collections::BTreeSet::new();
    for at in 0..12 {
        let effort = if at % 2 == 0 { "none" } else { "high" };
        let asked = json!({ "tools": tools(), "tool_choice": "required", "parallel_tool_calls": at % 3 == 0, "reasoning_effort": effort });
        let body = chat(&router, "Weather?", asked).await.json();
        let choice = &body["choices"][0];
        if choice["finish_reason"] == "length" {
            continue;
        }
        assert_eq!(choice["finish_reason"], "tool_calls", "{body}");
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert!(!calls.is_empty() && (at % 3 == 0 || calls.len() == 1), "{body}");
        for call in calls {
            let arguments: Value =
                serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
            match call["function"]["name"].as_str().unwrap() {
                "get_weather" => {
                    assert!((1..=5).contains(&arguments["days"].as_i64().unwrap()), "{arguments}")
                }
                other => assert_eq!((other, &arguments), ("now", &json!({}))),
            }
            names.insert(call["function"]["name"].to_string());
        }
    }
    assert_eq!(names.len(), 2, "{names:?}");
}

#[tokio::test]
async fn the_named_tool_is_called() {
    let router = ready().await;
    let choice = json!({ "type": "function", "function": { "name": "get_weather" } });
    for _ in 0..4 {
        let asked =
            json!({ "tools": tools(), "tool_choice": choice, "parallel_tool_calls": false, "stream": true });
        let events = chat(&router, "Weather?", asked).await.events();
        let deltas: Vec<&Value> =
            events.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"].get(0)).collect();
        assert_eq!(deltas[0]["function"]["name"], "get_weather");
        let arguments: String = deltas.iter().filter_map(|d| d["function"]["arguments"].as_str()).collect();
        assert!(serde_json::from_str::<Value>(&arguments).unwrap().is_object(), "{arguments}");
    }
}

#[tokio::test]
async fn tools_of_a_chat_that_need_not_be_called_ask_for_a_grammar_only_when_they_must() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut strict = weather();
    strict["function"]["strict"] = json!(true);
    let cases = [
        (json!({ "tools": tools() }), false),
        (json!({ "tools": tools(), "tool_choice": "auto", "parallel_tool_calls": true }), false),
        (json!({ "tools": tools(), "parallel_tool_calls": false }), true),
        (json!({ "tools": [strict] }), true),
        (json!({ "tools": tools(), "response_format": { "type": "json_object" } }), true),
        (json!({ "tools": tools(), "tool_choice": "none" }), false),
    ];
    for (asked, guided) in cases {
        let body = chat_body("Go", asked.clone()).to_string();
        let _connection = send(&router, "/v1/chat/completions", "", body.as_bytes()).await;
        let guide = leader.next().await.request.guide;
        assert_eq!(guide.is_some_and(|guide| !guide.grammar.is_empty()), guided, "{asked}");
    }
}

#[tokio::test]
async fn a_thinking_budget_reaches_the_leader_with_the_markers() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    for (effort, open) in [("high", true), ("none", false)] {
        let asked = json!({ "thinking_token_budget": 7, "reasoning_effort": effort });
        let body = chat_body("Go", asked).to_string();
        let _connection = send(&router, "/v1/chat/completions", "", body.as_bytes()).await;
        let guide = leader.next().await.request.guide.unwrap();
        let thinking = guide.thinking.unwrap();
        assert_eq!((thinking.tokens_max, thinking.start_token_id, thinking.end_token_id), (7, 13, 14));
        assert_eq!((thinking.open, guide.grammar.as_str()), (open, ""));
    }
}

/// What is asked, and the field that is refused.
fn impossible_forms() -> Vec<(Value, &'static str)> {
    let schema =
        |schema: Value| json!({ "type": "json_schema", "json_schema": { "name": "s", "schema": schema } });
    let unique =
        json!({ "type": "object", "properties": { "list": { "type": "array", "uniqueItems": true } } });
    let tool = |parameters: Value| json!([{ "type": "function", "function": { "name": "f", "strict": true, "parameters": parameters } }]);
    let many: Vec<Value> =
        (0..129).map(|n| json!({ "type": "function", "function": { "name": format!("f{n}") } })).collect();
    let deep =
        (0..100).fold(json!({ "type": "null" }), |inner, _| json!({ "type": "array", "items": inner }));
    vec![
        (
            json!({ "response_format": schema(unique.clone()) }),
            "response_format.json_schema.schema/properties/list",
        ),
        (
            json!({ "response_format": schema(json!({ "type": "strange" })) }),
            "response_format.json_schema.schema",
        ),
        (json!({ "response_format": schema(json!(7)) }), "response_format.json_schema.schema"),
        (json!({ "response_format": schema(deep) }), "response_format.json_schema.schema"),
        (
            json!({ "response_format": schema(json!({ "enum": ["x".repeat(300_000)] })) }),
            "response_format.json_schema.schema",
        ),
        (json!({ "response_format": { "type": "xml" } }), "response_format"),
        (json!({ "structured_outputs": { "json": unique } }), "structured_outputs.json/properties/list"),
        (json!({ "structured_outputs": { "regex": "[a" } }), "structured_outputs.regex"),
        (json!({ "structured_outputs": { "choice": [] } }), "structured_outputs.choice"),
        (json!({ "structured_outputs": { "choice": ["a", ""] } }), "structured_outputs.choice[1]"),
        (json!({ "structured_outputs": { "grammar": "root ::= x" } }), "structured_outputs.grammar"),
        (
            json!({ "structured_outputs": { "structural_tag": "{}" } }),
            "structured_outputs.structural_tag/structures",
        ),
        (json!({ "structured_outputs": { "regex": "a", "json_object": true } }), "structured_outputs"),
        (json!({ "structured_outputs": {} }), "structured_outputs"),
        (json!({ "structured_outputs": { "backend": "x" } }), "structured_outputs"),
        (
            json!({ "structured_outputs": { "regex": "a" }, "response_format": { "type": "json_object" } }),
            "structured_outputs",
        ),
        (json!({ "structured_outputs": { "regex": "a" }, "min_tokens": 2 }), "min_tokens"),
        (json!({ "structured_outputs": { "regex": "a" }, "ignore_eos": true }), "ignore_eos"),
        (json!({ "structured_outputs": { "regex": "a" }, "allowed_token_ids": [5] }), "allowed_token_ids"),
        (json!({ "thinking_token_budget": 4, "allowed_token_ids": [5] }), "thinking_token_budget"),
        (json!({ "thinking_token_budget": -1 }), "thinking_token_budget"),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (json!({ "tool_choice": "any" }), "tool_choice"),
        (
            json!({ "tools": tools(), "tool_choice": { "type": "function", "function": { "name": "rm" } } }),
            "tool_choice",
        ),
        (json!({ "tools": tool(json!({ "type": "array" })) }), "tools[0].function.parameters"),
        (
            json!({ "tools": tool(json!({ "properties": { "x": { "uniqueItems": true } } })) }),
            "tools[0].function.parameters/properties/x",
        ),
        (json!({ "tools": many, "tool_choice": "required" }), "tools"),
    ]
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_its_path_before_a_leader_hears_of_it() {
    let leader = Leader::serving().await.play_always(answer("<|END_THINKING|>ok"));
    let router = TestRouter::ready(&[&leader]).await;
    for (asked, field) in impossible_forms() {
        let answer = chat(&router, "Go", asked.clone()).await;
        let (param, message) = answer.refusal();
        assert_eq!(
            (answer.code, param.as_deref()),
            (400, Some(field)),
            "{}: {message}",
            &asked.to_string()[..200.min(asked.to_string().len())]
        );
    }
    assert_eq!(chat(&router, "Go", json!({})).await.code, 200);
}
