//! The same request gets the same tokens whatever happens around it: with the real model, on real ranks, with every
//! way of drawing at once.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use proto::worker::{GenerateChunk, GenerateRequest, Generation, TokenIds};
use support::{Client, Rank, config, request};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use types::BlockSize;
use worker::{Config, Limits};

const OUTPUT: u32 = 24;

/// A leader with its followers, and a client of it.
struct Group {
    ranks: Vec<Rank>,
    client: Client,
}

impl Group {
    fn start(size: u32, change: impl Fn(&mut Limits)) -> Self {
        let changed = |config: Config| {
            let mut config = config;
            change(&mut config.limits);
            config
        };
        let leader = Rank::start(changed(config(0, size)));
        let address = leader.listening();
        let mut ranks = vec![leader];
        if size > 1 {
            let found = |report: &worker::Report| match report {
                worker::Report::Rendezvous(address) => Some(*address),
                _ => None,
            };
            let rendezvous = ranks[0].wait(found);
            let follower = |rank| Rank::start(Config { rendezvous, ..changed(config(rank, size)) });
            ranks.extend((1..size).map(follower));
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

    fn tokens(&self, request: GenerateRequest) -> Vec<u32> {
        tokens(&self.client.generate(request).unwrap())
    }

    fn stop(self) {
        self.ranks[0].shutdown.cancel();
        for rank in self.ranks {
            rank.end().unwrap();
        }
    }
}

fn tokens(chunks: &[GenerateChunk]) -> Vec<u32> {
    chunks.iter().flat_map(|chunk| chunk.token_ids.clone()).collect()
}

/// Tokens of each sequence, by its number.
fn sequences(chunks: &[GenerateChunk]) -> BTreeMap<u32, Vec<u32>> {
    let mut all: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for chunk in chunks {
        all.entry(chunk.index).or_default().extend(&chunk.token_ids);
    }
    all
}

fn prompt(seed: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| 20 + (i * 37 + seed * 911) % 4000).collect()
}

/// Request number `seed`: every way of drawing is in use.
fn featured(seed: u32) -> GenerateRequest {
    let mut request = request(prompt(seed, 40 + seed % 7), OUTPUT);
    let generation = Generation {
        temperature: Some(0.9),
        top_k: Some(200),
        top_p: Some(0.97),
        min_p: Some(0.001),
        seed: Some(u64::from(seed)),
        presence_penalty: Some(0.4),
        frequency_penalty: Some(0.3),
        repetition_penalty: Some(1.1),
        logit_bias: [(40 + seed, 1.5), (900, -2.0)].into(),
        bad_words: vec![TokenIds { ids: vec![300] }, TokenIds { ids: vec![500, 501] }],
        allowed_token_ids: (10..4096).filter(|id| id % 97 != 0).collect(),
        min_tokens: Some(4),
        logprobs: Some(1),
        ..request.generation.take().unwrap()
    };
    GenerateRequest { generation: Some(generation), ..request }
}

/// As [`featured`], but it takes the most likely token, may end early, and tells the log-probabilities of its prompt.
fn greedy(seed: u32) -> GenerateRequest {
    let mut request = featured(seed);
    let generation = request.generation.as_mut().unwrap();
    generation.temperature = Some(0.0);
    generation.ignore_eos = false;
    generation.stop_token_ids = vec![3000, 3001];
    generation.logprobs = Some(5);
    generation.prompt_logprobs = Some(2);
    request
}

/// What request number 1 gets alone, in one rank with room for everything.
fn alone() -> &'static [u32] {
    static ALONE: OnceLock<Vec<u32>> = OnceLock::new();
    ALONE.get_or_init(|| {
        let group = Group::start(1, |_| {});
        let (first, again) = (group.tokens(unshared(featured(1))), group.tokens(unshared(featured(1))));
        group.stop();
        assert_eq!(first.len(), OUTPUT as usize);
        assert_eq!(first, again);
        first
    })
}

/// All that a stream says, but for how it was cut and what was found of the prompt.
fn said(chunks: &[GenerateChunk]) -> GenerateChunk {
    let mut all = GenerateChunk::default();
    for chunk in chunks.iter().cloned() {
        all.token_ids.extend(chunk.token_ids);
        all.logprobs.extend(chunk.logprobs);
        all.prompt_logprobs.extend(chunk.prompt_logprobs);
        all.finish = all.finish.or(chunk.finish);
    }
    all
}

/// Without the prefixes that requests before it left.
fn unshared(request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { bypass_prefix_cache: true, ..request }
}

