use proto::Failure;
use serde_json::{Value, json};
use types::limits::JSON_IN_PLACE_BYTES_MAX;

use crate::http_client::{chat, complete, post, receive, send};
use crate::support::{Leader, TestRouter, answer, config, demo_files};

const CHAT: &str = "/v1/chat/completions";

async fn ready() -> TestRouter {
    let leader = Leader::serving().await.play_always(answer("<|END_THINKING|>ok"));
    TestRouter::ready(&[&leader]).await
}

#[tokio::test]
async fn every_field_that_does_not_work_is_refused_by_its_name() {
    let router = ready().await;
    let fields = [
        ("frequency_penalty", json!(2.5)),
        ("presence_penalty", json!(-3)),
        ("presence_penalty", json!("much")),
        ("repetition_penalty", json!(0)),
        ("logit_bias", json!({ "5": 101 })),
        ("logit_bias", json!({ "4096": 1 })),
        ("logit_bias", json!({ "the": 1 })),
        ("logit_bias", json!({ "5": 1, "05": 1 })),
        ("logit_bias", json!([5])),
        ("n", json!(0)),
        ("n", json!(1000)),
        ("response_format", json!({ "type": "xml" })),
        ("seed", json!("x")),
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-5)),
        ("stop", json!([""])),
        ("stop", json!(vec!["x"; 10_000])),
        ("stop_token_ids", json!([4096])),
        ("tools", json!([{ "type": "retrieval" }])),
        ("tool_choice", json!("required")),
        ("tool_choice", json!({ "type": "function", "function": { "name": "f" } })),
        ("parallel_tool_calls", json!("no")),
        ("reasoning_effort", json!("huge")),
        ("top_logprobs", json!(2)),
        ("stream_options", json!({ "include_usage": true })),
        ("allowed_token_ids", json!([4096])),
        ("allowed_token_ids", json!([])),
        ("bad_words", json!([""])),
        ("bad_words", json!(["x".repeat(257)])),
        ("bad_words", json!(vec!["x"; 129])),
        ("documents", json!([{ "text": "x" }])),
        ("chat_template_kwargs", json!({ "colour": 1 })),
        ("chat_template_kwargs", json!([])),
        ("structured_outputs", json!({ "regex": "[a" })),
        ("priority", json!(101)),
        ("priority", json!(0.5)),
        ("request_id", json!("not visible")),
        ("session_id", json!("s".repeat(257))),
        ("cache_salt", json!("")),
        ("cache_salt", json!("s".repeat(1025))),
        ("thinking_token_budget", json!(-5)),
        ("guided_json", json!({})),
        ("functions", json!([])),
        ("no_such_field", json!(1)),
    ];
    for (field, value) in fields {
        let answer = chat(&router, "Hi", json!({ field: value })).await;
        let (param, message) = answer.refusal();
        let param = param.unwrap_or_default();
        assert_eq!(answer.code, 400, "{field}: {message}");
        assert!(param.starts_with(field) || param.contains(field), "{field}, not {param}: {message}");
        assert!(message.contains(field), "{field}: {message}");
    }
    for (field, value) in [("echo", json!(true)), ("suffix", json!("x"))] {
        assert_eq!(complete(&router, json!("x"), json!({ field: value })).await.refusal().0.unwrap(), field);
    }
}

#[tokio::test]
async fn fields_that_say_what_is_done_anyway_are_taken() {
    let router = ready().await;
    let fields = json!({
        "frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1.0, "logit_bias": null, "bad_words": [],
        "response_format": { "type": "text" }, "parallel_tool_calls": true, "priority": 0, "temperature": 0, "top_k": -1,
        "tools": null, "tool_choice": "none", "n": 1, "stream": false, "service_tier": "auto", "store": false,
        "chat_template_kwargs": { "reasoning": false }, "max_completion_tokens": 5, "max_tokens": 5, "min_p": 0.1,
        "reasoning_effort": "high", "ignore_eos": false, "min_tokens": 1, "metadata": {},
    });
    let answer = chat(&router, "Hi", fields).await;
    assert_eq!(answer.code, 200, "{}", answer.body);
}

