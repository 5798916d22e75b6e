use proto::v1::generate_request::Prompt;
use proto::{Failure, v1};
use router::ModelFiles;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{
    Leader, TestRouter, all, answer, config, demo_files, failure, from_ids, from_text, soon, with_stop,
};

async fn with(files: ModelFiles) -> TestRouter {
    let leader = Leader::serving().await.play_always(answer("ok"));
    let router = TestRouter::start(config(&[&leader]), files).await;
    router.wait_for(ServingStatus::Serving).await;
    router
}

fn chat() -> v1::GenerateRequest {
    let messages = vec![v1::ChatMessage {
        role: "user".to_owned(),
        content: "x".to_owned(),
        ..v1::ChatMessage::default()
    }];
    let prompt =
        Some(Prompt::Chat(v1::ChatPrompt { messages, reasoning: None, ..v1::ChatPrompt::default() }));
    v1::GenerateRequest { prompt, ..v1::GenerateRequest::default() }
}

#[tokio::test]
async fn without_a_tokenizer_token_ids_are_served_with_empty_text() {
    let router = with(ModelFiles::default()).await;
    let messages = all(&router, from_ids(&[1, 2])).await.unwrap();
    assert!(messages.iter().all(|m| m.text.is_empty()));
    assert!(messages.iter().any(|m| !m.token_ids.is_empty()));
    let info = soon(router.client().await.get_model_info(v1::GetModelInfoRequest {})).await.unwrap();
    assert!(!info.get_ref().text && !info.get_ref().chat);
}

#[tokio::test]
async fn without_a_tokenizer_all_that_needs_one_is_refused_with_the_reason() {
    let router = with(ModelFiles::default()).await;
    let table =
        [(from_text("x"), "text"), (chat(), "chat"), (with_stop(from_ids(&[1]), &["x"]), "stopping.stop")];
    for (request, needed_for) in table {
        let status = all(&router, request).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(failure(&status), Failure::NoTokenizer { needed_for: needed_for.to_owned() });
        assert!(status.message().contains("tokenizer.json"));
    }
    let mut client = router.client().await;
    let prompt = Some(v1::tokenize_request::Prompt::Text("x".to_owned()));
    let status = soon(client.tokenize(v1::TokenizeRequest { prompt })).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let status = soon(client.detokenize(v1::DetokenizeRequest::default())).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn without_a_template_text_is_served_and_chat_is_refused() {
    let router = with(ModelFiles { chat_template: None, ..demo_files() }).await;
    assert!(all(&router, from_text("x")).await.is_ok());
    let status = all(&router, chat()).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(failure(&status), Failure::NoChatTemplate { needed_for: "chat".to_owned() });
}