#[test]
fn in_a_batch_of_64() {
    let group = Group::start(1, |limits| {
        limits.running_max = 64;
        limits.waiting_requests_max = 64;
    });
    // Every other one is greedy; the log-probabilities are the same to the last bit, too.
    let request = |seed: u32| unshared(if seed.is_multiple_of(2) { greedy(seed) } else { featured(seed) });
    let together = group.ask((1..=64).map(request).collect());
    assert_eq!(tokens(&together[0]), alone());
    for (seed, answer) in (1..).zip(&together) {
        let by_itself = group.client.generate(request(seed)).unwrap();
        assert_eq!(said(answer), said(&by_itself), "request {seed}");
        assert_eq!(said(answer).logprobs.len(), tokens(answer).len());
    }
    group.stop();
}

#[test]
fn with_its_prompt_in_pieces() {
    let group = Group::start(1, |limits| {
        limits.running_max = 4;
        limits.step_tokens_max = 7;
    });
    // Beside others, whose decode rows take their share of each step.
    let request = |seed: u32| unshared(if seed.is_multiple_of(2) { greedy(seed) } else { featured(seed) });
    let pieces = group.ask((1..=4).map(request).collect());
    assert_eq!(tokens(&pieces[0]), alone());
    group.stop();
    let whole = Group::start(1, |_| {});
    for (seed, answer) in (1..).zip(&pieces) {
        let at_once = whole.client.generate(request(seed)).unwrap();
        assert_eq!(said(answer), said(&at_once), "request {seed}");
    }
    whole.stop();
}

#[test]
fn after_a_prefix_hit() {
    let group = Group::start(1, |_| {});
    let [cold, warm] = [featured(1), featured(1)].map(|request| group.client.generate(request).unwrap());
    let cached = |chunks: &[GenerateChunk]| chunks.iter().find_map(|chunk| chunk.cached_tokens);
    assert_eq!((cached(&cold), cached(&warm)), (Some(0), Some(32)));
    assert_eq!((tokens(&cold).as_slice(), tokens(&warm).as_slice()), (alone(), alone()));
    group.stop();
}

#[test]
fn as_the_first_of_several() {
    let group = Group::start(1, |_| {});
    let mut request = featured(1);
    request.generation.as_mut().unwrap().n = Some(4);
    let all = sequences(&group.client.generate(request).unwrap());
    assert_eq!((all.len(), all[&0].as_slice()), (4, alone()));
    assert!((1..4).all(|index| all[&index].len() == OUTPUT as usize && all[&index] != alone()));
    group.stop();
}

#[test]
fn resumed_after_any_number_of_tokens() {
    let group = Group::start(1, |_| {});
    for had in [1, 3, 4, 11, OUTPUT as usize - 1] {
        let request = GenerateRequest { resume_tokens: alone()[..had].to_vec(), ..unshared(featured(1)) };
        assert_eq!(group.tokens(request), alone()[had..], "after {had}");
    }
    group.stop();
}

#[test]
fn on_two_and_on_four_ranks() {
    let ask = |size| {
        let group = Group::start(size, |_| {});
        assert_eq!(group.tokens(unshared(featured(1))), alone(), "{size} ranks");
        let greedy = (1..=4).map(|seed| group.tokens(unshared(greedy(seed)))).collect::<Vec<_>>();
        group.stop();
        greedy
    };
    let one = ask(1);
    for size in [2, 4] {
        assert_eq!(ask(size), one, "{size} ranks");
    }
}

/// Counts the leader's lines about preemptions.
struct Preemptions;

static PREEMPTED: AtomicUsize = AtomicUsize::new(0);

impl<S: tracing::Subscriber> Layer<S> for Preemptions {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        struct Message(bool);
        impl tracing::field::Visit for Message {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 |= field.name() == "message" && format!("{value:?}").starts_with("preempted");
            }
        }
        let mut message = Message(false);
        event.record(&mut message);
        PREEMPTED.fetch_add(usize::from(message.0), Ordering::Relaxed);
    }
}

#[test]
fn after_preemptions() {
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Preemptions)).unwrap();
    // One request, so that all its sequences are there at once. They share the prompt's ten full blocks and grow to
    // six more each: 46, when there are 40.
    let mut request = featured(1);
    request.generation.as_mut().unwrap().n = Some(6);
    let [roomy, tight] = [8192, 4 * 40].map(|kv_tokens| {
        let group = Group::start(1, |limits| {
            limits.block_size = BlockSize::new(4).unwrap();
            limits.kv_tokens = kv_tokens;
        });
        let chunks = group.client.generate(request.clone()).unwrap();
        group.stop();
        (sequences(&chunks), PREEMPTED.load(Ordering::Relaxed))
    });
    assert_eq!(roomy.0, tight.0);
    assert_eq!((roomy.0.len(), roomy.0[&0].as_slice()), (6, alone()));
    assert!(roomy.1 < tight.1, "nothing was preempted");
}
