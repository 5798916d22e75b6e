//! `[telemetry]`: what a process tells of itself beside its metrics.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

use crate::check::Fault;
use crate::{schema, strict};

/// `[telemetry]`: logs, and the traces of requests. `cohort up` and `cohort group` pass it on to what they start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Telemetry {
    /// What is logged: `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `router=debug,info`. Default: the
    /// variable `RUST_LOG`, else `info` in a router, group or worker and `warn` elsewhere.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub log_level: Option<String>,
    /// How log lines are written: `human`, or `json` for one object a line.
    #[serde(with = "strict::parsed")]
    #[schemars(schema_with = "schema::log_format")]
    pub log_format: LogFormat,
    /// Where the spans of traced requests are sent, as `http://host:port` or `https://host:port` of a collector that speaks
    /// OTLP over gRPC. Default: nothing is traced.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub otlp_endpoint: Option<String>,
    /// Authorities that the certificate of an `https://` collector must be signed by (PEM); read again when it changes.
    /// Default: none.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub otlp_ca: Option<PathBuf>,
    /// Share of the requests that are traced, 0 to 1.
    #[serde(with = "strict::fraction")]
    #[schemars(with = "f64", range(min = 0, max = 1))]
    pub sample_ratio: f64,
    /// Whether a caller whose `traceparent` says that its request is traced, or that it is not, decides that.
    #[serde(with = "strict::truth")]
    #[schemars(with = "bool")]
    pub follow_callers: bool,
    /// Whether prompts and answers are written into the spans of traced requests. Whoever reads the traces then reads
    /// them.
    #[serde(with = "strict::truth")]
    #[schemars(with = "bool")]
    pub record_content: bool,
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// The name used in flags and configuration files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Json => "json",
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err("use human or json".to_owned()),
        }
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            log_level: None,
            log_format: LogFormat::Human,
            otlp_endpoint: None,
            otlp_ca: None,
            sample_ratio: 1.0,
            follow_callers: true,
            record_content: false,
        }
    }
}

impl Telemetry {
    pub(crate) fn check(&self, faults: &mut Vec<Fault>) {
        if let Some(level) = &self.log_level
            && let Err(error) = EnvFilter::try_new(level)
        {
            let reason = format!("{level:?} is no level and no filter such as router=debug,info: {error}");
            faults.push(("telemetry.log_level", reason));
        }
        if !(0.0..=1.0).contains(&self.sample_ratio) {
            let reason = format!("must be between 0 and 1, not {}", self.sample_ratio);
            faults.push(("telemetry.sample_ratio", reason));
        }
        if let Some(endpoint) = self.otlp_endpoint.as_ref().filter(|endpoint| !is_endpoint(endpoint)) {
            let reason = format!("{endpoint:?} is not an address such as http://127.0.0.1:4317");
            faults.push(("telemetry.otlp_endpoint", reason));
        }
        let encrypted = self.otlp_endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("https://"));
        match (encrypted, &self.otlp_ca) {
            (true, None) => {
                let reason = "is needed where telemetry.otlp_endpoint is https://".to_owned();
                faults.push(("telemetry.otlp_ca", reason));
            }
            (false, Some(_)) => {
                let reason = "is of no use without an https:// telemetry.otlp_endpoint".to_owned();
                faults.push(("telemetry.otlp_ca", reason));
            }
            (true, Some(_)) | (false, None) => {}
        }
        if self.record_content && self.otlp_endpoint.is_none() {
            let reason = "is of no use without telemetry.otlp_endpoint".to_owned();
            faults.push(("telemetry.record_content", reason));
        }
    }
}

/// `http://host:port` or `https://host:port`, with nothing but a slash behind it.
fn is_endpoint(text: &str) -> bool {
    let rest = text
        .strip_prefix("http://")
        .or_else(|| text.strip_prefix("https://"))
        .map(|rest| rest.strip_suffix('/').unwrap_or(rest));
    let Some((host, port)) = rest.and_then(|rest| rest.rsplit_once(':')) else { return false };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let plain = !host.is_empty() && !host.contains(['/', ':', ' ', '@', '[', ']']);
    (bracketed || plain) && port.parse::<u16>().is_ok_and(|port| port > 0)
}
