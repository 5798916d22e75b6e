//! The flags of logs and traces.

use clap::Args;
use settings::{Flag, Settings, Telemetry};

use super::{ConfigFlags, given, shown};

/// Where logs go: always to stderr.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct LogFlags {
    /// What is logged: error, warn, info, debug, trace, or a filter such as `router=debug,info` [default: RUST_LOG]
    #[arg(long, global = true, value_name = "FILTER", help_heading = "Logging")]
    pub log_level: Option<String>,
    /// How log lines are written: human or json [default: human]
    #[arg(long, global = true, value_parser = ["human", "json"], help_heading = "Logging", value_name = "FORMAT")]
    #[arg(hide_possible_values = true)]
    pub log_format: Option<String>,
}

/// The traces of requests.
#[derive(Debug, Clone, Default, PartialEq, Args)]
#[command(next_help_heading = "Tracing")]
pub struct TraceFlags {
    /// Collector that takes spans by OTLP over gRPC, as http://host:port or https://host:port [default: nothing is traced]
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Authorities that the certificate of an https:// collector must be signed by (PEM)
    #[arg(long, value_name = "FILE")]
    pub otlp_ca: Option<String>,
    /// Share of the requests that are traced, 0 to 1 [default: 1]
    #[arg(long, value_name = "SHARE")]
    pub trace_sample_ratio: Option<f64>,
    /// Whether a caller's `traceparent` decides whether its request is traced [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub trace_follow_callers: Option<bool>,
    /// Write prompts and answers into the spans
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub trace_record_content: Option<bool>,
}

impl LogFlags {
    /// What they say, and the defaults of the rest: for a command that has no configuration.
    #[must_use]
    pub fn telemetry(&self) -> Telemetry {
        let defaults = Telemetry::default();
        let format = self.log_format.as_deref().and_then(|format| format.parse().ok());
        let log_format = format.unwrap_or(defaults.log_format);
        Telemetry { log_level: self.log_level.clone(), log_format, ..defaults }
    }
}

impl ConfigFlags for LogFlags {
    fn flags(&self) -> Vec<Flag> {
        [
            given("--log-level", "telemetry.log_level", self.log_level.as_ref()),
            given("--log-format", "telemetry.log_format", self.log_format.as_ref()),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

impl ConfigFlags for TraceFlags {
    fn flags(&self) -> Vec<Flag> {
        [
            given("--otlp-endpoint", "telemetry.otlp_endpoint", self.otlp_endpoint.as_ref()),
            given("--otlp-ca", "telemetry.otlp_ca", self.otlp_ca.as_ref()),
            given("--trace-sample-ratio", "telemetry.sample_ratio", self.trace_sample_ratio.as_ref()),
            given("--trace-follow-callers", "telemetry.follow_callers", self.trace_follow_callers.as_ref()),
            given("--trace-record-content", "telemetry.record_content", self.trace_record_content.as_ref()),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

impl From<&Telemetry> for LogFlags {
    fn from(telemetry: &Telemetry) -> Self {
        Self {
            log_level: telemetry.log_level.clone(),
            log_format: Some(telemetry.log_format.name().to_owned()),
        }
    }
}

impl From<&Settings> for TraceFlags {
    fn from(settings: &Settings) -> Self {
        let telemetry = &settings.telemetry;
        Self {
            otlp_endpoint: telemetry.otlp_endpoint.clone(),
            otlp_ca: shown(telemetry.otlp_ca.as_deref()),
            trace_sample_ratio: Some(telemetry.sample_ratio),
            trace_follow_callers: Some(telemetry.follow_callers),
            trace_record_content: Some(telemetry.record_content),
        }
    }
}
