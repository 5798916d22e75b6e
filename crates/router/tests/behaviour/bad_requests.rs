use proto::v1::generate_request::Prompt;
use proto::{Failure, v1};
use router::{Config, Limits};
use tonic::Code;

use crate::support::{
    CONTEXT, Leader, TestRouter, VOCAB, all, answer, config, demo_files, failure, fields, from_ids,
    from_text, soon, with_stop,
};

async fn ready() -> TestRouter {
    let leader = Leader::serving().await.play_always(answer("ok"));
    TestRouter::ready(&[&leader]).await
}

fn chat(role: &str, content: &str) -> v1::GenerateRequest {
    let messages = vec![v1::ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
        ..v1::ChatMessage::default()
    }];
    let prompt = Some(Prompt::Chat(v1::ChatPrompt { messages, ..v1::ChatPrompt::default() }));
    v1::GenerateRequest { prompt, ..v1::GenerateRequest::default() }
}

fn sampling(sampling: v1::Sampling) -> v1::GenerateRequest {
    v1::GenerateRequest { sampling: Some(sampling), ..from_text("x") }
}

fn stopping(stopping: v1::Stopping) -> v1::GenerateRequest {
    v1::GenerateRequest { stopping: Some(stopping), ..from_text("x") }
}

fn response(response: v1::Response) -> v1::GenerateRequest {
    v1::GenerateRequest { response: Some(response), ..from_text("x") }
}

fn invalid_requests() -> Vec<(v1::GenerateRequest, Vec<&'static str>)> {
    let set = v1::Sampling::default;
    let stop = v1::Stopping::default;
    let long_id = v1::GenerateRequest { request_id: "x".repeat(129), ..from_text("x") };
    let odd_id = v1::GenerateRequest { request_id: "two words".to_owned(), ..from_text("x") };
    let tops = v1::Response { logprobs: Some(129), prompt_logprobs: Some(1000), ..v1::Response::default() };
    let both = v1::GenerateRequest {
        sampling: Some(v1::Sampling { top_p: Some(2.0), ..set() }),
        ..with_stop(from_ids(&[]), &["", "ok"])
    };
    vec![
        (v1::GenerateRequest::default(), vec!["prompt"]),
        (from_text(""), vec!["text"]),
        (from_ids(&[]), vec!["token_ids.ids"]),
        (from_ids(&[1, VOCAB, 2, u32::MAX]), vec!["token_ids.ids[1]", "token_ids.ids[3]"]),
        (chat("person", "x"), vec!["chat.messages[0].role"]),
        (sampling(v1::Sampling { temperature: Some(f32::NAN), ..set() }), vec!["sampling.temperature"]),
        (sampling(v1::Sampling { temperature: Some(-1.0), ..set() }), vec!["sampling.temperature"]),
        (sampling(v1::Sampling { top_p: Some(f32::INFINITY), ..set() }), vec!["sampling.top_p"]),
        (sampling(v1::Sampling { top_p: Some(0.0), ..set() }), vec!["sampling.top_p"]),
        (sampling(v1::Sampling { min_p: Some(f32::NAN), ..set() }), vec!["sampling.min_p"]),
        (sampling(v1::Sampling { top_k: Some(u32::MAX), ..set() }), vec!["sampling.top_k"]),
        (stopping(v1::Stopping { max_tokens: Some(0), ..stop() }), vec!["stopping.max_tokens"]),
        (
            stopping(v1::Stopping { max_tokens: Some(2), min_tokens: Some(3), ..stop() }),
            vec!["stopping.min_tokens"],
        ),
        (stopping(v1::Stopping { stop_token_ids: vec![VOCAB], ..stop() }), vec!["stopping.stop_token_ids"]),
        (stopping(v1::Stopping { stop: vec!["x".repeat(1025)], ..stop() }), vec!["stopping.stop[0]"]),
        (response(tops), vec!["response.logprobs", "response.prompt_logprobs"]),
        (long_id, vec!["request_id"]),
        (odd_id, vec!["request_id"]),
        (both, vec!["token_ids.ids", "sampling.top_p", "stopping.stop[0]"]),
    ]
}

