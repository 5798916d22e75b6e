//! vLLM's gRPC API, spoken by its published client.

use proto::{Failure, Phase, worker};
use tonic::{Code, Request, Status};
use vllm_proto as vllm;
use vllm_proto::candidate_tokens::Select;
use vllm_proto::control_client::ControlClient;
use vllm_proto::finish_info::{FinishReason, StopReason};
use vllm_proto::generate_request::Prompt;
use vllm_proto::inference_client::InferenceClient;

use crate::support::{
    EOS, Leader, TestRouter, answer, chunk, facts, failure, fields, ids, last, soon, state,
};

fn from_ids(ids: &[u32]) -> vllm::GenerateRequest {
    vllm::GenerateRequest {
        prompt: Some(Prompt::TokenIds(vllm::TokenIds { ids: ids.to_vec() })),
        ..vllm::GenerateRequest::default()
    }
}

async fn once(router: &TestRouter, request: vllm::GenerateRequest) -> Result<vllm::GenerateResponse, Status> {
    let mut client = InferenceClient::new(router.channel().await);
    soon(client.generate(request)).await.map(tonic::Response::into_inner)
}

async fn stream(
    router: &TestRouter,
    request: vllm::GenerateRequest,
) -> Result<Vec<vllm::GenerateResponse>, Status> {
    let mut client = InferenceClient::new(router.channel().await);
    let mut stream = soon(client.generate_stream(request)).await?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = soon(stream.message()).await? {
        messages.push(message);
    }
    Ok(messages)
}

fn finish(message: &vllm::GenerateResponse) -> vllm::FinishInfo {
    message.outputs.as_ref().unwrap().finish_info.clone().unwrap()
}

#[tokio::test]
async fn a_stream_has_the_prompt_first_and_the_finish_last() {
    let leader = Leader::serving().await.play_always(answer("Hello there"));
    let router = TestRouter::ready(&[&leader]).await;
    let response = vllm::ResponseOptions {
        prompt_token_ids: true,
        output_token_ids: true,
        ..vllm::ResponseOptions::default()
    };
    let messages = stream(&router, vllm::GenerateRequest { response: Some(response), ..from_ids(&[5, 6]) })
        .await
        .unwrap();
    let prompt = messages[0].prompt_info.clone().unwrap();
    assert_eq!((prompt.num_prompt_tokens, prompt.token_ids), (2, vec![5, 6]));
    assert!(messages[1..].iter().all(|message| message.prompt_info.is_none()));
    let outputs: Vec<&vllm::SequenceOutput> = messages.iter().filter_map(|m| m.outputs.as_ref()).collect();
    let text: String = outputs.iter().map(|output| output.text.as_str()).collect();
    assert_eq!(text, "Hello there");
    let all: Vec<u32> = outputs.iter().flat_map(|output| output.token_ids.clone()).collect();
    assert_eq!(all, [ids("Hello there"), vec![EOS]].concat());
    let tokens: u32 = outputs.iter().map(|output| output.num_tokens).sum();
    let end = finish(messages.last().unwrap());
    assert_eq!(
        (end.finish_reason(), end.stop_reason),
        (FinishReason::Stop, Some(StopReason::EosTokenId(EOS)))
    );
    assert_eq!(end.num_output_tokens, tokens);
}

#[tokio::test]
async fn what_is_not_asked_for_is_not_shown() {
    let leader = Leader::serving().await.play_always(answer("Hello there"));
    let router = TestRouter::ready(&[&leader]).await;
    let whole = once(&router, from_ids(&[5])).await.unwrap();
    let output = whole.outputs.unwrap();
    assert_eq!(output.text, "Hello there");
    assert!(output.token_ids.is_empty() && output.logprobs.is_empty() && output.candidate_tokens.is_empty());
    assert!(whole.prompt_info.unwrap().token_ids.is_empty());
    let response = vllm::ResponseOptions { output_text: Some(false), ..vllm::ResponseOptions::default() };
    let silent =
        once(&router, vllm::GenerateRequest { response: Some(response), ..from_ids(&[5]) }).await.unwrap();
    let output = silent.outputs.unwrap();
    assert_eq!(
        (output.text.as_str(), output.num_tokens),
        ("", output.finish_info.unwrap().num_output_tokens)
    );
}

