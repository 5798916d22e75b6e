//! Sending requests and noting when their tokens come.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proto::v1::{GenerateRequest, Sampling, Stopping, TokenIds, generate_request};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::Request;

use super::stats::{Measured, Summary};
use crate::client::{self, Client};

/// How requests arrive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Arrivals {
    /// Each client sends its next request when its last one is answered.
    Closed {
        /// Requests in flight at once.
        clients: u32,
    },
    /// At random times, whether or not earlier ones are answered.
    Poisson {
        /// Mean rate.
        per_second: f64,
    },
}

/// A run.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    /// How requests arrive.
    pub arrivals: Arrivals,
    /// Requests that are measured.
    pub requests: u32,
    /// Requests before the measurement.
    pub warm_up: u32,
    /// Of each request.
    pub prompt_tokens: u32,
    /// Of each request.
    pub output_tokens: u32,
    /// Of prompts and arrival times.
    pub seed: u64,
    /// Of each request.
    pub timeout: Duration,
}

type Outcome = Result<Measured, &'static str>;

/// A seeded generator (splitmix64), the same on every machine.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts at `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 random bits.
    pub const fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is at least 1.
    pub fn below(&mut self, bound: u32) -> u32 {
        let wide = u128::from(self.bits()) * u128::from(bound);
        u32::try_from(wide >> 64).unwrap_or(0)
    }

    /// A wait with mean `1 / per_second`, exponentially distributed.
    pub fn wait(&mut self, per_second: f64) -> Duration {
        let unit = ((self.bits() >> 11) as f64 + 1.0) / (1_u64 << 53) as f64;
        Duration::try_from_secs_f64(-unit.ln() / per_second).unwrap_or(Duration::MAX)
    }
}

/// Warms up, then runs the plan.
pub(super) async fn run(client: Client, plan: &Plan, vocab_size: u32) -> Summary {
    let plan = Arc::new(plan.clone());
    for index in 0..plan.warm_up {
        // Indices above the measured ones: no measured prompt has been seen before.
        let request = request(&plan, plan.requests.saturating_add(index), vocab_size);
        if let Err(code) = send(client.clone(), request, plan.timeout, Instant::now()).await {
            tracing::warn!("a warm-up request failed with {code}");
        }
    }
    let started = Instant::now();
    let outcomes = match plan.arrivals {
        Arrivals::Closed { clients } => closed(&client, &plan, clients, vocab_size).await,
        Arrivals::Poisson { per_second } => poisson(&client, &plan, per_second, vocab_size).await,
    };
    Summary::of(&outcomes, started.elapsed())
}

async fn closed(client: &Client, plan: &Arc<Plan>, clients: u32, vocab_size: u32) -> Vec<Outcome> {
    let next = Arc::new(AtomicU32::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..clients.min(plan.requests) {
        let (client, plan, next) = (client.clone(), Arc::clone(plan), Arc::clone(&next));
        tasks.spawn(async move {
            let mut outcomes = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= plan.requests {
                    return outcomes;
                }
                let request = request(&plan, index, vocab_size);
                outcomes.push(send(client.clone(), request, plan.timeout, Instant::now()).await);
            }
        });
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

async fn poisson(client: &Client, plan: &Plan, per_second: f64, vocab_size: u32) -> Vec<Outcome> {
    let mut random = Random::new(plan.seed);
    let mut tasks = JoinSet::new();
    let mut due = Instant::now();
    for index in 0..plan.requests {
        let request = request(plan, index, vocab_size);
        tokio::time::sleep_until(due).await;
        // Timed from when it was due: a late sender must not flatter the server.
        tasks.spawn(send(client.clone(), request, plan.timeout, due));
        due += random.wait(per_second).min(plan.timeout);
    }
    tasks.join_all().await
}

fn request(plan: &Plan, index: u32, vocab_size: u32) -> GenerateRequest {
    let mut random =
        Random::new(plan.seed ^ u64::from(index).wrapping_add(1).wrapping_mul(0x2545_f491_4f6c_dd1d));
    let ids = (0..plan.prompt_tokens).map(|_| random.below(vocab_size)).collect();
    GenerateRequest {
        prompt: Some(generate_request::Prompt::TokenIds(TokenIds { ids })),
        sampling: Some(Sampling { temperature: Some(0.0), seed: Some(plan.seed), ..Sampling::default() }),
        stopping: Some(Stopping {
            max_tokens: Some(plan.output_tokens),
            ignore_eos: true,
            ..Stopping::default()
        }),
        ..GenerateRequest::default()
    }
}

/// Sends one request and reads its stream to the end; times count from `due`.
async fn send(client: Client, request: GenerateRequest, timeout: Duration, due: Instant) -> Outcome {
    let mut call = Request::new(request);
    call.set_timeout(timeout);
    client::within(timeout, receive(client, call, due)).await.unwrap_or(Err("DEADLINE_EXCEEDED"))
}

async fn receive(mut client: Client, call: Request<GenerateRequest>, due: Instant) -> Outcome {
    let code = |status: tonic::Status| client::code_name(status.code());
    let mut stream = client.generate(call).await.map_err(code)?.into_inner();
    let mut measured = Measured::default();
    let mut finished = false;
    while let Some(message) = stream.message().await.map_err(code)? {
        if !message.token_ids.is_empty() {
            let tokens = u32::try_from(message.token_ids.len()).unwrap_or(u32::MAX);
            measured.arrivals.push((due.elapsed(), tokens));
        }
        finished |= message.finish.is_some();
    }
    measured.end = due.elapsed();
    if finished { Ok(measured) } else { Err("INCOMPLETE") }
}
