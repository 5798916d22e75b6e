//! What the engine can do, asked for over the wire.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::collections::BTreeMap;

use proto::worker::{CancelRequest, FinishReason, GenerateChunk, GenerateRequest, Generation, TokenIds};
use support::{Client, Rank, config, request};
use tonic::Code;

fn serving() -> (Rank, Client) {
    let rank = Rank::start(config(0, 1));
    let client = Client::connect(rank.listening());
    rank.ready();
    (rank, client)
}

fn stop(rank: Rank) {
    rank.shutdown.cancel();
    rank.end().unwrap();
}

fn prompt(tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| 20 + i * 37 % 4000).collect()
}

/// A request that draws by chance.
fn drawn(prompt: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    let mut request = request(prompt, max_tokens);
    let generation = request.generation.as_mut().unwrap();
    generation.temperature = Some(1.0);
    generation.seed = Some(11);
    request
}

fn with(mut request: GenerateRequest, change: impl FnOnce(&mut Generation)) -> GenerateRequest {
    change(request.generation.as_mut().unwrap());
    request
}

/// Tokens of each sequence, by its index.
fn tokens(chunks: &[GenerateChunk]) -> BTreeMap<u32, Vec<u32>> {
    let mut all: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for chunk in chunks {
        all.entry(chunk.index).or_default().extend(&chunk.token_ids);
    }
    all
}

/// What each sequence found computed, in the order of their first tokens.
fn cached(chunks: &[GenerateChunk]) -> Vec<u32> {
    chunks.iter().filter_map(|chunk| chunk.cached_tokens).collect()
}