#[tokio::test]
async fn defaults_are_vllms_and_values_reach_the_leader() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let plain = tokio::spawn({
        let mut client = InferenceClient::new(router.channel().await);
        async move { client.generate(from_ids(&[5])).await }
    });
    let open = leader.next().await;
    let generation = open.request.generation.clone().unwrap();
    assert_eq!((generation.max_tokens, generation.temperature), (Some(20), Some(0.0)));
    open.play(answer("x")).await;
    soon(plain).await.unwrap().unwrap();

    let request = vllm::GenerateRequest {
        temperature: Some(0.5),
        sampling: Some(vllm::RandomSampling {
            top_k: Some(3),
            top_p: Some(0.5),
            min_p: Some(0.25),
            seed: Some(-1),
            num_sequences: 1,
        }),
        stopping: Some(vllm::StoppingCriteria {
            max_new_tokens: 7,
            min_new_tokens: 2,
            stop_token_ids: vec![11],
            ignore_eos: true,
            thinking_token_budget: Some(-1),
            ..vllm::StoppingCriteria::default()
        }),
        decoding: Some(vllm::DecodingParameters {
            presence_penalty: 0.5,
            frequency_penalty: -0.5,
            logit_bias: [(7, 1.5)].into(),
            allowed_token_ids: vec![7, 8, 11],
            bad_words_token_ids: vec![vllm::TokenIds { ids: vec![7, 8] }],
            ..vllm::DecodingParameters::default()
        }),
        kv: Some(vllm::KvCacheParameters {
            cache_salt: "mine".to_owned(),
            ..vllm::KvCacheParameters::default()
        }),
        priority: -3,
        watermarking: Some(true),
        ..from_ids(&[5])
    };
    let asked = tokio::spawn({
        let mut client = InferenceClient::new(router.channel().await);
        async move { client.generate(request).await }
    });
    let open = leader.next().await;
    let got = open.request.generation.clone().unwrap();
    assert_eq!((got.max_tokens, got.min_tokens, got.temperature), (Some(7), Some(2), Some(0.5)));
    assert_eq!((got.top_k, got.top_p, got.min_p, got.seed), (Some(3), Some(0.5), Some(0.25), Some(u64::MAX)));
    assert_eq!((got.stop_token_ids, got.ignore_eos), (vec![11], true));
    assert_eq!((got.presence_penalty, got.frequency_penalty), (Some(0.5), Some(-0.5)));
    assert_eq!((got.logit_bias, got.allowed_token_ids), ([(7, 1.5)].into(), vec![7, 8, 11]));
    assert_eq!(got.bad_words[0].ids, [7, 8]);
    // A lower number goes first there, a higher one below.
    assert_eq!((open.request.priority, open.request.cache_salt.len()), (3, 16));
    open.play(vec![last(&[11], worker::FinishReason::StopToken, Some(11))]).await;
    let end = finish(&soon(asked).await.unwrap().unwrap().into_inner());
    assert_eq!(end.stop_reason, Some(StopReason::StopTokenId(11)));
}

#[tokio::test]
async fn stop_strings_are_left_out_unless_they_are_wanted() {
    let leader = Leader::serving().await.play_always(answer("one two three"));
    let router = TestRouter::ready(&[&leader]).await;
    for (include, text) in [(false, "one "), (true, "one two")] {
        let stopping = vllm::StoppingCriteria {
            stop_strings: vec!["two".to_owned()],
            include_stop_strings: include,
            ..vllm::StoppingCriteria::default()
        };
        let whole = once(&router, vllm::GenerateRequest { stopping: Some(stopping), ..from_ids(&[5]) })
            .await
            .unwrap();
        assert_eq!(finish(&whole).stop_reason, Some(StopReason::StopString("two".to_owned())));
        assert_eq!(whole.outputs.unwrap().text, text);
    }
}

