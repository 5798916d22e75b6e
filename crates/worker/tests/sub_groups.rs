//! Data-parallel attention in a running group: sub-groups with sequences of their own draw what one rank draws, in every
//! way of drawing, alone, crowded and preempted.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use futures::future::join_all;
use proto::worker::{GenerateChunk, GenerateRequest, Generation, GetActivityRequest, TokenIds};
use support::{Client, Rank, among, config, request};
use types::BlockSize;
use worker::{Config, Limits, Report};

const OUTPUT: u32 = 20;
/// Plans of several sub-groups: ranks of each, and how many there are.
const PLANS: [(u32, u32); 3] = [(1, 2), (2, 2), (1, 4)];

struct Group {
    ranks: Vec<Rank>,
    client: Client,
}

impl Group {
    fn start((tensor, data): (u32, u32), change: impl Fn(&mut Limits)) -> Self {
        let make = |rank| {
            let mut made = if data == 1 { config(rank, tensor) } else { among(rank, tensor, data) };
            made.limits.waiting_requests_max = 64;
            change(&mut made.limits);
            made
        };
        let leader = Rank::start(make(0));
        let address = leader.listening();
        let mut ranks = vec![leader];
        if tensor * data > 1 {
            let rendezvous = ranks[0].wait(|r| if let Report::Rendezvous(at) = r { Some(*at) } else { None });
            let follower = |rank| Rank::start(Config { rendezvous, ..make(rank) });
            ranks.extend((1..tensor * data).map(follower));
        }
        let client = Client::connect(address);
        ranks.iter().for_each(Rank::ready);
        Self { ranks, client }
    }

    /// All requests at once; the chunks of each.
    fn ask(&self, requests: Vec<GenerateRequest>) -> Vec<Vec<GenerateChunk>> {
        let calls = requests.into_iter().map(|request| {
            let mut client = self.client.client.clone();
            async move {
                let mut stream = client.generate(request).await.unwrap().into_inner();
                let mut chunks = Vec::new();
                while let Some(chunk) = stream.message().await.unwrap() {
                    chunks.push(chunk);
                }
                chunks
            }
        });
        self.client.runtime.block_on(join_all(calls))
    }

    fn stop(self) {
        self.ranks[0].shutdown.cancel();
        for rank in self.ranks {
            rank.end().unwrap();
        }
    }
}

/// Tokens of each sequence, by its number.
fn tokens(chunks: &[GenerateChunk]) -> BTreeMap<u32, Vec<u32>> {
    let mut all: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for chunk in chunks {
        all.entry(chunk.index).or_default().extend(&chunk.token_ids);
    }
    all
}

/// Every log-probability of the answer and the prompt with its token, alternatives included.
fn logprobs(chunks: &[GenerateChunk]) -> Vec<(u32, f32)> {
    let mut all = Vec::new();
    for chunk in chunks {
        let prompt = chunk.prompt_logprobs.iter().filter_map(|position| position.value.as_ref());
        for entry in prompt.chain(&chunk.logprobs) {
            all.push((entry.token_id, entry.logprob));
            all.extend(entry.top.iter().map(|other| (other.token_id, other.logprob)));
        }
    }
    all
}

/// Request number `seed`: each uses another part of the ways to draw, and some all of them.
fn featured(seed: u32) -> GenerateRequest {
    let prompt = (0..20 + seed % 9).map(|i| 20 + (i * 37 + seed * 911) % 4000).collect();
    let mut request = request(prompt, OUTPUT + seed % 3);
    let on = |every: u32| seed.is_multiple_of(every);
    let generation = Generation {
        temperature: Some(if on(3) { 0.0 } else { 0.9 }),
        top_k: on(2).then_some(200),
        top_p: Some(0.97),
        min_p: Some(0.001),
        seed: Some(u64::from(seed) << 40 | 7),
        presence_penalty: on(2).then_some(0.4),
        frequency_penalty: on(2).then_some(0.3),
        repetition_penalty: on(4).then_some(1.1),
        logit_bias: if on(2) { [(40 + seed, 1.5), (900, -2.0)].into() } else { [].into() },
        bad_words: if on(5) { vec![TokenIds { ids: vec![500, 501] }] } else { Vec::new() },
        allowed_token_ids: if on(4) { (10..4096).filter(|id| id % 97 != 0).collect() } else { Vec::new() },
        min_tokens: on(2).then_some(4),
        logprobs: on(2).then_some(seed % 5),
        prompt_logprobs: on(6).then_some(2),
        ..request.generation.take().unwrap()
    };
    GenerateRequest { generation: Some(generation), bypass_prefix_cache: on(7), ..request }
}

