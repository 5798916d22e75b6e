use futures::stream;
use proto::v1;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::{v1 as reflection, v1alpha};

use crate::support::{CONTEXT, EOS, Leader, TestRouter, VOCAB, ids, soon};

#[tokio::test]
async fn the_model_and_its_limits_are_told() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let info =
        soon(router.client().await.get_model_info(v1::GetModelInfoRequest {})).await.unwrap().into_inner();
    let expected = v1::GetModelInfoResponse {
        model: "demo".to_owned(),
        vocab_size: VOCAB,
        context_tokens_max: CONTEXT,
        eos_token_ids: vec![EOS],
        text: true,
        chat: true,
        dtype: "float32".to_owned(),
        tensor_parallel: 2,
        groups: 1,
        groups_ready: 1,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    assert_eq!(info, expected);
}

#[tokio::test]
async fn what_the_ranks_of_each_group_did_is_told_over_all_its_ranks() {
    let (one, other) = (Leader::serving().await, Leader::serving().await);
    let router = TestRouter::ready(&[&one.address, &other.address]).await;
    let answer =
        soon(router.client().await.get_activity(v1::GetActivityRequest {})).await.unwrap().into_inner();
    let group = |leader: &Leader| v1::GroupActivity {
        address: leader.address.clone(),
        plan: "tensor=2".to_owned(),
        ranks: 2,
        steps: 7,
        tokens: 9,
        calls: 100,
        messages_sent: 200,
        bytes_sent: 2000,
    };
    assert_eq!(answer.groups, [group(&one), group(&other)]);
}

#[tokio::test]
async fn text_and_tokens_go_both_ways() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut client = router.client().await;
    let prompt = Some(v1::tokenize_request::Prompt::Text("Hello".to_owned()));
    let tokens = soon(client.tokenize(v1::TokenizeRequest { prompt })).await.unwrap().into_inner();
    assert_eq!(tokens.rendered, "Hello");
    assert_eq!((tokens.token_ids[0], &tokens.token_ids[1..]), (5, &ids("Hello")[..]));
    let request = |keep_special_tokens| v1::DetokenizeRequest {
        token_ids: tokens.token_ids.clone(),
        keep_special_tokens,
    };
    assert_eq!(soon(client.detokenize(request(false))).await.unwrap().into_inner().text, "Hello");
    assert_eq!(soon(client.detokenize(request(true))).await.unwrap().into_inner().text, "<BOS_TOKEN>Hello");

    let messages = vec![v1::ChatMessage {
        role: "user".to_owned(),
        content: "Hi".to_owned(),
        ..v1::ChatMessage::default()
    }];
    let prompt = Some(v1::tokenize_request::Prompt::Chat(v1::ChatPrompt {
        messages,
        reasoning: Some(false),
        ..v1::ChatPrompt::default()
    }));
    let chat = soon(client.tokenize(v1::TokenizeRequest { prompt })).await.unwrap().into_inner();
    assert!(chat.rendered.starts_with("<BOS_TOKEN>") && chat.rendered.ends_with("<|END_THINKING|>"));
    assert_eq!(chat.token_ids.iter().filter(|&&id| id == 5).count(), 1, "BOS comes once");
}

#[tokio::test]
async fn reflection_lists_the_services_in_both_versions() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let request = reflection::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(router.channel().await);
    let answers = soon(client.server_reflection_info(stream::iter([request]))).await.unwrap();
    let answer = soon(answers.into_inner().message()).await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}")
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.contains(&"cohort.v1.Cohort".to_owned()), "{names:?}");
    assert!(
        !names.iter().any(|name| name.contains("worker")),
        "the inner API is not offered here: {names:?}"
    );

    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
            "cohort.v1.Cohort".to_owned(),
        )),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(router.channel().await);
    let answers = soon(client.server_reflection_info(stream::iter([request]))).await.unwrap();
    let answer = soon(answers.into_inner().message()).await.unwrap().unwrap();
    let found = v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse;
    match answer.message_response {
        Some(response)
            if std::mem::discriminant(&response) == std::mem::discriminant(&found(Default::default())) => {}
        other => panic!("{other:?}"),
    }
}