#[tokio::test]
async fn log_probabilities_come_with_ranks_and_candidates() {
    let top = |entries: &[(u32, f32)]| {
        entries
            .iter()
            .map(|&(token_id, logprob)| worker::Alternative { token_id, logprob })
            .collect::<Vec<_>>()
    };
    let position =
        worker::TokenLogprob { token_id: 8, logprob: -1.5, top: top(&[(7, -0.5), (8, -1.5), (9, -2.0)]) };
    let far = worker::TokenLogprob { token_id: 30, logprob: -9.0, top: top(&[(7, -0.5), (8, -1.5)]) };
    let prompt =
        vec![worker::PromptLogprob { value: None }, worker::PromptLogprob { value: Some(position.clone()) }];
    let mut end = last(&[8, 30], worker::FinishReason::Length, None);
    end.logprobs = vec![position, far];
    let first = worker::GenerateChunk { prompt_logprobs: prompt, ..worker::GenerateChunk::default() };
    let leader = Leader::serving().await.play_always(vec![first, end]);
    let router = TestRouter::ready(&[&leader]).await;
    let best = |most| Some(vllm::CandidateTokens { select: Some(Select::TopN(most)) });
    let response = vllm::ResponseOptions {
        prompt_logprobs: true,
        prompt_candidates: best(1),
        output_logprobs: true,
        output_candidates: best(2),
        ..vllm::ResponseOptions::default()
    };
    let whole =
        once(&router, vllm::GenerateRequest { response: Some(response), ..from_ids(&[5, 8]) }).await.unwrap();
    let candidates = |infos: &[vllm::CandidateTokenInfo]| -> Vec<Vec<(u32, u32)>> {
        infos.iter().map(|info| info.tokens.iter().map(|token| (token.id, token.rank)).collect()).collect()
    };
    let prompt = whole.prompt_info.unwrap();
    assert_eq!((prompt.logprobs, prompt.ranks), (vec![0.0, -1.5], vec![0, 2]));
    assert_eq!(candidates(&prompt.candidate_tokens), [vec![], vec![(7, 1)]]);
    let output = whole.outputs.unwrap();
    assert_eq!((output.logprobs, output.ranks), (vec![-1.5, -9.0], vec![2, 0]));
    assert_eq!(candidates(&output.candidate_tokens), [vec![(7, 1)], vec![(7, 1), (8, 2)]]);
}

#[tokio::test]
async fn a_prompt_is_cut_to_its_last_tokens_when_asked() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let text = Some(Prompt::Text("one two three four".to_owned()));
    let whole = ids("one two three four");
    let request =
        vllm::GenerateRequest { prompt: text, truncate_prompt_tokens: 2, ..vllm::GenerateRequest::default() };
    let asked = tokio::spawn({
        let mut client = InferenceClient::new(router.channel().await);
        async move { client.generate(request).await }
    });
    let open = leader.next().await;
    assert_eq!(open.request.prompt, whole[whole.len() - 2..]);
    open.play(answer("x")).await;
    soon(asked).await.unwrap().unwrap();
}

#[tokio::test]
async fn several_sequences_stream_side_by_side() {
    let leader = Leader::serving().await.play_always(answer("Hello"));
    let router = TestRouter::ready(&[&leader]).await;
    let sampling = vllm::RandomSampling { num_sequences: 3, ..vllm::RandomSampling::default() };
    let request = vllm::GenerateRequest { sampling: Some(sampling), ..from_ids(&[5]) };
    let messages = stream(&router, request.clone()).await.unwrap();
    assert_eq!(messages.iter().filter(|message| message.prompt_info.is_some()).count(), 1);
    for index in 0..3 {
        let outputs = messages.iter().filter_map(|message| message.outputs.as_ref());
        let own: Vec<&vllm::SequenceOutput> = outputs.filter(|output| output.index == index).collect();
        assert_eq!(own.iter().map(|output| output.text.as_str()).collect::<String>(), "Hello");
        assert!(own.last().unwrap().finish_info.is_some());
    }
    assert_eq!(fields(&once(&router, request).await.unwrap_err()), ["sampling.num_sequences"]);
    let many = vllm::RandomSampling { num_sequences: 1000, ..vllm::RandomSampling::default() };
    let refused = stream(&router, vllm::GenerateRequest { sampling: Some(many), ..from_ids(&[5]) }).await;
    assert_eq!(fields(&refused.unwrap_err()), ["sampling.num_sequences"]);
}

