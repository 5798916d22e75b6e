//! Answers taken apart over gRPC.

use proto::v1;

use crate::support::{Leader, TestRouter, all, answer, failure, from_text, soon, with_stop};

const CALL: &str = "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"get_weather\", \"parameters\": \
    {\"city\": \"Paris\"}}\n]<|END_ACTION|>";
const TOOL: &str = "{\"type\": \"function\", \"function\": {\"name\": \"get_weather\", \"parameters\": {}}}";

pub(crate) fn chat(content: &str) -> v1::ChatPrompt {
    let message = v1::ChatMessage {
        role: "user".to_owned(),
        content: content.to_owned(),
        ..v1::ChatMessage::default()
    };
    v1::ChatPrompt { messages: vec![message], ..v1::ChatPrompt::default() }
}

fn parsed(chat: v1::ChatPrompt) -> v1::GenerateRequest {
    let response = Some(v1::Response { parse: true, ..v1::Response::default() });
    let prompt = Some(v1::generate_request::Prompt::Chat(chat));
    v1::GenerateRequest { prompt, response, ..v1::GenerateRequest::default() }
}

async fn once(router: &TestRouter, request: v1::GenerateRequest) -> v1::GenerateOnceResponse {
    soon(router.client().await.generate_once(request)).await.unwrap().into_inner()
}

#[tokio::test]
async fn reasoning_comes_apart_from_what_is_said() {
    let script = answer("Let me think.<|END_THINKING|><|START_TEXT|>Hello!<|END_TEXT|>");
    let leader = Leader::serving().await.play_always(script.clone());
    let router = TestRouter::ready(&[&leader]).await;
    let whole = once(&router, parsed(chat("Hi"))).await;
    assert_eq!((whole.reasoning.as_str(), whole.text.as_str()), ("Let me think.", "Hello!"));
    let usage = whole.usage.unwrap();
    let thought = crate::support::ids("Let me think.<|END_THINKING|>").len();
    assert_eq!(usage.reasoning_tokens as usize, thought);
    assert_eq!(usage.output_tokens as usize, script.len());
}

#[tokio::test]
async fn tool_calls_stream_in_pieces_that_add_up() {
    let leader = Leader::serving().await.play_always(answer(&format!("Hm.<|END_THINKING|>{CALL}")));
    let router = TestRouter::ready(&[&leader]).await;
    let asked = v1::ChatPrompt { tools: vec![TOOL.to_owned()], ..chat("Weather in Paris?") };
    let messages = all(&router, parsed(asked.clone())).await.unwrap();
    let pieces: Vec<&v1::ToolCallDelta> = messages.iter().flat_map(|m| &m.tool_calls).collect();
    assert!(pieces.len() > 3, "{pieces:?}");
    assert_eq!((pieces[0].name.as_str(), pieces[0].index), ("get_weather", 0));
    assert!(pieces[0].id.starts_with("call_"), "{}", pieces[0].id);
    assert!(pieces[1..].iter().all(|piece| piece.name.is_empty() && piece.id.is_empty()));
    let whole = once(&router, parsed(asked)).await;
    assert_eq!(whole.tool_calls.len(), 1);
    assert_eq!(whole.tool_calls[0].arguments, "{\"city\": \"Paris\"}");
    assert_eq!((whole.text.as_str(), whole.reasoning.as_str()), ("", "Hm."));
}

#[tokio::test]
async fn without_tools_a_call_is_text() {
    let leader = Leader::serving().await.play_always(answer(&format!("<|END_THINKING|>{CALL}")));
    let router = TestRouter::ready(&[&leader]).await;
    let whole = once(&router, parsed(chat("Weather?"))).await;
    assert!(whole.tool_calls.is_empty());
    assert!(whole.text.contains("get_weather"), "{}", whole.text);
}

#[tokio::test]
async fn stop_strings_are_searched_for_in_what_is_said() {
    let script = answer("stop? No.<|END_THINKING|><|START_TEXT|>Say stop now.<|END_TEXT|>");
    let leader = Leader::serving().await.play_always(script);
    let router = TestRouter::ready(&[&leader]).await;
    let whole = once(&router, with_stop(parsed(chat("Hi")), &["stop"])).await;
    assert_eq!((whole.reasoning.as_str(), whole.text.as_str()), ("stop? No.", "Say "));
    let matched = whole.finish.unwrap().matched;
    assert_eq!(matched, Some(v1::finish::Matched::Stop("stop".to_owned())));
}

#[tokio::test]
async fn what_the_template_does_not_read_is_refused() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let cases = [
        (v1::ChatPrompt { documents: vec!["{}".to_owned()], ..chat("x") }, "chat.documents"),
        (v1::ChatPrompt { tools: vec!["[]".to_owned()], ..chat("x") }, "chat.tools[0]"),
        (v1::ChatPrompt { tools: vec!["{".to_owned()], ..chat("x") }, "chat.tools[0]"),
        (
            v1::ChatPrompt { template_arguments: "{\"colour\": 1}".to_owned(), ..chat("x") },
            "chat.template_arguments.colour",
        ),
        (
            v1::ChatPrompt { template_arguments: "{\"messages\": 1}".to_owned(), ..chat("x") },
            "chat.template_arguments.messages",
        ),
        (v1::ChatPrompt { template_arguments: "[]".to_owned(), ..chat("x") }, "chat.template_arguments"),
    ];
    for (chat, field) in cases {
        let status = all(&router, parsed(chat)).await.unwrap_err();
        assert_eq!(crate::support::fields(&status), [field], "{}", failure(&status));
    }
}

#[tokio::test]
async fn text_is_still_raw_unless_asked_otherwise() {
    let leader = Leader::serving().await.play_always(answer("Hm.<|END_THINKING|>Hi"));
    let router = TestRouter::ready(&[&leader]).await;
    let whole = once(&router, from_text("x")).await;
    assert_eq!((whole.text.as_str(), whole.reasoning.as_str()), ("Hm.Hi", ""));
}