#[tokio::test]
async fn wrong_messages_are_named() {
    let router = ready().await;
    let image = json!([{ "type": "image_url", "image_url": { "url": "x" } }]);
    let call = |arguments: &str| {
        json!([{ "id": "1", "type": "function",
                                          "function": { "name": "f", "arguments": arguments } }])
    };
    let cases = [
        (json!({ "role": "robot", "content": "x" }), "messages[0].role"),
        (json!({ "role": "user", "content": image }), "messages[0]"),
        (json!({ "role": "user", "content": 1 }), "messages[0]"),
        (json!({ "content": "x" }), "messages[0]"),
        (json!("x"), "messages[0]"),
        (json!({ "role": "user", "content": "x", "colour": "red" }), "messages[0]"),
        (json!({ "role": "user", "content": "x", "tool_calls": call("{}") }), "messages[0].tool_calls"),
        (
            json!({ "role": "assistant", "tool_calls": call("[1]") }),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            json!({ "role": "assistant", "tool_calls": call("{") }),
            "messages[0].tool_calls[0].function.arguments",
        ),
    ];
    for (message, field) in cases {
        let answer = post(&router, CHAT, &json!({ "messages": [message.clone()] })).await;
        assert_eq!((answer.code, answer.refusal().0.as_deref()), (400, Some(field)), "{message}");
    }
    for body in [json!({}), json!({ "messages": [] })] {
        assert_eq!(post(&router, CHAT, &body).await.refusal().0.unwrap(), "messages");
    }
    for prompt in [Value::Null, json!([]), json!(""), json!([5000]), json!([[1], []]), json!({})] {
        let (param, message) = complete(&router, prompt.clone(), json!({})).await.refusal();
        assert!(param.unwrap().starts_with("prompt"), "{prompt}: {message}");
    }
}

#[tokio::test]
async fn a_template_that_raises_is_a_400_with_its_words() {
    let leader = Leader::serving().await.play_always(answer("ok"));
    let mut files = demo_files();
    files.chat_template = Some("{{ raise_exception('roles must alternate') }}".to_owned());
    let router = TestRouter::start(config(&[&leader]), files).await;
    router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    let answer = chat(&router, "Hi", json!({})).await;
    let (param, message) = answer.refusal();
    assert_eq!((answer.code, param.as_deref()), (400, Some("messages")));
    assert!(message.contains("roles must alternate"), "{message}");
}