/// What one rank answers to requests 1 to 24.
fn alone() -> &'static [Vec<GenerateChunk>] {
    static ALONE: OnceLock<Vec<Vec<GenerateChunk>>> = OnceLock::new();
    ALONE.get_or_init(|| {
        let group = Group::start((1, 1), |_| {});
        let answers = group.ask((1..=24).map(featured).collect());
        group.stop();
        answers
    })
}

#[test]
fn many_requests_at_once_get_what_one_rank_gives_them() {
    for plan in PLANS {
        let group = Group::start(plan, |_| {});
        let answers = group.ask((1..=24).map(featured).collect());
        for (seed, (answer, expected)) in (1..).zip(answers.iter().zip(alone())) {
            assert_eq!(tokens(answer), tokens(expected), "request {seed}, {plan:?}");
            let [ours, theirs] = [answer, expected].map(|chunks| logprobs(chunks));
            assert_eq!(ours.len(), theirs.len(), "request {seed}, {plan:?}");
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert!((ours.1 - theirs.1).abs() < 2e-4, "request {seed}, {plan:?}: {ours:?}, {theirs:?}");
            }
        }
        group.stop();
    }
}

#[test]
fn one_request_is_answered_while_other_sub_groups_have_nothing_to_do() {
    for plan in PLANS {
        let group = Group::start(plan, |_| {});
        for seed in [2, 3] {
            let answer = group.client.generate(featured(seed)).unwrap();
            assert_eq!(tokens(&answer), tokens(&alone()[seed as usize - 1]), "request {seed}, {plan:?}");
        }
        group.stop();
    }
}

#[test]
fn resumed_sequences_go_on_where_they_were_in_any_sub_group() {
    let group = Group::start((1, 2), |_| {});
    // Two at a time, so that each sub-group has one of them.
    for had in [1, 4, 11, OUTPUT as usize - 1] {
        let seeds = [2, 4];
        let resumed = seeds.map(|seed| {
            let known = tokens(&alone()[seed as usize - 1])[&0][..had].to_vec();
            GenerateRequest { resume_tokens: known, ..featured(seed) }
        });
        for (seed, answer) in seeds.into_iter().zip(group.ask(resumed.to_vec())) {
            let expected = &tokens(&alone()[seed as usize - 1])[&0];
            assert_eq!(tokens(&answer)[&0], expected[had..], "request {seed} after {had}");
        }
    }
    group.stop();
}

#[test]
fn several_answers_and_preemptions_change_no_token() {
    // The sequences share their prompts and grow to more than the blocks there are, in each sub-group.
    let asked = || -> Vec<GenerateRequest> {
        let several = |seed| {
            let mut request = featured(seed);
            let generation = request.generation.as_mut().unwrap();
            (generation.n, generation.max_tokens) = (Some(6), Some(24));
            request
        };
        [2, 4, 8].map(several).into()
    };
    let answers = |plan, kv_tokens| {
        let group = Group::start(plan, |limits| {
            limits.block_size = BlockSize::new(4).unwrap();
            limits.kv_tokens = kv_tokens;
        });
        let all: Vec<_> = group.ask(asked()).iter().map(|chunks| tokens(chunks)).collect();
        group.stop();
        all
    };
    let roomy = answers((1, 1), 8192);
    assert!(roomy.iter().all(|of| of.len() == 6 && of[&0] != of[&1]));
    assert_eq!(answers((1, 2), 4 * 30), roomy);
    assert_eq!(answers((2, 2), 4 * 30), roomy);
}

#[test]
fn what_ranks_did_is_counted_for_every_sub_group() {
    let group = Group::start((2, 2), |_| {});
    let asked = || {
        let mut worker = group.client.client.clone();
        group.client.runtime.block_on(worker.get_activity(GetActivityRequest {})).unwrap().into_inner()
    };
    let before = asked();
    group.ask((0..6).map(|seed| request(vec![5, 600, 7 + seed], 10)).collect());
    let after = asked();
    assert_eq!(after.plan, "tensor=2 data=2 experts=expert dispatch=all-to-all");
    assert_eq!(after.tokens - before.tokens, 6 * (3 + 9));
    let rows: Vec<u64> =
        after.ranks.iter().zip(&before.ranks).map(|(now, then)| now.rows - then.rows).collect();
    assert_eq!((rows[0], rows[2]), (rows[1], rows[3]), "ranks of a sub-group see the same rows");
    assert!(rows.iter().all(|rows| *rows > 0), "{rows:?}");
    let steps: Vec<u64> = after.ranks.iter().map(|rank| rank.steps).collect();
    assert!(steps.iter().all(|of| *of == steps[0]), "a sub-group without rows joins each step: {steps:?}");
    group.stop();
}
