//! What the pages of two moments say together.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::page::Page;

/// Every endpoint's page at one moment, or why there is none.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// Since any fixed moment; only differences count.
    pub at: Duration,
    /// By address.
    pub routers: BTreeMap<String, Result<Page, String>>,
    /// By address.
    pub groups: BTreeMap<String, Result<Page, String>>,
}

/// A cluster as its pages show it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Cluster {
    /// Seconds between the two moments that rates are taken from; 0 when there is one moment, and no rates.
    pub interval_s: f64,
    /// By address.
    pub routers: Vec<Endpoint<Router>>,
    /// By address.
    pub groups: Vec<Endpoint<Group>>,
}

/// One process that serves a metrics page.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Endpoint<T> {
    /// Where its page is.
    pub address: String,
    /// Why it could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down: Option<String>,
    /// What it says.
    #[serde(flatten)]
    pub shows: Option<T>,
}

/// Seconds; half, and all but one in a hundred, took at most so long. Of the requests between the two moments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Half.
    pub p50_s: Option<f64>,
    /// All but one in a hundred.
    pub p99_s: Option<f64>,
}

/// What a router shows.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Router {
    /// Its version.
    pub version: String,
    /// Answers being given.
    pub requests_open: f64,
    /// Most that may be.
    pub requests_open_max: f64,
    /// Requests that ended well, a second.
    pub requests_per_s: Option<f64>,
    /// Requests that ended otherwise, a second.
    pub failures_per_s: Option<f64>,
    /// Prompt tokens of requests that ended, a second.
    pub prompt_tokens_per_s: Option<f64>,
    /// Tokens generated for requests that ended, a second.
    pub output_tokens_per_s: Option<f64>,
    /// From placing to the first message.
    pub first_message: Latency,
    /// Whole requests.
    pub whole: Latency,
    /// Groups that serve, whatever their weight.
    pub groups_up: usize,
    /// All groups.
    pub groups: usize,
    /// Sequences that went on after the loss of a group, since the start.
    pub migrations: f64,
}

/// What a group's leader shows.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Group {
    /// The model's name.
    pub model: String,
    /// The phase it is in.
    pub phase: String,
    /// How much of it is done.
    pub percent: f64,
    /// Its share of the requests, as routers say; with 0 it gets none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Weights read a second, while it loads.
    pub load_bytes_per_s: f64,
    /// Sequences in the batch.
    pub running: f64,
    /// Sequences that wait.
    pub waiting: f64,
    /// Share of the KV blocks in use, 0 to 1.
    pub kv_usage: f64,
    /// The same of the blocks of full and of sliding layers.
    pub kv_usage_full: Option<f64>,
    /// Of sliding layers.
    pub kv_usage_sliding: Option<f64>,
    /// Tokens generated a second.
    pub output_tokens_per_s: Option<f64>,
    /// Prompt tokens that arrived, a second.
    pub prompt_tokens_per_s: Option<f64>,
    /// Steps a second.
    pub steps_per_s: Option<f64>,
    /// From arrival to the first token.
    pub first_token: Latency,
    /// From one token to the next.
    pub between_tokens: Latency,
    /// What the executor waited for a step while there was work.
    pub host_gap: Latency,
    /// Sequences that lost their place, since the start.
    pub preemptions: f64,
    /// The busiest expert's rows by the average one's.
    pub expert_imbalance: f64,
    /// Every rank, as the leader has heard of it.
    pub ranks: Vec<Rank>,
}

/// What a rank has done.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Rank {
    /// Its number.
    pub rank: u32,
    /// Rows computed a second.
    pub rows_per_s: Option<f64>,
    /// Share of the time that it was in collectives, 0 to 1, waiting for others included.
    pub collective_share: Option<f64>,
    /// Payload sent to other ranks, a second.
    pub sent_bytes_per_s: Option<f64>,
}

/// One endpoint's pages of both moments.
struct Pages<'a> {
    now: &'a Page,
    before: Option<&'a Page>,
    seconds: f64,
}

