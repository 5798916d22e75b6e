//! What a group counts, under the names that dashboards and autoscalers for vLLM know, and under `cohort_` for what only
//! this server has. Requests are measured where their messages leave for the router, on the gRPC threads; the engine
//! thread only adds to counters; gauges are read from the published state when somebody asks.

mod boot;
mod engine;
mod follower;
mod listener;
mod ranks;
mod stream;

use std::borrow::Cow;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};
use proto::Phase;
use proto::worker::{GroupActivity, WorkerState};
use types::Bytes;

use boot::Boot;
use ranks::Ranks;

pub(crate) use self::engine::{Clocked, EngineCounters, Times};
pub(crate) use self::follower::{FollowerMetrics, StepClock};
pub(crate) use listener::{Leading, Shown, serve};
pub(crate) use stream::{Asked, Metered};

use crate::Config;

/// A gauge with a fraction.
type Ratio = Gauge<f64, AtomicU64>;

/// Seconds from a request's arrival to its last token.
const E2E_SECONDS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// Seconds to the first token.
const FIRST_TOKEN_SECONDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Seconds between two tokens.
const TOKEN_SECONDS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Where tokens of a prompt come from, as vLLM says it.
const COMPUTED: &str = "local_compute";
const CACHED: &str = "local_cache_hit";
/// Sequences of one request.
const SEQUENCES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// Why a request ended, as vLLM says it: stop, length, abort or error.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Finished {
    finished_reason: &'static str,
}

