//! A leader by itself: what it tells routers, what it refuses, how it ends.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use proto::worker::{FinishReason, WatchRequest};
use proto::{Failure, Phase, RETRY_AFTER};
use support::{Client, Rank, config, demo, request};
use tonic::Code;
use types::limits::{RETRY_AFTER_MAX, RETRY_AFTER_MIN};
use worker::{Error, Report};

fn serving(config: worker::Config) -> (Rank, Client) {
    let rank = Rank::start(config);
    let client = Client::connect(rank.listening());
    rank.ready();
    (rank, client)
}

fn stop(rank: Rank) {
    rank.shutdown.cancel();
    rank.end().unwrap();
}

#[test]
fn the_listener_is_up_before_the_weights_are_read() {
    let rank = Rank::start(config(0, 1));
    // Whichever of the two is reported first.
    let listening = rank.wait(|report| match report {
        Report::Listening(_) => Some(true),
        Report::Loaded { .. } => Some(false),
        _ => None,
    });
    assert!(listening, "the weights were resident before anybody could ask how far they are");
    rank.ready();
    stop(rank);
}

#[test]
fn a_router_that_watches_learns_the_model_and_the_phases() {
    let (rank, client) = serving(config(0, 1));
    let mut watcher = client.client.clone();
    let state = client.runtime.block_on(async {
        let mut states = watcher.watch(WatchRequest { router_id: "r".into() }).await.unwrap().into_inner();
        loop {
            let state = states.message().await.unwrap().unwrap();
            if Phase::from_wire(state.phase) == Some(Phase::Serving) {
                return state;
            }
        }
    });
    let model = state.model.unwrap();
    assert_eq!((model.name.as_str(), model.vocab_size, model.context_tokens_max), ("demo", 4096, 2048));
    assert_eq!(model.eos_token_ids, [9, 6]);
    assert_eq!(model.config_hash.len(), 64);
    stop(rank);
}

#[test]
fn what_the_service_cannot_run_is_refused_with_its_field() {
    let (rank, client) = serving(config(0, 1));
    let table: [(_, Code, &str); 5] = [
        (request(vec![], 4), Code::InvalidArgument, "empty"),
        (request(vec![5, 4096], 4), Code::InvalidArgument, "prompt[1]"),
        (request(vec![5; 2048], 4), Code::OutOfRange, "2048"),
        (
            proto::worker::GenerateRequest { generation: None, ..request(vec![5], 4) },
            Code::InvalidArgument,
            "generation",
        ),
        (
            {
                let mut request = request(vec![5], 4);
                request.generation.as_mut().unwrap().top_p = Some(f32::NAN);
                request
            },
            Code::InvalidArgument,
            "generation.top_p",
        ),
    ];
    for (request, code, names) in table {
        let status = client.generate(request).unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(names), "no `{names}` in {status:?}");
    }
    assert_eq!(client.generate(request(vec![5, 600], 3)).unwrap().len(), 4);
    stop(rank);
}

#[test]
fn a_long_prompts_log_probabilities_come_in_several_messages() {
    let (rank, client) = serving(config(0, 1));
    let mut long = request((0..1500).map(|i| i % 4000).collect(), 1);
    long.generation.as_mut().unwrap().prompt_logprobs = Some(3);
    let chunks = client.generate(long).unwrap();
    assert!(chunks.iter().all(|chunk| chunk.prompt_logprobs.len() <= 512));
    let positions: Vec<_> = chunks.iter().flat_map(|chunk| &chunk.prompt_logprobs).collect();
    assert_eq!(positions.len(), 1500);
    assert!(positions[0].value.is_none());
    assert!(
        positions[1..].iter().all(|p| p.value.as_ref().is_some_and(|v| v.top.len() == 3 && v.logprob <= 0.0))
    );
    assert_eq!(chunks.last().unwrap().finish.unwrap().reason(), FinishReason::Length);
    stop(rank);
}