impl Cluster {
    /// What `now` says, with rates since `before`.
    #[must_use]
    pub fn between(before: Option<&Sample>, now: &Sample) -> Self {
        let interval = before.map_or(Duration::ZERO, |before| now.at.saturating_sub(before.at));
        let seconds = interval.as_secs_f64();
        let routers = before.map(|before| &before.routers);
        let groups = before.map(|before| &before.groups);
        let mut cluster = Self {
            interval_s: seconds,
            routers: endpoints(&now.routers, routers, seconds, Router::of),
            groups: endpoints(&now.groups, groups, seconds, Group::of),
        };
        for Endpoint { address, shows, .. } in &mut cluster.groups {
            if let Some(group) = shows {
                group.weight = weight(&now.routers, address);
            }
        }
        cluster
    }

    /// The sum of a rate over all groups that have one.
    #[must_use]
    pub fn total(&self, rate: impl Fn(&Group) -> Option<f64>) -> Option<f64> {
        let shown = self.groups.iter().filter_map(|group| group.shows.as_ref());
        shown.filter_map(rate).reduce(|sum, more| sum + more)
    }
}

/// The most that a router gives the group whose page is at `metrics`.
fn weight(routers: &Heard, metrics: &str) -> Option<f64> {
    let of_router = |page: &Page| {
        let group = page.label_of("cohort_router_group_info", ("metrics", metrics), "group")?;
        page.sum("cohort_router_group_weight", &[("group", group)])
    };
    routers.values().filter_map(|page| of_router(page.as_ref().ok()?)).reduce(f64::max)
}

type Heard = BTreeMap<String, Result<Page, String>>;

fn endpoints<T>(
    now: &Heard,
    before: Option<&Heard>,
    seconds: f64,
    shows: impl Fn(&Pages<'_>) -> T,
) -> Vec<Endpoint<T>> {
    let endpoint = |(address, page): (&String, &Result<Page, String>)| {
        let (down, shows) = match page {
            Err(why) => (Some(why.clone()), None),
            Ok(page) => {
                let before = before.and_then(|before| before.get(address)?.as_ref().ok());
                (None, Some(shows(&Pages { now: page, before, seconds })))
            }
        };
        Endpoint { address: address.clone(), down, shows }
    };
    now.iter().map(endpoint).collect()
}

impl Pages<'_> {
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.now.sum(name, labels).unwrap_or(0.0)
    }

    /// How fast a counter grew; one that has become smaller began anew.
    fn rate(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let before = self.before.filter(|_| self.seconds > 0.0)?;
        let now = self.now.sum(name, labels)?;
        let then = before.sum(name, labels).unwrap_or(0.0);
        Some((if now < then { now } else { now - then }) / self.seconds)
    }

    fn latency(&self, name: &str, labels: &[(&str, &str)]) -> Latency {
        let mut buckets = self.now.buckets(name, labels);
        let then: BTreeMap<u64, f64> = self.before.map_or_else(BTreeMap::new, |before| {
            before.buckets(name, labels).into_iter().map(|(bound, count)| (bound.to_bits(), count)).collect()
        });
        let grew = |bound: f64, count: f64| count - then.get(&bound.to_bits()).copied().unwrap_or(0.0);
        let anew = buckets.iter().any(|(bound, count)| grew(*bound, *count) < 0.0);
        if !anew {
            buckets.iter_mut().for_each(|(bound, count)| *count = grew(*bound, *count));
        }
        Latency { p50_s: quantile(&buckets, 0.5), p99_s: quantile(&buckets, 0.99) }
    }

    /// `used` by `all`, when there are any.
    fn share(&self, used: &str, all: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let all = self.now.sum(all, labels).filter(|all| *all > 0.0)?;
        Some(self.now.sum(used, labels)? / all)
    }
}

/// The value below which this share of the counts lies, going evenly through its bucket, as Prometheus has it; `None`
/// without counts.
fn quantile(buckets: &[(f64, f64)], share: f64) -> Option<f64> {
    let all = buckets.last()?.1;
    if all <= 0.0 {
        return None;
    }
    let wanted = share * all;
    let at = buckets.iter().position(|(_, count)| *count >= wanted)?;
    let (low, below) = if at == 0 { (0.0, 0.0) } else { buckets[at - 1] };
    let (high, count) = buckets[at];
    if high.is_infinite() {
        return Some(low);
    }
    let inside = count - below;
    Some(if inside > 0.0 { low + (high - low) * (wanted - below) / inside } else { high })
}

