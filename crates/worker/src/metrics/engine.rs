//! What the engine thread adds to between two steps, and at the ends of a request's stages.

use std::time::Instant;

use engine::{Effect, Load};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use types::KvGroup;

use super::{E2E_SECONDS, add, histogram};
use crate::pipeline::Ran;

/// Seconds of a step, or of a gap between two.
pub(super) const STEP_SECONDS: [f64; 17] = [
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
    0.5, 1.0, 2.5,
];
/// Tokens of a step.
const STEP_TOKENS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// A kind of layers with a KV pool of its own: full or sliding.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPool {
    kv_group: &'static str,
}

impl From<KvGroup> for OfPool {
    fn from(group: KvGroup) -> Self {
        let kv_group = match group {
            KvGroup::Full => "full",
            KvGroup::Sliding => "sliding",
        };
        Self { kv_group }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Waiting {
    reason: &'static str,
}

/// What is counted of steps and sequences.
#[derive(Clone)]
pub(crate) struct EngineCounters {
    preemptions: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    steps: Counter,
    step_tokens: Histogram,
    step_seconds: Histogram,
    gap_seconds: Histogram,
    times: Times,
    waiting: Family<Waiting, Gauge>,
    waiting_tokens: Gauge,
    blocks: Family<OfPool, Gauge>,
    blocks_used: Family<OfPool, Gauge>,
    blocks_cached: Family<OfPool, Gauge>,
}

/// How long sequences were in each stage.
#[derive(Clone)]
pub(crate) struct Times {
    queue: Histogram,
    prefill: Histogram,
    inference: Histogram,
}

/// One sequence on its way through the stages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clocked {
    arrived: Instant,
    started: Option<Instant>,
    drew: bool,
}

impl Clocked {
    /// A sequence that arrives now.
    pub(crate) fn new() -> Self {
        Self { arrived: Instant::now(), started: None, drew: false }
    }

    /// It got a place in the batch; only the first time counts.
    pub(crate) fn started(&mut self, times: &Times) {
        if self.started.is_none() {
            let now = Instant::now();
            self.started = Some(now);
            times.queue.observe(now.duration_since(self.arrived).as_secs_f64());
        }
    }

    /// It drew a token; only the first one counts.
    pub(crate) fn drew(&mut self, times: &Times) {
        if !std::mem::replace(&mut self.drew, true)
            && let Some(started) = self.started
        {
            times.prefill.observe(started.elapsed().as_secs_f64());
        }
    }

    /// It ended.
    pub(crate) fn finished(&self, times: &Times) {
        if let Some(started) = self.started {
            times.inference.observe(started.elapsed().as_secs_f64());
        }
    }
}

impl EngineCounters {
    pub(super) fn register(to: &mut Registry) -> Self {
        let pool = |to: &mut Registry, name: &str, help: &str| {
            let family: Family<OfPool, Gauge> = add(to, name, help);
            for group in KvGroup::ALL {
                let _ = family.get_or_create(&OfPool::from(group));
            }
            family
        };
        let waiting: Family<Waiting, Gauge> = add(
            to,
            "vllm:num_requests_waiting_by_reason",
            "Sequences that wait: for a place in the batch (capacity), or for what another one computes (deferred)",
        );
        for reason in ["capacity", "deferred"] {
            let _ = waiting.get_or_create(&Waiting { reason });
        }
        let seconds = |to: &mut Registry, name: &str, help: &str| histogram(to, name, help, &E2E_SECONDS);
        Self {
            preemptions: add(to, "vllm:num_preemptions", "Sequences that lost their blocks to others"),
            prefix_queries: add(to, "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache"),
            prefix_hits: add(to, "vllm:prefix_cache_hits", "Tokens found in the prefix cache"),
            steps: add(to, "cohort_steps", "Steps run"),
            step_tokens: histogram(
                to,
                "vllm:iteration_tokens_total",
                "Tokens computed in a step",
                &STEP_TOKENS,
            ),
            step_seconds: histogram(to, "cohort_step_seconds", "Time a step ran", &STEP_SECONDS),
            gap_seconds: histogram(
                to,
                "cohort_step_host_gap_seconds",
                "Time the executor waited for a step while there was work",
                &STEP_SECONDS,
            ),
            times: Times {
                queue: seconds(
                    to,
                    "vllm:request_queue_time_seconds",
                    "From a sequence's arrival to its place in the batch",
                ),
                prefill: seconds(
                    to,
                    "vllm:request_prefill_time_seconds",
                    "From a sequence's place in the batch to its first token",
                ),
                inference: seconds(
                    to,
                    "vllm:request_inference_time_seconds",
                    "From a sequence's place in the batch to its end",
                ),
            },
            waiting,
            waiting_tokens: add(to, "cohort_waiting_tokens", "Tokens of the sequences that wait"),
            blocks: pool(to, "cohort_kv_group_blocks", "KV blocks there are for a kind of layers"),
            blocks_used: pool(to, "cohort_kv_group_blocks_used", "KV blocks that sequences hold"),
            blocks_cached: pool(
                to,
                "cohort_kv_group_blocks_cached",
                "KV blocks that no sequence holds and that keep a prefix until the space is needed",
            ),
        }
    }

    /// Where the times of sequences are counted.
    pub(crate) const fn times(&self) -> &Times {
        &self.times
    }

    /// A request with so many tokens of prompt goes to the engine, which looks them up in its prefix cache.
    pub(crate) fn submitted(&self, prompt_tokens: usize) {
        self.prefix_queries.inc_by(prompt_tokens as u64);
    }

    /// A step is run.
    pub(crate) fn stepped(&self, ran: Ran) {
        self.steps.inc();
        self.step_tokens.observe(ran.rows as f64);
        self.step_seconds.observe(ran.took.as_secs_f64());
        if let Some(gap) = ran.gap {
            self.gap_seconds.observe(gap.as_secs_f64());
        }
    }

    /// What the engine holds now.
    pub(crate) fn load(&self, load: &Load) {
        self.waiting.get_or_create(&Waiting { reason: "capacity" }).set(load.waiting.into());
        self.waiting_tokens.set(i64::try_from(load.waiting_tokens).unwrap_or(i64::MAX));
        for group in KvGroup::ALL {
            let (label, at) = (OfPool::from(group), group.index());
            self.blocks.get_or_create(&label).set(load.blocks[at].into());
            self.blocks_used.get_or_create(&label).set(load.blocks_used[at].into());
            self.blocks_cached.get_or_create(&label).set(load.blocks_cached[at].into());
        }
    }

    /// Something came of a step.
    pub(crate) fn count(&self, effect: &Effect) {
        match effect {
            Effect::Started { cached_tokens, .. } => {
                self.prefix_hits.inc_by((*cached_tokens).into());
            }
            Effect::Preempted { .. } => {
                self.preemptions.inc();
            }
            Effect::Refused { .. }
            | Effect::PromptLogprobs { .. }
            | Effect::Token { .. }
            | Effect::Finished { .. } => {}
        }
    }
}