fn unsupported() -> Vec<(vllm::GenerateRequest, &'static str)> {
    let kv = |kv| vllm::GenerateRequest { kv: Some(kv), ..from_ids(&[5]) };
    let candidates = |select| {
        let output_candidates = Some(vllm::CandidateTokens { select: Some(select) });
        let response = vllm::ResponseOptions { output_candidates, ..vllm::ResponseOptions::default() };
        vllm::GenerateRequest { response: Some(response), ..from_ids(&[5]) }
    };
    vec![
        (vllm::GenerateRequest { media: vec![vllm::MediaItem::default()], ..from_ids(&[5]) }, "media"),
        (vllm::GenerateRequest { lora_name: "l".into(), ..from_ids(&[5]) }, "lora_name"),
        (
            vllm::GenerateRequest { kv_hints: Some(vllm::KvHintsEnvelope::default()), ..from_ids(&[5]) },
            "kv_hints",
        ),
        (
            vllm::GenerateRequest {
                engine_reasoning_gate: Some(vllm::EngineReasoningGate::default()),
                ..from_ids(&[5])
            },
            "engine_reasoning_gate",
        ),
        (
            kv(vllm::KvCacheParameters {
                kv_transfer_params: Some(Default::default()),
                ..Default::default()
            }),
            "kv.kv_transfer_params",
        ),
        (
            kv(vllm::KvCacheParameters {
                ec_transfer_params: Some(Default::default()),
                ..Default::default()
            }),
            "kv.ec_transfer_params",
        ),
        (candidates(Select::All(true)), "response.output_candidates.all"),
        (candidates(Select::TokenIds(vllm::TokenIds::default())), "response.output_candidates.token_ids"),
    ]
}

fn wrong() -> Vec<(vllm::GenerateRequest, &'static str)> {
    let candidates = |select| {
        let output_candidates = Some(vllm::CandidateTokens { select: Some(select) });
        let response = vllm::ResponseOptions { output_candidates, ..vllm::ResponseOptions::default() };
        vllm::GenerateRequest { response: Some(response), ..from_ids(&[5]) }
    };
    let decoding = |decoding| vllm::GenerateRequest { decoding: Some(decoding), ..from_ids(&[5]) };
    let stopping = |stopping| vllm::GenerateRequest { stopping: Some(stopping), ..from_ids(&[5]) };
    vec![
        (candidates(Select::TopN(1000)), "response.output_candidates"),
        (vllm::GenerateRequest { temperature: Some(-1.0), ..from_ids(&[5]) }, "temperature"),
        (vllm::GenerateRequest { priority: 1000, ..from_ids(&[5]) }, "priority"),
        (
            decoding(vllm::DecodingParameters {
                structured_output: Some(vllm::decoding_parameters::StructuredOutput::Regex("[a".into())),
                ..Default::default()
            }),
            "decoding.regex",
        ),
        (
            stopping(vllm::StoppingCriteria { thinking_token_budget: Some(-2), ..Default::default() }),
            "stopping.thinking_token_budget",
        ),
        (
            decoding(vllm::DecodingParameters { presence_penalty: 9.0, ..Default::default() }),
            "decoding.presence_penalty",
        ),
        (
            decoding(vllm::DecodingParameters { logit_bias: [(9999, 1.0)].into(), ..Default::default() }),
            "decoding.logit_bias",
        ),
        (
            decoding(vllm::DecodingParameters {
                bad_words_token_ids: vec![vllm::TokenIds::default()],
                ..Default::default()
            }),
            "decoding.bad_words_token_ids",
        ),
        (
            stopping(vllm::StoppingCriteria { min_new_tokens: 30, ..Default::default() }),
            "stopping.min_new_tokens",
        ),
        (
            stopping(vllm::StoppingCriteria { stop_strings: vec![String::new()], ..Default::default() }),
            "stopping.stop_strings[0]",
        ),
        (from_ids(&[5000]), "token_ids.ids[0]"),
        (vllm::GenerateRequest::default(), "prompt"),
    ]
}

