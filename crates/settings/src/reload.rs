//! What may change while a process runs, and what needs a restart, key by key.

use std::fmt;

use serde_json::Value;

use crate::load::Loaded;
use crate::{Complaint, Origin};

/// Who goes on with a changed configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `cohort up`: a router and groups.
    Up,
    /// `cohort router` by itself; what groups are started with is not its business.
    Router,
    /// `cohort group` by itself; what a router is started with is not its business.
    Group,
}

/// One key that has another value now.
#[derive(Debug, Clone, PartialEq)]
pub struct Changed {
    /// Its full name.
    pub key: String,
    /// The value that was in force; `null` where it was left out.
    pub before: Value,
    /// The new one.
    pub after: Value,
}

impl fmt::Display for Changed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Value| if value.is_null() { "not set".to_owned() } else { value.to_string() };
        write!(f, "{} {} → {}", self.key, shown(&self.before), shown(&self.after))
    }
}

/// What becomes of a changed key.
enum Effect {
    /// The process goes on with it.
    Live,
    /// It counts at the start, for this reason.
    Restart(&'static str),
    /// This process does not use it.
    Nothing,
}

/// Keys of `[router]` that a running router takes, by name or by section.
const ROUTER_LIVE: [&str; 11] = [
    "router.workers",
    "router.weights",
    "router.dns.",
    "router.registration_hold_s",
    "router.limits.",
    "router.queue.",
    "router.http.",
    "router.keys_file",
    "router.resume_grace_s",
    "router.withdraw_grace_s",
    "router.drain_grace_s",
];

fn effect(key: &str, role: Role) -> Effect {
    let one_of = |keys: &[&str]| keys.iter().any(|of| key == *of || of.ends_with('.') && key.starts_with(of));
    if key == "telemetry.log_level" {
        return Effect::Live;
    }
    if key.starts_with("router.") && role != Role::Group {
        return match key {
            "router.workers" | "router.weights" if role == Role::Up => Effect::Nothing,
            _ if one_of(&ROUTER_LIVE) => Effect::Live,
            "router.grpc_listen" | "router.http_listen" => {
                Effect::Restart("a listener keeps the address it was opened at")
            }
            _ if one_of(&["router.tls."]) => {
                Effect::Restart("the files are read again when they change, their names at the start")
            }
            _ => Effect::Restart("a router reads it when it starts"),
        };
    }
    if key.starts_with("group.") && role != Role::Router {
        return Effect::Restart("groups are started with it");
    }
    match (key, role) {
        ("cluster.groups" | "cluster.weights", Role::Up) => Effect::Live,
        ("cluster.groups" | "cluster.weights", _) => Effect::Nothing,
        _ if one_of(&["model."]) => match role {
            Role::Router if !one_of(&["model.path", "model.name", "model.preset"]) => Effect::Nothing,
            Role::Router => Effect::Restart("a router reads the model's text files when it starts"),
            Role::Up | Role::Group => Effect::Restart("groups load the model when they start"),
        },
        _ if one_of(&["cluster.", "telemetry."]) => Effect::Restart("every process reads it when it starts"),
        _ => Effect::Nothing,
    }
}

impl Loaded {
    /// What a running process makes of a configuration that was loaded anew: the keys it goes on with.
    ///
    /// # Errors
    /// Every key that needs a restart, with the reason; then nothing of `new` may be used.
    pub fn changes(&self, new: &Self, role: Role) -> Result<Vec<Changed>, Vec<Complaint>> {
        let pairs = self.settings.entries().into_iter().zip(new.settings.entries());
        let (mut live, mut refused) = (Vec::new(), Vec::new());
        for ((key, before), (_, after)) in pairs {
            if before == after {
                continue;
            }
            let changed = Changed { key, before, after };
            match effect(&changed.key, role) {
                Effect::Live => live.push(changed),
                Effect::Nothing => {}
                Effect::Restart(why) => {
                    // A key that was left out has no line any more; where it stood says more than nothing.
                    let origin = match new.origin(&changed.key) {
                        Origin::Default => self.origin(&changed.key),
                        there => there,
                    };
                    let reason = format!("{changed} needs a restart: {why}");
                    let reason = reason.trim_start_matches(&changed.key).trim_start().to_owned();
                    refused.push(Complaint { origin, key: changed.key, reason });
                }
            }
        }
        if refused.is_empty() { Ok(live) } else { Err(refused) }
    }
}
