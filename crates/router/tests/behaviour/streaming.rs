use proto::v1::finish::Matched;
use proto::{v1, worker};

use crate::support::{EOS, Leader, TestRouter, all, answer, chunk, from_ids, from_text, ids, last, soon};

#[tokio::test]
async fn text_streams_as_it_becomes_certain() {
    let text = "Grüße, 漢字!";
    let leader = Leader::serving().await.play_always(answer(text));
    let router = TestRouter::ready(&[&leader]).await;
    let messages = all(&router, from_text("Hello")).await.unwrap();

    let mut prompt = vec![5];
    prompt.extend(ids("Hello"));
    assert_eq!(messages[0].prompt.as_ref().unwrap().token_ids, prompt);
    assert!(messages[1..].iter().all(|m| m.prompt.is_none()));
    assert_eq!(messages.iter().map(|m| m.text.as_str()).collect::<String>(), text);
    let mut generated = ids(text);
    generated.push(EOS);
    let streamed: Vec<u32> = messages.iter().flat_map(|m| m.token_ids.clone()).collect();
    assert_eq!(streamed, generated);
    let (end, before) = messages.split_last().unwrap();
    assert!(before.iter().all(|m| m.finish.is_none() && m.usage.is_none()));
    let finish = end.finish.clone().unwrap();
    assert_eq!((finish.reason(), finish.matched), (v1::FinishReason::Stop, Some(Matched::TokenId(EOS))));
    let usage = end.usage.unwrap();
    assert_eq!(usage.prompt_tokens as usize, prompt.len());
    assert_eq!(usage.output_tokens as usize, generated.len());
}

#[tokio::test]
async fn once_is_the_stream_in_one_message() {
    let leader = Leader::serving().await.play_always(answer("All at once."));
    let router = TestRouter::ready(&[&leader]).await;
    let streamed = all(&router, from_text("Hi")).await.unwrap();
    let once = soon(router.client().await.generate_once(from_text("Hi"))).await.unwrap().into_inner();
    assert_eq!(once.text, "All at once.");
    assert_eq!(once.prompt, streamed[0].prompt);
    assert_eq!(once.token_ids, streamed.iter().flat_map(|m| m.token_ids.clone()).collect::<Vec<u32>>());
    assert_eq!(once.finish, streamed.last().unwrap().finish);
    assert_eq!(once.usage, streamed.last().unwrap().usage);
}

#[tokio::test]
async fn log_probabilities_reach_the_caller_beside_their_tokens() {
    let logprob = |id: u32| worker::TokenLogprob {
        token_id: id,
        logprob: -0.5,
        top: vec![worker::Alternative { token_id: id + 1, logprob: -0.25 }],
    };
    let of_prompt = |value| worker::GenerateChunk {
        prompt_logprobs: vec![worker::PromptLogprob { value }],
        ..worker::GenerateChunk::default()
    };
    let first = worker::GenerateChunk { logprobs: vec![logprob(300)], ..chunk(&[300]) };
    let end = worker::GenerateChunk {
        logprobs: vec![logprob(301)],
        ..last(&[301], worker::FinishReason::Length, None)
    };
    let script = vec![of_prompt(None), of_prompt(Some(logprob(11))), first, end];
    let leader = Leader::serving().await.play_always(script);
    let router = TestRouter::ready(&[&leader]).await;
    let messages = all(&router, from_ids(&[10, 11])).await.unwrap();

    assert_eq!(messages.len(), 2, "prompt log-probabilities come with the first tokens");
    let prompt = messages[0].prompt.clone().unwrap();
    assert_eq!(prompt.logprobs.len(), 2);
    assert_eq!(prompt.logprobs[0].value, None);
    assert_eq!(prompt.logprobs[1].value.as_ref().unwrap().token_id, 11);
    assert_eq!(messages[0].logprobs[0].top, [v1::Alternative { token_id: 301, logprob: -0.25 }]);
    assert_eq!(messages[1].logprobs[0].token_id, 301);
    let finish = messages[1].finish.clone().unwrap();
    assert_eq!((finish.reason(), finish.matched), (v1::FinishReason::Length, None));
}

#[tokio::test]
async fn markers_are_kept_when_asked_for() {
    let leader = Leader::serving().await.play_always(answer("<|START_TEXT|>Hi<|END_TEXT|>"));
    let router = TestRouter::ready(&[&leader]).await;
    let text = async |keep_special_tokens| {
        let response = Some(v1::Response { keep_special_tokens, ..v1::Response::default() });
        let messages = all(&router, v1::GenerateRequest { response, ..from_text("x") }).await.unwrap();
        messages.into_iter().map(|m| m.text).collect::<String>()
    };
    assert_eq!(text(false).await, "Hi");
    assert_eq!(text(true).await, "<|START_TEXT|>Hi<|END_TEXT|><|END_OF_TURN_TOKEN|>");
}

#[tokio::test]
async fn a_leader_gets_token_ids_and_checked_parameters() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let request = v1::GenerateRequest { request_id: "mine".to_owned(), ..from_ids(&[1, 2, 3]) };
    let call = tokio::spawn(async move { all(&router, request).await });
    let open = leader.next().await;
    assert_eq!(open.request.request_id, "mine");
    assert_eq!(open.request.prompt, [1, 2, 3]);
    let generation = open.request.generation.clone().unwrap();
    assert_eq!(generation.max_tokens, Some(61), "the room left in the context of 64");
    assert!(generation.seed.is_some(), "a seed is drawn when there is none");
    open.play(answer("ok")).await;
    assert_eq!(soon(call).await.unwrap().unwrap()[0].request_id, "mine");
}

#[tokio::test]
async fn the_request_id_is_echoed_or_drawn() {
    let leader = Leader::serving().await.play_always(answer("ok"));
    let router = TestRouter::ready(&[&leader]).await;
    let mut client = router.client().await;
    let mut request = tonic::Request::new(from_text("x"));
    request.metadata_mut().insert("x-request-id", "from-header".parse().unwrap());
    let echoed = soon(client.generate_once(request)).await.unwrap();
    assert_eq!(echoed.metadata().get("x-request-id").unwrap(), "from-header");
    assert_eq!(echoed.get_ref().request_id, "from-header");
    let drawn = soon(client.generate_once(from_text("x"))).await.unwrap();
    assert_eq!(drawn.get_ref().request_id.len(), 32);
    let refused = soon(client.generate_once(from_text(""))).await.unwrap_err();
    assert!(refused.metadata().get("x-request-id").is_some());
}