#[tokio::test]
async fn a_field_that_does_not_work_is_refused_by_its_name() {
    let leader = Leader::serving().await.play_always(answer("x"));
    let router = TestRouter::ready(&[&leader]).await;
    for (request, field) in unsupported().into_iter().chain(wrong()) {
        let shown = format!("{request:?}");
        let status = once(&router, request).await.expect_err(&shown);
        assert_eq!(
            (status.code(), fields(&status)),
            (Code::InvalidArgument, vec![field.to_owned()]),
            "{shown}"
        );
    }
}

#[tokio::test]
async fn abort_ends_a_request_by_its_id_and_can_be_repeated() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut client = InferenceClient::new(router.channel().await);
    let request = vllm::GenerateRequest { request_id: "mine".to_owned(), ..from_ids(&[5]) };
    let mut running = client.generate_stream(request).await.unwrap().into_inner();
    let open = tokio::join!(leader.next(), async {}).0;
    open.chunks.send(Ok(chunk(&ids("Hi")[..1]))).await.unwrap();
    soon(running.message()).await.unwrap().unwrap();

    let mut control = ControlClient::new(router.channel().await);
    for _ in 0..2 {
        let request_ids = vec!["mine".to_owned(), "nobody's".to_owned()];
        control.abort(Request::new(vllm::AbortRequest { request_ids })).await.unwrap();
    }
    let end = finish(&soon(running.message()).await.unwrap().unwrap());
    assert_eq!((end.finish_reason(), end.num_output_tokens), (FinishReason::Aborted, 1));
    assert!(soon(running.message()).await.unwrap().is_none());
    soon(open.chunks.closed()).await;
}

#[tokio::test]
async fn a_request_of_another_api_is_aborted_with_a_status() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let request =
        proto::v1::GenerateRequest { request_id: "mine".to_owned(), ..crate::support::from_ids(&[5]) };
    let running = tokio::spawn({
        let mut client = router.client().await;
        async move { client.generate_once(request).await }
    });
    let open = leader.next().await;
    let mut control = ControlClient::new(router.channel().await);
    control.abort(vllm::AbortRequest { request_ids: vec!["mine".to_owned()] }).await.unwrap();
    let status = soon(running).await.unwrap().unwrap_err();
    assert_eq!((status.code(), failure(&status)), (Code::Cancelled, Failure::Cancelled));
    soon(open.chunks.closed()).await;
}

#[tokio::test]
async fn the_server_and_its_model_are_described() {
    let mut serving = state(Phase::Serving, 100, Some(facts("demo")));
    serving.load = Some(worker::Load { kv_blocks: 128, ..worker::Load::default() });
    let leader = Leader::start(serving).await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut control = ControlClient::new(router.channel().await);
    let server = control.get_server_info(vllm::GetServerInfoRequest {}).await.unwrap().into_inner();
    let parallelism = server.parallelism.unwrap();
    assert_eq!(
        (parallelism.tensor_parallel_size, parallelism.data_parallel_size, parallelism.world_size),
        (2, 1, 2)
    );
    assert_eq!((server.max_model_len, server.total_kv_blocks), (64, 128));
    assert_eq!(server.proto_version, vllm::VERSION);
    assert!(!server.instance_id.is_empty() && !server.engine_version.is_empty());
    let model = control.get_model_info(vllm::GetModelInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((model.model_id.as_str(), model.served_model_name.as_str()), ("demo", "demo"));
    assert!(model.supports_text_input && model.supports_token_ids_input && !model.supports_multimodal);
    let unserved = control.is_paused(vllm::IsPausedRequest {}).await.unwrap_err();
    assert_eq!(unserved.code(), Code::Unimplemented);
}
