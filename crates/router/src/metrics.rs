//! What a router counts. Requests are counted where they end, stages where they are passed, groups when somebody asks.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::Response;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};
use proto::{Failure, v1};

use crate::room::{Occupancy, Turned};
use crate::service::VERSION;
use crate::trail::Traced;
use crate::workers::{GroupView, Groups};

/// Seconds of a stage: from a fraction of what a router may add to the longest answer.
const STAGE_SECONDS: [f64; 20] = [
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 300.0,
];
/// How a request ended that did not fail.
pub(crate) const OK: &str = "OK";
/// How a request ended whose caller left.
const ABANDONED: &str = "ABANDONED";

/// `OK`, `ABANDONED`, or the reason of the failure.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// A part of a request's way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InStage {
    stage: &'static str,
}

/// Why a request was not admitted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Bound {
    bound: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfGroup {
    group: String,
}

/// Where to look for more of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GroupInfo {
    group: String,
    metrics: String,
}

/// Why a request did not come to a group.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rejected {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

/// As the usual instrumentation of Python servers has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HttpRequest {
    handler: String,
    method: &'static str,
    status: &'static str,
}

#[derive(Debug, Clone)]
struct Stages;

impl MetricConstructor<Histogram> for Stages {
    fn new_metric(&self) -> Histogram {
        Histogram::new(STAGE_SECONDS)
    }
}

/// Everything a router counts.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Outcome, Counter>,
    stages: Family<InStage, Histogram, Stages>,
    tokens: Family<Kind, Counter>,
    http: Family<HttpRequest, Counter>,
    overloaded: Family<Bound, Counter>,
    room: RoomGauges,
    rejected: Family<Rejected, Counter>,
    group_up: Family<OfGroup, Gauge>,
    group_open: Family<OfGroup, Gauge>,
    group_broken: Family<OfGroup, Gauge>,
    group_weight: Family<OfGroup, Gauge>,
    group_info: Family<GroupInfo, Gauge>,
    /// Held while a page is made.
    rendering: Mutex<()>,
}

/// How full the router is.
#[derive(Debug)]
struct RoomGauges {
    open: Gauge,
    open_max: Gauge,
    waiting: Gauge,
    waiting_max: Gauge,
    waiting_tokens: Gauge,
}

impl RoomGauges {
    fn new(to: &mut Registry) -> Self {
        Self {
            open: add(to, "cohort_router_requests_open", "Answers that are being given"),
            open_max: add(to, "cohort_router_requests_open_max", "Answers that may be given at once"),
            waiting: add(to, "cohort_router_requests_waiting", "Answers that wait to be admitted"),
            waiting_max: add(
                to,
                "cohort_router_requests_waiting_max",
                "Answers that may wait to be admitted",
            ),
            waiting_tokens: add(to, "cohort_router_waiting_tokens", "Tokens that all who wait may cost"),
        }
    }

    fn set(&self, now: Occupancy) {
        let Occupancy { taken, taken_max, waiting, waiting_max, waiting_tokens } = now;
        self.open.set(taken.into());
        self.open_max.set(taken_max.into());
        self.waiting.set(waiting.into());
        self.waiting_max.set(waiting_max.into());
        self.waiting_tokens.set(i64::try_from(waiting_tokens).unwrap_or(i64::MAX));
    }
}

