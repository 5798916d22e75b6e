//! What a type alone cannot say: ranges, and keys that must fit together.

use std::ops::RangeInclusive;
use std::time::Duration;

use types::limits::{CONTEXT_TOKENS_MAX, MESSAGE_BYTES_MAX, PRIORITY_MAX, RANKS_MAX};
use types::{Dispatch, DispatchChoice, ExpertSharding};
use worker::LoadFormat;

use crate::tree::{Group, Model, Router, RouterJwt, Settings};
use crate::weights;

/// Groups of one cluster file: far above what one machine holds.
pub(crate) const GROUPS_MAX: u64 = 256;
/// Layers of one model: far above any published one.
pub(crate) const LAYERS_MAX: u64 = 4096;
/// Threads of one rank: above any machine in use.
pub(crate) const THREADS_MAX: u64 = 4096;
/// Requests a router admits, or a group lets wait or run, at once.
pub(crate) const REQUESTS_MAX: u64 = 1 << 20;
/// Tokens of a cache or a queue: sums of two of them fit 32 bits.
pub(crate) const TOKENS_MAX: u64 = (u32::MAX / 2) as u64;
/// Tokens of one sequence.
pub(crate) const CONTEXT_MAX: u64 = CONTEXT_TOKENS_MAX as u64;
/// Bytes of one prompt: it has to fit a message.
pub(crate) const PROMPT_BYTES_MAX: u64 = MESSAGE_BYTES_MAX as u64;
/// Tokens that all who wait at a router may cost: each may ask for a whole context.
pub(crate) const QUEUE_TOKENS_MAX: u64 = REQUESTS_MAX * CONTEXT_MAX;
/// Bytes of the prompts that wait at a router: what a large machine has to spare.
pub(crate) const QUEUE_BYTES_MAX: u64 = 64 << 30;
/// A day, in seconds: a longer time-out is none.
pub(crate) const TIMEOUT_MAX_S: f64 = 86_400.0;
/// Seconds that two clocks may be apart: more is a clock to be set.
pub(crate) const LEEWAY_MAX_S: f64 = 600.0;
/// Seconds a time-out lasts at least: a shorter one would strike before anything can happen.
pub(crate) const TIMEOUT_MIN_S: f64 = 0.001;