impl Router {
    fn of(pages: &Pages<'_>) -> Self {
        let outcomes = "cohort_router_requests_total";
        let well = pages.rate(outcomes, &[("outcome", "OK")]);
        let tokens = |kind| pages.rate("cohort_router_tokens_total", &[("kind", kind)]);
        let stage = |stage| pages.latency("cohort_router_stage_seconds", &[("stage", stage)]);
        let groups: Vec<&str> = pages.now.labels("cohort_router_group_info", "group").collect();
        Self {
            version: pages
                .now
                .labels("cohort_router_build_info", "version")
                .next()
                .unwrap_or_default()
                .to_owned(),
            requests_open: pages.value("cohort_router_requests_open", &[]),
            requests_open_max: pages.value("cohort_router_requests_open_max", &[]),
            requests_per_s: well,
            failures_per_s: pages.rate(outcomes, &[]).map(|all| (all - well.unwrap_or(0.0)).max(0.0)),
            prompt_tokens_per_s: tokens("prompt"),
            output_tokens_per_s: tokens("generated"),
            first_message: stage("first_message"),
            whole: stage("whole"),
            groups_up: pages.now.labels("cohort_router_group_up", "group").count(),
            groups: groups.len(),
            migrations: pages.value("cohort_router_model_migration_total", &[]),
        }
    }
}

impl Group {
    fn of(pages: &Pages<'_>) -> Self {
        let of_pool = |kv_group| {
            let labels = [("kv_group", kv_group)];
            pages.share("cohort_kv_group_blocks_used", "cohort_kv_group_blocks", &labels)
        };
        let text = |name, key| pages.now.labels(name, key).next().unwrap_or_default().to_owned();
        Self {
            model: text("cohort_build_info", "model_name"),
            phase: text("cohort_phase", "phase"),
            percent: pages.value("cohort_phase_percent", &[]),
            // Said by routers.
            weight: None,
            load_bytes_per_s: pages.value("cohort_load_bytes_per_second", &[]),
            running: pages.value("vllm:num_requests_running", &[]),
            waiting: pages.value("vllm:num_requests_waiting", &[]),
            kv_usage: pages.value("vllm:kv_cache_usage_perc", &[]),
            kv_usage_full: of_pool("full"),
            kv_usage_sliding: of_pool("sliding"),
            output_tokens_per_s: pages.rate("vllm:generation_tokens_total", &[]),
            prompt_tokens_per_s: pages.rate("vllm:prompt_tokens_total", &[]),
            steps_per_s: pages.rate("cohort_steps_total", &[]),
            first_token: pages.latency("vllm:time_to_first_token_seconds", &[]),
            between_tokens: pages.latency("vllm:inter_token_latency_seconds", &[]),
            host_gap: pages.latency("cohort_step_host_gap_seconds", &[]),
            preemptions: pages.value("vllm:num_preemptions_total", &[]),
            expert_imbalance: pages.value("cohort_expert_imbalance", &[]),
            ranks: ranks(pages),
        }
    }
}

fn ranks(pages: &Pages<'_>) -> Vec<Rank> {
    let mut numbers: Vec<u32> =
        pages.now.labels("cohort_rank_steps_total", "rank").filter_map(|rank| rank.parse().ok()).collect();
    numbers.sort_unstable();
    let rank = |rank: u32| {
        let number = rank.to_string();
        let labels = [("rank", number.as_str())];
        Rank {
            rank,
            rows_per_s: pages.rate("cohort_rank_rows_total", &labels),
            collective_share: pages.rate("cohort_collective_seconds_total", &labels),
            sent_bytes_per_s: pages.rate("cohort_collective_sent_bytes_total", &labels),
        }
    };
    numbers.into_iter().map(rank).collect()
}