#[test]
fn a_full_queue_refuses_and_says_when_to_come_back() {
    let mut small = config(0, 1);
    small.limits.running_max = 1;
    small.limits.waiting_requests_max = 1;
    let (rank, client) = serving(small);
    let mut clients: Vec<_> = (0..6).map(|_| client.client.clone()).collect();
    let outcomes = client.runtime.block_on(async {
        let mut streams = Vec::new();
        for client in &mut clients {
            streams.push(client.generate(request(vec![5, 600], 1500)).await);
        }
        let mut codes = Vec::new();
        for stream in streams {
            let first = match stream {
                Ok(answer) => answer.into_inner().message().await,
                Err(status) => Err(status),
            };
            codes.push(first.err().map(|status| status.code()));
        }
        codes
    });
    assert_eq!(outcomes[0], None, "the first one runs: {outcomes:?}");
    assert!(outcomes.contains(&Some(Code::ResourceExhausted)), "{outcomes:?}");
    stop(rank);
}

#[test]
fn a_full_queue_says_when_to_come_back_by_how_soon_those_that_wait_begin() {
    let mut small = config(0, 1);
    small.limits.running_max = 1;
    small.limits.waiting_requests_max = 1;
    let (rank, client) = serving(small);
    client.runtime.block_on(async {
        let begin = async |tokens| {
            let mut client = client.client.clone();
            client.generate(request(vec![5, 600], tokens)).await.unwrap().into_inner()
        };
        let told = async || {
            let status = begin(1).await.message().await.unwrap_err();
            Failure::from_status(&status).unwrap().retry_after().unwrap()
        };
        let mut runs = begin(400).await;
        runs.message().await.unwrap().unwrap();
        let mut waits = begin(1500).await;
        assert_eq!(told().await, RETRY_AFTER, "nobody has begun since the queue is full");
        while runs.message().await.unwrap().is_some() {}
        waits.message().await.unwrap().unwrap();
        let _next = begin(1500).await;
        let wait = told().await;
        assert_ne!(wait, RETRY_AFTER, "one has begun meanwhile");
        assert!((RETRY_AFTER_MIN..=RETRY_AFTER_MAX).contains(&wait), "{wait:?}");
    });
    stop(rank);
}

#[test]
fn an_order_to_stop_lets_open_requests_finish_and_takes_no_new_ones() {
    let (rank, client) = serving(config(0, 1));
    let (mut first, mut second) = (client.client.clone(), client.client.clone());
    let (received, refused) = client.runtime.block_on(async {
        let mut stream = first.generate(request(vec![5, 600], 400)).await.unwrap().into_inner();
        let mut received = stream.message().await.unwrap().unwrap().token_ids.len();
        let mut states = second.watch(WatchRequest::default()).await.unwrap().into_inner();
        rank.shutdown.cancel();
        while Phase::from_wire(states.message().await.unwrap().unwrap().phase) != Some(Phase::Draining) {}
        let refused = second.generate(request(vec![5], 1)).await.map(drop).unwrap_err();
        while let Some(chunk) = stream.message().await.unwrap() {
            received += chunk.token_ids.len();
        }
        (received, refused)
    });
    assert_eq!(received, 400);
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    rank.end().unwrap();
}

#[test]
fn weights_that_are_not_numbers_are_found_before_anybody_is_served() {
    let model = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json"] {
        std::fs::copy(demo().join(file), model.path().join(file)).unwrap();
    }
    let mut bytes = std::fs::read(demo().join("model.safetensors")).unwrap();
    // A bf16 NaN in the final norm, which every token passes.
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let names: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let norm = names["model.norm.weight"]["data_offsets"][0].as_u64().unwrap() as usize + 8 + header;
    bytes[norm..norm + 2].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    std::fs::write(model.path().join("model.safetensors"), bytes).unwrap();
    let rank =
        Rank::start(worker::Config { model: model::Files::Directory(model.path().into()), ..config(0, 1) });
    let error = rank.end().unwrap_err();
    assert!(matches!(error, Error::WarmUp { .. }) && error.to_string().contains("not a number"), "{error}");
}

#[test]
fn a_follower_ends_in_good_order_with_its_leader() {
    let leader = Rank::start(config(0, 2));
    let rendezvous = leader.wait(|r| if let Report::Rendezvous(address) = r { Some(*address) } else { None });
    let follower = Rank::start(worker::Config { rendezvous, ..config(1, 2) });
    leader.ready();
    follower.ready();
    stop(leader);
    follower.end().unwrap();
}

#[test]
fn a_budget_that_cannot_work_is_refused_with_its_numbers() {
    let mut bad = config(0, 1);
    bad.limits.step_tokens_max = 4;
    let error = Rank::start(bad).end().unwrap_err().to_string();
    assert!(error.contains("step_tokens_max is 4") || error.contains("step_tokens_max"), "{error}");
}