#[test]
fn several_sequences_come_in_one_stream_and_compute_the_prompt_once() {
    let (rank, client) = serving();
    let chunks = client.generate(with(drawn(prompt(100), 6), |g| g.n = Some(3))).unwrap();
    let all = tokens(&chunks);
    assert_eq!(all.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
    assert!(
        all.values().all(|tokens| tokens.len() == 6) && all[&0] != all[&1] && all[&1] != all[&2],
        "{all:?}"
    );
    assert_eq!(cached(&chunks), [0, 96, 96]);
    let ends: Vec<_> = chunks.iter().filter(|chunk| chunk.finish.is_some()).collect();
    assert_eq!(ends.len(), 3);
    assert!(ends.iter().all(|end| end.finish.unwrap().reason() == FinishReason::Length));
    let alone = client.generate(drawn(prompt(100), 6)).unwrap();
    assert_eq!(tokens(&alone)[&0], all[&0], "the first of several is the only one of one");
    stop(rank);
}

#[test]
fn leaving_the_stream_of_several_sequences_frees_all_of_them() {
    let mut config = config(0, 1);
    config.limits.running_max = 3;
    let rank = Rank::start(config);
    let client = Client::connect(rank.listening());
    rank.ready();
    let mut leaving = client.client.clone();
    client.runtime.block_on(async {
        let request = with(drawn(prompt(20), 1900), |g| g.n = Some(3));
        let mut stream = leaving.generate(request).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap();
    });
    // All three places are taken unless all three sequences left; 1900 tokens would take far longer than this.
    let chunks = client.generate(with(drawn(prompt(20), 3), |g| g.n = Some(3))).unwrap();
    assert!(tokens(&chunks).values().all(|tokens| tokens.len() == 3));
    stop(rank);
}

#[test]
fn one_of_several_sequences_is_cancelled_and_the_others_go_on() {
    let (rank, client) = serving();
    let key = 0x1234_5678_9abc_def0;
    let request = GenerateRequest { key, ..with(drawn(prompt(20), 400), |g| g.n = Some(2)) };
    let whole = tokens(&client.generate(request.clone()).unwrap());
    let (mut asking, mut cancelling) = (client.client.clone(), client.client.clone());
    let chunks = client.runtime.block_on(async {
        let mut stream = asking.generate(request).await.unwrap().into_inner();
        let mut chunks = vec![stream.message().await.unwrap().unwrap()];
        for cancel in [(key, 1), (key, 1), (key, 2), (key + 1, 0), (0, 0)] {
            cancelling.cancel(CancelRequest { key: cancel.0, index: cancel.1 }).await.unwrap();
        }
        while let Some(chunk) = stream.message().await.unwrap() {
            chunks.push(chunk);
        }
        chunks
    });
    let all = tokens(&chunks);
    assert_eq!(all[&0], whole[&0]);
    assert!(all.get(&1).map_or(0, Vec::len) < 400, "it ran to its end");
    let ended: Vec<u32> =
        chunks.iter().filter(|chunk| chunk.finish.is_some()).map(|chunk| chunk.index).collect();
    assert_eq!(ended, [0]);
    stop(rank);
}

#[test]
fn computed_blocks_are_found_by_those_that_may_find_them() {
    let (rank, client) = serving();
    let ask = |salt: &[u8], bypass: bool| {
        let request = GenerateRequest {
            cache_salt: salt.to_vec(),
            bypass_prefix_cache: bypass,
            ..request(prompt(70), 2)
        };
        let chunks = client.generate(request).unwrap();
        (cached(&chunks), tokens(&chunks))
    };
    let (first, answer) = ask(&[], false);
    let (again, same) = ask(&[], false);
    assert_eq!((first, again), (vec![0], vec![64]));
    assert_eq!(answer, same);
    assert_eq!(ask(&[], true), (vec![0], answer.clone()));
    assert_eq!(ask(&[1; 16], false), (vec![0], answer.clone()));
    assert_eq!(ask(&[1; 16], false), (vec![64], answer.clone()));
    assert_eq!(ask(&[2; 16], false), (vec![0], answer));
    stop(rank);
}

#[test]
fn a_sequence_goes_on_from_the_tokens_it_had() {
    let (rank, client) = serving();
    let rules = |g: &mut Generation| {
        g.n = Some(2);
        g.frequency_penalty = Some(1.5);
        g.repetition_penalty = Some(1.2);
        g.min_tokens = Some(5);
        g.ignore_eos = false;
        g.bad_words = vec![TokenIds { ids: vec![30, 31] }];
    };
    let whole = tokens(&client.generate(with(drawn(prompt(40), 12), rules)).unwrap());
    for (index, tokens_of) in &whole {
        for had in [1, 4, tokens_of.len() - 1] {
            let mut resumed = with(drawn(prompt(40), 12), rules);
            resumed.generation.as_mut().unwrap().n = None;
            resumed.first_stream = *index;
            resumed.resume_tokens = tokens_of[..had].to_vec();
            let chunks = client.generate(resumed).unwrap();
            assert_eq!(tokens(&chunks)[index], tokens_of[had..], "sequence {index} after {had} tokens");
        }
    }
    stop(rank);
}

#[test]
fn rules_decide_which_tokens_come() {
    let (rank, client) = serving();
    let ask = |change: &dyn Fn(&mut Generation)| {
        tokens(&client.generate(with(request(prompt(30), 8), change)).unwrap())[&0].clone()
    };
    let free = ask(&|_| {});
    assert!(ask(&|g| g.logit_bias = [(77, 100.0)].into()).iter().all(|&id| id == 77));
    assert!(ask(&|g| g.allowed_token_ids = vec![50, 60]).iter().all(|id| [50, 60].contains(id)));
    let bad = ask(&|g| g.bad_words = vec![TokenIds { ids: vec![free[0]] }]);
    assert!(!bad.contains(&free[0]), "{bad:?} has {}", free[0]);
    let penalised = ask(&|g| {
        g.allowed_token_ids = vec![50, 60];
        g.presence_penalty = Some(2.0);
        g.logit_bias = [(50, 0.5), (60, 0.5)].into();
    });
    assert_eq!(penalised.len(), 8);
    stop(rank);
}

#[test]
fn what_cannot_be_done_is_refused_by_its_name() {
    let (rank, client) = serving();
    let plain = || request(prompt(5), 4);
    let table: Vec<(GenerateRequest, &str)> = vec![
        (GenerateRequest { priority: 101, ..plain() }, "priority"),
        (GenerateRequest { cache_salt: vec![1; 15], ..plain() }, "cache_salt"),
        (GenerateRequest { cache_salt: vec![1; 16], bypass_prefix_cache: true, ..plain() }, "cache_salt"),
        (GenerateRequest { resume_tokens: vec![4096], ..plain() }, "resume_tokens"),
        (GenerateRequest { resume_tokens: vec![5; 4], ..plain() }, "resume_tokens"),
        (GenerateRequest { resume_tokens: vec![5], ..with(plain(), |g| g.n = Some(2)) }, "resume_tokens"),
        (GenerateRequest { first_stream: 128, ..plain() }, "first_stream"),
        (GenerateRequest { first_stream: u32::MAX, ..plain() }, "first_stream"),
        (with(plain(), |g| g.n = Some(0)), "generation.n"),
        (with(plain(), |g| g.n = Some(9)), "generation.n"),
        (with(plain(), |g| g.n = Some(u32::MAX)), "generation.n"),
        (with(plain(), |g| g.presence_penalty = Some(f32::NAN)), "generation.presence_penalty"),
        (with(plain(), |g| g.frequency_penalty = Some(2.5)), "generation.frequency_penalty"),
        (with(plain(), |g| g.repetition_penalty = Some(0.0)), "generation.repetition_penalty"),
        (with(plain(), |g| g.logit_bias = [(4096, 1.0)].into()), "generation.logit_bias"),
        (with(plain(), |g| g.allowed_token_ids = vec![4096]), "generation.allowed_token_ids"),
        (with(plain(), |g| g.bad_words = vec![TokenIds { ids: vec![] }]), "generation.bad_words"),
        (with(plain(), |g| g.stop_token_ids = vec![4096]), "generation.stop_token_ids"),
        (with(plain(), |g| g.min_tokens = Some(5)), "generation.min_tokens"),
        (
            with(plain(), |g| {
                g.allowed_token_ids = vec![9];
                g.ignore_eos = false;
                g.min_tokens = Some(2);
            }),
            "generation.min_tokens",
        ),
    ];
    for (request, field) in table {
        let status = client.generate(request).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        assert!(status.message().starts_with(&format!("{field}: ")), "{field}: {status:?}");
    }
    assert_eq!(tokens(&client.generate(plain()).unwrap())[&0].len(), 4);
    stop(rank);
}
