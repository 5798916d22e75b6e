//! How a rank starts: what every process of a group shows.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use proto::Phase;
use types::Bytes;

use super::{Ratio, add};
use crate::Config;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InPhase {
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
    dtype: String,
    tensor_parallel: u32,
    rank: u32,
}

/// Phase, and how the weights come.
pub(super) struct Boot {
    phase: Family<InPhase, Gauge>,
    percent: Gauge,
    read: Gauge,
    total: Gauge,
    seconds: Ratio,
    rate: Ratio,
    began: Mutex<Option<Instant>>,
}

impl Boot {
    pub(super) fn register(to: &mut Registry, config: &Config) -> Self {
        let build = Build {
            version: env!("CARGO_PKG_VERSION"),
            dtype: config.dtype.to_string(),
            tensor_parallel: config.rank.size().get(),
            rank: config.rank.index(),
        };
        let info = Family::<Build, Gauge>::default();
        info.get_or_create(&build).set(1);
        to.register("cohort_build_info", "Version and shape of this group, and this rank, always 1", info);
        Self {
            phase: add(to, "cohort_phase", "1 for the phase the group is in, 0 for the others"),
            percent: add(to, "cohort_phase_percent", "How much of its phase is done"),
            read: add(to, "cohort_load_read_bytes", "Weights this rank has read"),
            total: add(to, "cohort_load_total_bytes", "Weights this rank reads"),
            seconds: add(
                to,
                "cohort_load_seconds",
                "Time since this rank began to read weights, until it had them",
            ),
            rate: add(
                to,
                "cohort_load_bytes_per_second",
                "Weights this rank has read, by the time that took",
            ),
            began: Mutex::default(),
        }
    }

    /// A rank's phase.
    pub(super) fn phase(&self, now: Phase, percent: u32) {
        for phase in Phase::ALL {
            self.phase.get_or_create(&InPhase { phase: phase.name() }).set(i64::from(phase == now));
        }
        self.percent.set(percent.into());
    }

    /// So much of the weights is there.
    pub(super) fn loading(&self, done: Bytes, total: Bytes) {
        let mut began = self.began.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = began.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
        let gauge = |bytes: Bytes| i64::try_from(bytes.0).unwrap_or(i64::MAX);
        self.read.set(gauge(done));
        self.total.set(gauge(total));
        self.seconds.set(seconds);
        if seconds > 0.0 {
            self.rate.set(done.0 as f64 / seconds);
        }
    }
}