/// Why a request was not taken: the reason of its refusal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rejected {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheConfig {
    block_size: u32,
    num_gpu_blocks: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NoLora {
    max_lora: u32,
    running_lora_adapters: &'static str,
    waiting_lora_adapters: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Source {
    source: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Sleep {
    sleep_state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Quantile {
    quantile: &'static str,
}

/// Everything a leader counts.
pub(crate) struct Metrics {
    registry: Registry,
    state: StateGauges,
    boot: Boot,
    requests: Requests,
    engine: EngineCounters,
    ranks: Ranks,
}

/// Set from the published state when somebody asks.
struct StateGauges {
    block_size: u32,
    running: Gauge,
    waiting: Gauge,
    kv_usage: Ratio,
    cache_config: Family<CacheConfig, Gauge>,
    host_gap: Family<Quantile, Ratio>,
    card_idle: Family<Quantile, Ratio>,
    kv_blocks_used: Gauge,
    kv_blocks: Gauge,
}

/// Measured where a request's messages leave for the router.
#[derive(Clone)]
struct Requests {
    prompt_tokens: Counter,
    generation_tokens: Counter,
    cached_tokens: Counter,
    by_source: Family<Source, Counter>,
    finished: Family<Finished, Counter>,
    rejected: Family<Rejected, Counter>,
    first_token: Histogram,
    between_tokens: Histogram,
    time_per_token: Histogram,
    whole: Histogram,
    decode: Histogram,
    prompt_length: Histogram,
    generation_length: Histogram,
    sequences: Histogram,
    max_tokens: Histogram,
}

impl Metrics {
    pub(crate) fn new(config: &Config) -> Self {
        let mut registry = Registry::default();
        let ours = registry.sub_registry_with_labels(labels(config).into_iter());
        let state = StateGauges::register(ours, config.limits.block_size.tokens());
        let boot = Boot::register(ours, config);
        // No sequence outgrows the cache.
        let requests = Requests::register(ours, config.limits.kv_tokens);
        let engine = EngineCounters::register(ours);
        let ranks = Ranks::register(ours);
        Self { registry, state, boot, requests, engine, ranks }
    }

    /// For the engine thread.
    pub(crate) fn engine(&self) -> EngineCounters {
        self.engine.clone()
    }

    /// So much of the leader's weights is there.
    pub(crate) fn loading(&self, done: Bytes, total: Bytes) {
        self.boot.loading(done, total);
    }

    /// All of it in the OpenMetrics text format, with the gauges as `state` has them and what the ranks have told.
    pub(crate) fn render(&self, state: &WorkerState, told: Option<&GroupActivity>) -> String {
        self.state.show(state);
        self.boot.phase(Phase::from_wire(state.phase).unwrap_or(Phase::Starting), state.percent);
        if let Some(told) = told {
            self.ranks.show(told);
        }
        encode(&self.registry)
    }
}

impl StateGauges {
    fn register(to: &mut Registry, block_size: u32) -> Self {
        let lora = Family::<NoLora, Gauge>::default();
        let none = NoLora { max_lora: 0, running_lora_adapters: "", waiting_lora_adapters: "" };
        lora.get_or_create(&none).set(1);
        to.register("vllm:lora_requests_info", "Adapters: there are none", lora);
        let sleep = Family::<Sleep, Gauge>::default();
        for sleep_state in ["awake", "weights_offloaded", "discard_all"] {
            sleep.get_or_create(&Sleep { sleep_state }).set(i64::from(sleep_state == "awake"));
        }
        to.register("vllm:engine_sleep_state", "1 for awake: this server does not sleep", sleep);
        Self {
            block_size,
            running: add(to, "vllm:num_requests_running", "Sequences in the running batch"),
            waiting: add(to, "vllm:num_requests_waiting", "Sequences that wait for a place in the batch"),
            kv_usage: add(to, "vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1"),
            cache_config: add(to, "vllm:cache_config_info", "The KV cache, always 1"),
            host_gap: add(
                to,
                "cohort_host_gap_seconds",
                "Time the executor waited between two steps while there was work, of the last thousand",
            ),
            card_idle: add(
                to,
                "cohort_card_idle_seconds",
                "Time the leader's card had no kernel to run between two steps while there was work, of the last thousand",
            ),
            kv_blocks_used: add(to, "cohort_kv_blocks_used", "KV blocks in use, of full and sliding layers"),
            kv_blocks: add(to, "cohort_kv_blocks", "KV blocks there are, of full and sliding layers"),
        }
    }

    fn show(&self, state: &WorkerState) {
        let load = state.load.unwrap_or_default();
        self.running.set(load.running.into());
        self.waiting.set(load.waiting.into());
        self.kv_blocks_used.set(load.kv_blocks_used.into());
        self.kv_blocks.set(load.kv_blocks.into());
        for (quantile, micros) in [("0.5", load.host_gap_p50_us), ("0.99", load.host_gap_p99_us)] {
            self.host_gap.get_or_create(&Quantile { quantile }).set(f64::from(micros) / 1e6);
        }
        for (quantile, micros) in [("0.5", load.card_idle_p50_us), ("0.99", load.card_idle_p99_us)] {
            if let Some(micros) = micros {
                self.card_idle.get_or_create(&Quantile { quantile }).set(f64::from(micros) / 1e6);
            }
        }
        self.kv_usage.set(f64::from(load.kv_blocks_used) / f64::from(load.kv_blocks.max(1)));
        if load.kv_blocks > 0 {
            let config = CacheConfig { block_size: self.block_size, num_gpu_blocks: load.kv_blocks };
            self.cache_config.get_or_create(&config).set(1);
        }
    }
}

impl Requests {
    fn register(to: &mut Registry, context_tokens_max: u32) -> Self {
        let lengths = token_counts(context_tokens_max);
        let seconds = histogram;
        let by_source = by_source(to);
        let finished = Family::<Finished, Counter>::default();
        // There from the start, so that rates are right from the first of them.
        for finished_reason in ["stop", "length", "abort", "error"] {
            let _ = finished.get_or_create(&Finished { finished_reason });
        }
        to.register("vllm:request_success", "Requests that ended, by reason", finished.clone());
        let rejected = Family::<Rejected, Counter>::default();
        for reason in ["OVERLOADED", "PROMPT_TOO_LONG"] {
            let _ = rejected.get_or_create(&Rejected { reason });
        }
        to.register("vllm:admission_rejections", "Requests that were not taken, by reason", rejected.clone());
        Self {
            by_source,
            finished,
            rejected,
            prompt_tokens: add(to, "vllm:prompt_tokens", "Tokens of the prompts of requests"),
            generation_tokens: add(to, "vllm:generation_tokens", "Tokens generated"),
            cached_tokens: add(to, "vllm:prompt_tokens_cached", "Tokens of prompts that were not computed"),
            first_token: seconds(
                to,
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token",
                &FIRST_TOKEN_SECONDS,
            ),
            between_tokens: seconds(
                to,
                "vllm:inter_token_latency_seconds",
                "From one token of a sequence to the next",
                &TOKEN_SECONDS,
            ),
            time_per_token: seconds(
                to,
                "vllm:request_time_per_output_token_seconds",
                "Of a whole request: the time after its first token by its other tokens",
                &TOKEN_SECONDS,
            ),
            whole: seconds(
                to,
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival to its end",
                &E2E_SECONDS,
            ),
            decode: seconds(
                to,
                "vllm:request_decode_time_seconds",
                "From a request's first token to its end",
                &E2E_SECONDS,
            ),
            prompt_length: seconds(to, "vllm:request_prompt_tokens", "Tokens of a prompt", &lengths),
            generation_length: seconds(
                to,
                "vllm:request_generation_tokens",
                "Tokens generated for a request",
                &lengths,
            ),
            sequences: seconds(to, "vllm:request_params_n", "Sequences asked for", &SEQUENCES),
            max_tokens: seconds(
                to,
                "vllm:request_params_max_tokens",
                "Most tokens a request may generate",
                &lengths,
            ),
        }
    }
}

/// Registers a metric that starts from nothing.
fn add<M: Metric + Clone + Default>(to: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    to.register(name, help, metric.clone());
    metric
}

fn by_source(to: &mut Registry) -> Family<Source, Counter> {
    let family: Family<Source, Counter> =
        add(to, "vllm:prompt_tokens_by_source", "Tokens of prompts, computed or found in the prefix cache");
    for source in [COMPUTED, CACHED] {
        let _ = family.get_or_create(&Source { source });
    }
    family
}

fn histogram(to: &mut Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let histogram = Histogram::new(buckets.iter().copied());
    to.register(name, help, histogram.clone());
    histogram
}

/// The labels that every metric of a group has.
fn labels(config: &Config) -> [(Cow<'static, str>, Cow<'static, str>); 2] {
    [("model_name".into(), config.model_name.clone().into()), ("engine".into(), "0".into())]
}

fn encode(registry: &Registry) -> String {
    let mut page = String::new();
    match text::encode(&mut page, registry) {
        Ok(()) => page,
        Err(error) => unreachable!("writing to a string does not fail: {error}"),
    }
}

/// 1, 2, 5, 10, 20, 50, … up to `most`.
fn token_counts(most: u32) -> Vec<f64> {
    let series = (0..10).flat_map(|power| [1_u64, 2, 5].map(|step| step * 10_u64.pow(power)));
    series.take_while(|&count| count <= u64::from(most)).map(|count| count as f64).collect()
}