impl Metrics {
    pub(crate) fn new(groups: &Groups) -> Self {
        let mut registry = Registry::default();
        let to = &mut registry;
        let info = Family::<Build, Gauge>::default();
        info.get_or_create(&Build { version: VERSION }).set(1);
        to.register("cohort_router_build_info", "Version of this router, always 1", info);
        let stages = Family::new_with_constructor(Stages);
        to.register("cohort_router_stage_seconds", "Seconds a request spent in a stage", stages.clone());
        let (placements, resumed) = groups.counters();
        to.register("cohort_router_placements", "Requests sent to a group, by how it was chosen", placements);
        to.register("cohort_router_resumed", "Sequences that went on after the loss of their group", resumed);
        to.register(
            "cohort_router_model_migration",
            "Sequences that went on (ongoing_request) or began again (new_request) after the loss of their group",
            groups.migrations.family(),
        );
        let rejected = add(
            to,
            "cohort_router_admission_rejections",
            "Requests that were refused before they came to a group, by the reason of the refusal",
        );
        let group_broken = add(
            to,
            "cohort_router_group_breaker_open",
            "1 for a group that is left alone for failing, else 0",
        );
        let group_weight = add(
            to,
            "cohort_router_group_weight",
            "Share of the requests that a group gets beside the others; 0 for none",
        );
        let group_info =
            add(to, "cohort_router_group_info", "Where the leader of a group serves its metrics, always 1");
        let room = RoomGauges::new(to);
        let (requests, overloaded, tokens, http, group_up, group_open) = (
            add(to, "cohort_router_requests", "Requests that ended, by how"),
            add(to, "cohort_router_overloaded", "Requests that were not admitted, by the bound they met"),
            add(to, "cohort_router_tokens", "Tokens of requests that ended well, by kind"),
            add(to, "http_requests", "HTTP requests answered, by path and class of status"),
            add(to, "cohort_router_group_up", "1 for a group that serves, else 0"),
            add(to, "cohort_router_group_requests_open", "Requests of this router that a group works on"),
        );
        let metrics = Self {
            registry,
            requests,
            stages,
            tokens,
            http,
            overloaded,
            room,
            rejected,
            group_up,
            group_open,
            group_broken,
            group_weight,
            group_info,
            rendering: Mutex::default(),
        };
        metrics.start_at_nothing();
        metrics
    }

    /// The series that everybody looks for are there from the start, so that rates are right from the first event.
    fn start_at_nothing(&self) {
        for outcome in [
            OK,
            ABANDONED,
            "OVERLOADED",
            "UNAUTHENTICATED",
            "LIMITED",
            "GROUP_LOST",
            "UNAVAILABLE",
            "INTERNAL",
        ] {
            let _ = self.requests.get_or_create(&Outcome { outcome });
        }
        for reason in
            ["OVERLOADED", "LIMITED", "UNAUTHENTICATED", "INVALID_FIELD", "NOT_SERVING", "UNAVAILABLE"]
        {
            let _ = self.rejected.get_or_create(&Rejected { reason });
        }
        for stage in ["admit", "wait", "tokenize", "place", "first_message", "whole"] {
            let _ = self.stages.get_or_create(&InStage { stage });
        }
        for turned in Turned::ALL {
            let _ = self.overloaded.get_or_create(&Bound { bound: turned.name() });
        }
        self.used(&v1::Usage::default(), true);
    }

    /// All of it in the OpenMetrics text format, with the gauges as they are now.
    pub(crate) fn render(&self, room: Occupancy, groups: &[GroupView]) -> String {
        // One page at a time: what another one is made of is not cleared under it.
        let _rendering = self.rendering.lock();
        self.room.set(room);
        // A group may have left, or be reached at another place than before.
        self.group_info.clear();
        for gauge in [&self.group_up, &self.group_open, &self.group_broken, &self.group_weight] {
            gauge.clear();
        }
        for GroupView { address, up, in_flight, weight, broken, metrics } in groups {
            let info = GroupInfo { group: address.clone(), metrics: metrics.clone() };
            self.group_info.get_or_create(&info).set(1);
            let label = OfGroup { group: address.clone() };
            self.group_up.get_or_create(&label).set((*up).into());
            self.group_weight.get_or_create(&label).set((*weight).into());
            self.group_broken.get_or_create(&label).set((*broken).into());
            self.group_open.get_or_create(&label).set(i64::try_from(*in_flight).unwrap_or(i64::MAX));
        }
        let mut page = String::new();
        match text::encode(&mut page, &self.registry) {
            Ok(()) => page,
            Err(error) => unreachable!("writing to a string does not fail: {error}"),
        }
    }

    /// A request that was not admitted.
    pub(crate) fn turned_away(&self, turned: Turned) {
        self.overloaded.get_or_create(&Bound { bound: turned.name() }).inc();
    }

    /// A request that was refused before it was read.
    pub(crate) fn refused(&self, failure: &Failure) {
        self.ended(failure.reason());
        self.rejected(failure.reason());
    }