#[tokio::test]
async fn a_body_that_is_read_on_another_thread_is_answered_as_others_are() {
    let router = ready().await;
    let blanks = " ".repeat(JSON_IN_PLACE_BYTES_MAX);
    for (path, body, code, word) in [
        (CHAT, r#"{"messages": [{"role": "user", "content": "Hi"}]}"#, 200, "ok"),
        (CHAT, r#"{"messages": [{"role": "user", "content": "Hi"}], "colour": 1}"#, 400, "colour"),
        (CHAT, r#"{"messages": }"#, 400, "line 1 column"),
        ("/v2/chat", r#"{"model": "m", "messages": [], "colour": 1}"#, 400, "colour"),
        ("/v1/completions", r#"{"prompt": [5], "colour": 1}"#, 400, "colour"),
        ("/tokenize", r#"{"prompt": "Hi"}"#, 200, "tokens"),
        ("/detokenize", r#"{"tokens": [4096]}"#, 400, "tokens[0]"),
    ] {
        for body in [body.to_owned(), format!("{blanks}{body}")] {
            let answer = receive(send(&router, path, "", body.as_bytes()).await).await;
            assert!(answer.code == code && answer.body.contains(word), "{path}: {answer:?}");
        }
    }
}

#[tokio::test]
async fn a_body_that_is_not_json_is_refused_with_the_position() {
    let router = ready().await;
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(5000), "]".repeat(5000));
    for (body, position) in [
        (&b"{\"model\": \"demo\",\n  oops}"[..], "line 2 column 3"),
        (&b""[..], "line 1 column 0"),
        (&b"[1]"[..], "line 1"),
        (&b"{\"model\": \"\xff\xfe\"}"[..], "line 1"),
        (deep.as_bytes(), ""),
    ] {
        let answer = receive(send(&router, CHAT, "", body).await).await;
        let (_, message) = answer.refusal();
        assert_eq!(answer.code, 400, "{message}");
        assert!(message.contains(position), "{message}");
    }
}

#[tokio::test]
async fn statuses_are_those_openais_clients_know() {
    let router = ready().await;
    let unknown = chat(&router, "Hi", json!({ "model": "gpt" })).await;
    assert_eq!((unknown.code, unknown.refusal().0.as_deref()), (404, Some("model")));
    let long = chat(&router, &"word ".repeat(100), json!({})).await;
    assert_eq!(long.code, 400);
    assert!(long.refusal().1.contains("64"), "{}", long.body);
    assert_eq!(post(&router, "/v1/embeddings", &json!({})).await.code, 501);
    for (path, instead) in [("/v1/responses", CHAT), ("/inference/v1/generate", "GenerateOnce")] {
        let answer = post(&router, path, &json!({})).await;
        assert!(answer.code == 501 && answer.refusal().1.contains(instead), "{answer:?}");
    }
    assert_eq!(post(&router, "/v1/nothing", &json!({})).await.refusal().1, "there is no /v1/nothing");
    assert_eq!(post(&router, "/v1/models", &json!({})).await.code, 405);
    let form = receive(send(&router, CHAT, "Content-Type: text/plain\r\n", b"{}").await).await;
    assert_eq!(form.code, 415);
    let deadline = receive(send(&router, CHAT, "grpc-timeout: soon\r\n", b"{\"messages\": []}").await).await;
    assert_eq!(deadline.refusal().0.unwrap(), "grpc-timeout");
}

#[tokio::test]
async fn a_body_above_the_limit_is_refused_before_it_is_read() {
    let router = ready().await;
    let mut stream = tokio::net::TcpStream::connect(router.bound.http.unwrap()).await.unwrap();
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 99999999\r\n\r\n");
    tokio::io::AsyncWriteExt::write_all(&mut stream, head.as_bytes()).await.unwrap();
    let answer = receive(stream).await;
    assert_eq!(answer.code, 413);
    assert!(answer.refusal().1.contains("16777216"), "{}", answer.body);
}

#[tokio::test]
async fn a_full_router_says_when_to_come_back() {
    let mut leader = Leader::serving().await;
    let limits =
        router::Limits { requests_max: 1, queue: router::QueueLimits::NONE, ..router::Limits::default() };
    let router =
        TestRouter::start(router::Config { limits, ..config(&[&leader.address]) }, demo_files()).await;
    router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    let body = json!({ "messages": [{ "role": "user", "content": "x" }] }).to_string();
    let held = send(&router, CHAT, "", body.as_bytes()).await;
    let open = leader.next().await;
    let refused = chat(&router, "Hi", json!({ "stream": true })).await;
    assert_eq!((refused.code, refused.header("retry-after")), (429, Some("1")), "{}", refused.body);
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    open.play(answer("<|END_THINKING|>ok")).await;
    assert_eq!(receive(held).await.code, 200);
}

#[tokio::test]
async fn a_refusal_of_the_leader_is_a_status_also_for_streams() {
    let leader = Leader::serving().await;
    leader.refuse(Failure::Overloaded {
        what: "requests".to_owned(),
        max: 3,
        retry_after: std::time::Duration::from_millis(2500),
    });
    let router = TestRouter::ready(&[&leader.address]).await;
    for stream in [true, false] {
        let refused = chat(&router, "Hi", json!({ "stream": stream })).await;
        assert_eq!((refused.code, refused.header("retry-after")), (429, Some("3")), "{}", refused.body);
    }
}