#[tokio::test]
async fn every_wrong_field_is_named() {
    let router = ready().await;
    for (request, expected) in invalid_requests() {
        let status = all(&router, request.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{request:?}");
        assert_eq!(fields(&status), expected, "{request:?}");
        let once = soon(router.client().await.generate_once(request)).await.unwrap_err();
        assert_eq!((once.code(), fields(&once)), (status.code(), fields(&status)));
    }
    assert!(all(&router, from_text("still serving")).await.is_ok());
}

#[tokio::test]
async fn a_bad_token_id_is_told_with_its_number() {
    let status = all(&ready().await, from_ids(&[7, 5000])).await.unwrap_err();
    assert!(status.message().contains("5000") && status.message().contains("4096"), "{}", status.message());
}

#[tokio::test]
async fn a_prompt_that_fills_the_context_is_out_of_range_with_both_numbers() {
    let router = ready().await;
    let room = CONTEXT as usize - 1;
    assert!(all(&router, from_ids(&vec![7; room])).await.is_ok());
    let status = all(&router, from_ids(&vec![7; room + 1])).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    let expected = Failure::PromptTooLong { prompt_tokens: 64, context_tokens_max: CONTEXT };
    assert_eq!(failure(&status), expected);
    let status = all(&router, from_text(&"word ".repeat(200))).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
}

#[tokio::test]
async fn another_model_is_not_found_and_the_served_one_is_named() {
    let router = ready().await;
    let named = |model: &str| v1::GenerateRequest { model: model.to_owned(), ..from_text("x") };
    assert!(all(&router, named("demo")).await.is_ok());
    let status = all(&router, named("gpt")).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let expected = Failure::UnknownModel { asked: "gpt".to_owned(), served: vec!["demo".to_owned()] };
    assert_eq!(failure(&status), expected);
}

#[tokio::test]
async fn a_configured_name_replaces_the_groups_own() {
    let leader = Leader::serving().await.play_always(answer("ok"));
    let config = Config { model_name: Some("mine".to_owned()), ..config(&[&leader]) };
    let router = TestRouter::start(config, demo_files()).await;
    router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    let named = |model: &str| v1::GenerateRequest { model: model.to_owned(), ..from_text("x") };
    assert!(all(&router, named("mine")).await.is_ok());
    assert_eq!(all(&router, named("demo")).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_template_that_raises_tells_the_caller_why() {
    let leader = Leader::serving().await.play_always(answer("ok"));
    let mut files = demo_files();
    files.chat_template = Some("{{ raise_exception('roles must alternate') }}".to_owned());
    let router = TestRouter::start(config(&[&leader]), files).await;
    router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    let status = all(&router, chat("user", "x")).await.unwrap_err();
    assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec!["chat".to_owned()]));
    assert!(status.message().contains("roles must alternate"), "{}", status.message());
}

#[tokio::test]
async fn a_prompt_above_the_byte_limit_is_refused_before_it_is_tokenized() {
    let leader = Leader::serving().await.play_always(answer("ok"));
    let limits = Limits { prompt_bytes_max: 10, ..Limits::default() };
    let router = TestRouter::start(Config { limits, ..config(&[&leader]) }, demo_files()).await;
    router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    assert!(all(&router, from_text("0123456789")).await.is_ok());
    let status = all(&router, from_text("0123456789!")).await.unwrap_err();
    assert_eq!(fields(&status), ["text"]);
    assert_eq!(fields(&all(&router, chat("user", "0123456789!")).await.unwrap_err()), ["chat.messages"]);
}

#[tokio::test]
async fn a_malformed_deadline_is_refused() {
    let router = ready().await;
    let mut request = tonic::Request::new(from_text("x"));
    request.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    let status = all(&router, request).await.unwrap_err();
    assert_eq!(fields(&status), ["grpc-timeout"]);
}