    fn rejected(&self, reason: &'static str) {
        self.rejected.get_or_create(&Rejected { reason }).inc();
    }

    fn ended(&self, outcome: &'static str) {
        self.requests.get_or_create(&Outcome { outcome }).inc();
    }

    fn passed(&self, stage: &'static str, since: Instant) {
        self.stages.get_or_create(&InStage { stage }).observe(since.elapsed().as_secs_f64());
    }

    /// Answers to one prompt share its tokens: only the `first` counts them.
    fn used(&self, usage: &v1::Usage, first: bool) {
        let of_prompt = |tokens: u32| if first { tokens } else { 0 };
        for (kind, tokens) in [
            ("prompt", of_prompt(usage.prompt_tokens)),
            ("cached", of_prompt(usage.cached_tokens)),
            ("generated", usage.output_tokens),
            ("reasoning", usage.reasoning_tokens),
        ] {
            self.tokens.get_or_create(&Kind { kind }).inc_by(tokens.into());
        }
    }

    fn answered(&self, handler: String, method: &'static str, status: u16) {
        let status = match status {
            ..200 => "1xx",
            200..300 => "2xx",
            300..400 => "3xx",
            400..500 => "4xx",
            500.. => "5xx",
        };
        self.http.get_or_create(&HttpRequest { handler, method, status }).inc();
    }
}

fn add<M: Metric + Clone + Default>(to: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    to.register(name, help, metric.clone());
    metric
}

/// One request, counted when it ends, however it does.
#[derive(Debug)]
pub(crate) struct Counted {
    metrics: Arc<Metrics>,
    traced: Traced,
    arrived: Instant,
    /// When the last stage ended.
    stage: Instant,
    placed: bool,
    answered: bool,
    over: bool,
}

impl Counted {
    /// A request that arrives now.
    pub(crate) fn new(metrics: Arc<Metrics>, traced: Traced) -> Self {
        let now = Instant::now();
        Self { metrics, traced, arrived: now, stage: now, placed: false, answered: false, over: false }
    }

    /// A stage of the way down is behind it.
    pub(crate) fn passed(&mut self, stage: &'static str) {
        self.metrics.passed(stage, self.stage);
        self.traced.passed(stage);
        self.stage = Instant::now();
    }

    /// It is admitted but for a place, for which it waits.
    pub(crate) fn waits(&mut self) {
        self.metrics.passed("admit", self.stage);
        self.traced.waits();
        self.stage = Instant::now();
    }

    /// The group it goes to first.
    pub(crate) fn placed(&mut self, group: &str, prompt_tokens: usize) {
        self.placed = true;
        self.traced.placed(group, prompt_tokens);
    }

    /// A message goes up.
    pub(crate) fn message(&mut self, message: &v1::GenerateResponse) {
        if !std::mem::replace(&mut self.answered, true) {
            self.metrics.passed("first_message", self.stage);
        }
        self.traced.message(message);
        if let Some(usage) = &message.usage {
            self.metrics.used(usage, message.index == 0);
        }
    }

    /// The last message went up, or a failure.
    pub(crate) fn ended(&mut self, failure: Option<&Failure>) {
        self.end(failure.map_or(OK, Failure::reason), failure);
    }

    fn end(&mut self, outcome: &'static str, failure: Option<&Failure>) {
        if !std::mem::replace(&mut self.over, true) {
            self.traced.ended(outcome, failure);
            self.metrics.ended(outcome);
            if failure.is_some() && !self.placed {
                self.metrics.rejected(outcome);
            }
            self.metrics.passed("whole", self.arrived);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.end(ABANDONED, None);
    }
}

/// Counts every answer of the HTTP listener.
pub(crate) async fn count_http(metrics: Arc<Metrics>, request: Request, next: Next) -> Response {
    // Paths and methods nobody serves would otherwise make series without end.
    let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let method = match request.method().as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "HEAD" => "HEAD",
        _ => "other",
    };
    let response = next.run(request).await;
    metrics.answered(path.unwrap_or_else(|| "none".to_owned()), method, response.status().as_u16());
    response
}