/// A key and what is wrong with its value.
pub(crate) type Fault = (&'static str, String);

/// Every fault of a tree whose values have the right types.
pub(crate) fn faults(settings: &Settings) -> Vec<Fault> {
    let mut faults = Vec::new();
    group(&settings.group, &mut faults);
    router(&settings.router, &mut faults);
    model(&settings.model, &mut faults);
    within("cluster.groups", settings.cluster.groups.into(), 1..=GROUPS_MAX, &mut faults);
    weights::check(&settings.router, &settings.cluster, &mut faults);
    metrics_ports(settings, &mut faults);
    tls(settings, &mut faults);
    settings.telemetry.check(&mut faults);
    faults
}

/// Each process of one machine gets a port of its own for its metrics, and none of them is the router's.
fn metrics_ports(settings: &Settings, faults: &mut Vec<Fault>) {
    let groups = settings.cluster.groups;
    let group = &settings.group;
    let followers = group.tensor_parallel.get().saturating_mul(group.data_parallel).saturating_sub(1);
    let leaders = ("group.metrics_listen", settings.group.metrics_listen, groups);
    let ranks =
        ("group.rank_metrics_listen", settings.group.rank_metrics_listen, groups.saturating_mul(followers));
    let mut taken = vec![
        ("the router's", Some(settings.router.grpc_listen)),
        ("the router's", settings.router.http_listen.address()),
    ];
    let mut of_leaders = None;
    for (key, listen, count) in [leaders, ranks] {
        let Some(first) = listen.address().filter(|address| address.port() != 0) else { continue };
        let ports = u32::from(first.port())..u32::from(first.port()).saturating_add(count);
        if ports.end > u32::from(u16::MAX) + 1 {
            let what = if key == leaders.0 { "groups" } else { "ranks that follow" };
            faults.push((key, format!("leaves no ports for {count} {what} after {}", first.port())));
        }
        for (whose, address) in std::mem::take(&mut taken) {
            if let Some(address) =
                address.filter(|at| at.ip() == first.ip() && ports.contains(&u32::from(at.port())))
            {
                let what = if key == leaders.0 { "groups" } else { "ranks" };
                faults.push((key, format!("one of the {what} would take {address}, which is {whose}")));
            }
            taken.push((whose, address));
        }
        let overlap = |(ip, other): &(std::net::IpAddr, std::ops::Range<u32>)| {
            *ip == first.ip() && other.start < ports.end && ports.start < other.end
        };
        if of_leaders.as_ref().is_some_and(overlap) {
            let reason =
                format!("one of the ranks would take a port of the groups' metrics, from {}", first.port());
            faults.push((key, reason));
        }
        of_leaders.get_or_insert((first.ip(), ports));
    }
}

/// What stands alone protects nothing.
fn tls(settings: &Settings, faults: &mut Vec<Fault>) {
    let (router, group, cluster) = (&settings.router.tls, &settings.group.tls, &settings.cluster.tls);
    let pairs = [
        (&router.certificate, &router.key, "router.tls.certificate", "router.tls.key"),
        (&group.certificate, &group.key, "group.tls.certificate", "group.tls.key"),
        (&cluster.certificate, &cluster.key, "cluster.tls.certificate", "cluster.tls.key"),
    ];
    for (certificate, key, certificate_name, key_name) in pairs {
        match (certificate, key) {
            (Some(_), None) => faults.push((certificate_name, format!("is of no use without {key_name}"))),
            (None, Some(_)) => faults.push((key_name, format!("is of no use without {certificate_name}"))),
            (Some(_), Some(_)) | (None, None) => {}
        }
    }
    for (own, needed, own_name, needed_name) in [
        (&router.client_ca, &router.certificate, "router.tls.client_ca", "router.tls.certificate"),
        (&group.client_ca, &group.certificate, "group.tls.client_ca", "group.tls.certificate"),
        (&cluster.certificate, &cluster.ca, "cluster.tls.certificate", "cluster.tls.ca"),
    ] {
        if own.is_some() && needed.is_none() {
            faults.push((own_name, format!("is of no use without {needed_name}")));
        }
    }
    let of_tls = |worker: &String| worker.trim_start_matches("dns+").starts_with("https://");
    let encrypted = settings.router.workers.iter().any(of_tls);
    if encrypted && cluster.ca.is_none() {
        let reason = "is needed where router.workers has an https:// address".to_owned();
        faults.push(("cluster.tls.ca", reason));
    }
}

fn model(model: &Model, faults: &mut Vec<Fault>) {
    if let Some(keys) = model.window_keys {
        within("model.window_keys", keys.into(), 1..=CONTEXT_MAX, faults);
    }
    if let Some(layers) = model.layers {
        within("model.layers", layers.into(), 1..=LAYERS_MAX, faults);
    }
    if let (Some(preset), Some(path)) = (model.preset, &model.path) {
        let reason = format!("{preset} and model.path, {}, are two models; choose one", path.display());
        faults.push(("model.preset", reason));
    }
    if model.load_format == LoadFormat::Checkpoint {
        let dummy = "set model.load_format to dummy";
        if let Some(preset) = model.preset {
            faults.push((
                "model.preset",
                format!("{preset} is the shape of a model, without its weights; {dummy}, or give model.path"),
            ));
        }
        if model.layers.is_some() {
            let reason = format!("a checkpoint is served with all its layers; {dummy} to cut a model");
            faults.push(("model.layers", reason));
        }
    }
}

fn group(group: &Group, faults: &mut Vec<Fault>) {
    let tokens = 1..=TOKENS_MAX;
    let whole = [
        ("group.kv_tokens", group.kv_tokens, tokens.clone()),
        ("group.step_tokens_max", group.step_tokens_max, 1..=CONTEXT_MAX),
        ("group.running_max", group.running_max, 1..=REQUESTS_MAX),
        ("group.waiting_requests_max", group.waiting_requests_max, 1..=REQUESTS_MAX),
        ("group.waiting_tokens_max", group.waiting_tokens_max, tokens),
    ];
    for (key, value, range) in whole {
        within(key, value.into(), range, faults);
    }
    if let Some(threads) = group.threads {
        within("group.threads", threads as u64, 1..=THREADS_MAX, faults);
    }
    let (kv, block) = (group.kv_tokens, group.block_size.tokens());
    if kv > 0 && kv < block {
        faults.push((
            "group.kv_tokens",
            format!("{kv} tokens do not hold one block of {block} (group.block_size)"),
        ));
    }
    let (step, running) = (group.step_tokens_max, group.running_max);
    if step > 0 && running > 0 && step < running {
        let reason =
            format!("{step} is below group.running_max, {running}: every sequence needs a token a step");
        faults.push(("group.step_tokens_max", reason));
    }
    sharing(group, faults);
    if let Some(empty) = group.hosts.iter().find(|host| host.is_empty() || host.contains([' ', '/'])) {
        faults.push(("group.hosts", format!("{empty:?} is not a host such as 10.0.0.1 or 10.0.0.1:7070")));
    }
    for router in group.routers.iter().filter(|router| !is_worker_address(router)) {
        let reason =
            format!("{router:?} is not an address such as http://10.0.0.1:50051 or dns+http://routers:50051");
        faults.push(("group.routers", reason));
    }
    if let Some(url) =
        group.advertise.as_ref().filter(|url| url.starts_with("dns+") || !is_worker_address(url))
    {
        faults.push(("group.advertise", format!("{url:?} is not an address such as http://10.0.0.1:7000")));
    }
    let encrypted =
        group.routers.iter().any(|router| router.trim_start_matches("dns+").starts_with("https://"));
    if encrypted && group.routers_ca.is_none() {
        faults.push(("group.routers_ca", "is needed where group.routers has an https:// address".to_owned()));
    }
    lasting("group.boot_timeout_s", group.boot_timeout_s, TIMEOUT_MIN_S, faults);
    lasting("group.step_timeout_s", group.step_timeout_s, TIMEOUT_MIN_S, faults);
    lasting("group.drain_grace_s", group.drain_grace_s, 0.0, faults);
}

/// Sub-groups, experts and dispatch must fit each other.
fn sharing(group: &Group, faults: &mut Vec<Fault>) {
    let (tensor, data) = (group.tensor_parallel.get(), group.data_parallel);
    within("group.data_parallel", data.into(), 1..=RANKS_MAX.into(), faults);
    if u64::from(data) * u64::from(tensor) > RANKS_MAX.into() && data <= RANKS_MAX {
        let reason =
            format!("{data} sub-groups of {tensor} ranks are more than the {RANKS_MAX} a group may have");
        faults.push(("group.data_parallel", reason));
    }
    let whole = group.experts == ExpertSharding::Expert;
    if data > 1 && !whole {
        let reason =
            format!("{data} sub-groups share whole experts, and group.experts is tensor; set it to expert");
        faults.push(("group.experts", reason));
    }
    if data > 1 && group.dispatch == DispatchChoice::Of(Dispatch::Replicated) {
        let reason =
            format!("the rows of {data} sub-groups differ, so they must be sent: set all-to-all or auto");
        faults.push(("group.dispatch", reason));
    }
    if data == 1 && group.dispatch.resolve(data) == Dispatch::AllToAll && !whole {
        let reason = "all-to-all sends rows to whole experts, and group.experts is tensor; set it to expert";
        faults.push(("group.dispatch", reason.to_owned()));
    }
    if let (Some(file), false) = (&group.expert_placement, whole) {
        let reason =
            format!("{} places whole experts, and group.experts is tensor; set it to expert", file.display());
        faults.push(("group.expert_placement", reason));
    }
}

fn router(router: &Router, faults: &mut Vec<Fault>) {
    let limits = &router.limits;
    within("router.limits.requests_max", limits.requests_max.into(), 1..=REQUESTS_MAX, faults);
    let bytes = limits.prompt_bytes_max as u64;
    within("router.limits.prompt_bytes_max", bytes, 1..=PROMPT_BYTES_MAX, faults);
    lasting("router.registration_hold_s", router.registration_hold_s, TIMEOUT_MIN_S, faults);
    lasting("router.dns.interval_s", router.dns.interval_s, TIMEOUT_MIN_S, faults);
    lasting("router.dns.hold_s", router.dns.hold_s, 0.0, faults);
    let queue = &router.queue;
    within("router.queue.requests_max", queue.requests_max.into(), 0..=REQUESTS_MAX, faults);
    within("router.queue.tokens_max", queue.tokens_max, 1..=QUEUE_TOKENS_MAX, faults);
    within("router.queue.bytes_max", queue.bytes_max as u64, 1..=QUEUE_BYTES_MAX, faults);
    within("router.queue.key_requests_max", queue.key_requests_max.into(), 1..=REQUESTS_MAX, faults);
    lasting("router.queue.wait_max_s", queue.wait_max_s, TIMEOUT_MIN_S, faults);
    lasting("router.http.head_timeout_s", router.http.head_timeout_s, TIMEOUT_MIN_S, faults);
    lasting("router.http.body_timeout_s", router.http.body_timeout_s, TIMEOUT_MIN_S, faults);
    lasting("router.http.write_timeout_s", router.http.write_timeout_s, TIMEOUT_MIN_S, faults);
    lasting("router.http.keep_alive_s", router.http.keep_alive_s, TIMEOUT_MIN_S, faults);
    lasting("router.connection_age_max_s", router.connection_age_max_s, 0.0, faults);
    lasting("router.resume_grace_s", router.resume_grace_s, 0.0, faults);
    lasting("router.withdraw_grace_s", router.withdraw_grace_s, 0.0, faults);
    lasting("router.drain_grace_s", router.drain_grace_s, 0.0, faults);
    jwt(&router.jwt, faults);
    let grpc = router.grpc_listen;
    if grpc.port() != 0 && router.http_listen.address() == Some(grpc) {
        faults.push(("router.http_listen", format!("is the same address as router.grpc_listen, {grpc}")));
    }
    for worker in &router.workers {
        if !is_worker_address(worker) {
            faults.push((
                "router.workers",
                format!(
                    "{worker:?} is not an address such as http://10.0.0.1:7000 or dns+http://groups:7000"
                ),
            ));
        }
    }
}

/// Tokens of anybody for anybody would be no proof of anything.
fn jwt(jwt: &RouterJwt, faults: &mut Vec<Fault>) {
    let taken = jwt.jwks_file.is_some();
    for (key, list) in [("router.jwt.issuers", &jwt.issuers), ("router.jwt.audiences", &jwt.audiences)] {
        match (taken, list.is_empty()) {
            (true, true) => faults.push((key, "is needed where router.jwt.jwks_file is set".to_owned())),
            (false, false) => faults.push((key, "is of no use without router.jwt.jwks_file".to_owned())),
            (true, false) | (false, true) => {}
        }
    }
    let leeway = jwt.leeway_s.as_secs_f64();
    if !(0.0..=LEEWAY_MAX_S).contains(&leeway) {
        let reason = format!("must be between 0 and {LEEWAY_MAX_S} seconds, not {leeway}");
        faults.push(("router.jwt.leeway_s", reason));
    }
    for (key, count) in [
        ("router.jwt.requests_per_minute", jwt.requests_per_minute),
        ("router.jwt.tokens_per_minute", jwt.tokens_per_minute),
        ("router.jwt.concurrency", jwt.concurrency.map(u64::from)),
    ] {
        if count == Some(0) {
            faults.push((key, "must be at least 1; leave the key out for any number".to_owned()));
        }
    }
    if let Some(priority) = jwt.priority_min.filter(|level| !(-PRIORITY_MAX..=PRIORITY_MAX).contains(level)) {
        let reason = format!("must be between -{PRIORITY_MAX} and {PRIORITY_MAX}, not {priority}");
        faults.push(("router.jwt.priority_min", reason));
    }
}

/// `http://host:port` or `https://host:port`, nothing after it, and `dns+` before it where the host is a name.
pub(crate) fn is_worker_address(text: &str) -> bool {
    if let Some(named) = text.strip_prefix("dns+") {
        return !named.contains(['[', ']']) && is_worker_address(named);
    }
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let Some((host, port)) = rest.and_then(|rest| rest.rsplit_once(':')) else {
        return false;
    };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let plain = !host.is_empty() && !host.contains(['/', ':', ' ', '@', '[', ']']);
    (bracketed || plain) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

fn within(key: &'static str, value: u64, range: RangeInclusive<u64>, faults: &mut Vec<Fault>) {
    if !range.contains(&value) {
        faults.push((key, format!("must be between {} and {}, not {value}", range.start(), range.end())));
    }
}

fn lasting(key: &'static str, span: Duration, least: f64, faults: &mut Vec<Fault>) {
    let seconds = span.as_secs_f64();
    if !(least..=TIMEOUT_MAX_S).contains(&seconds) {
        faults.push((key, format!("must be between {least} and {TIMEOUT_MAX_S} seconds, not {seconds}")));
    }
}
