//! What every rank of a group has done, as its leader shows it: the ranks tell it between two steps when somebody asks.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use proto::worker::GroupActivity;

use super::{Ratio, add};

type Seconds = Counter<f64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRank {
    rank: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCollective {
    rank: u32,
    collective: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfExpert {
    expert: u32,
}

/// Counters that follow what the ranks tell.
pub(super) struct Ranks {
    steps: Family<OfRank, Counter>,
    rows: Family<OfRank, Counter>,
    seconds: Family<OfCollective, Seconds>,
    calls: Family<OfCollective, Counter>,
    sent: Family<OfCollective, Counter>,
    received: Family<OfCollective, Counter>,
    experts: Family<OfExpert, Counter>,
    imbalance: Ratio,
}

impl Ranks {
    pub(super) fn register(to: &mut Registry) -> Self {
        Self {
            steps: add(to, "cohort_rank_steps", "Steps a rank has run"),
            rows: add(
                to,
                "cohort_rank_rows",
                "Rows of a rank's batches; ranks of one sub-group have the same",
            ),
            seconds: add(
                to,
                "cohort_collective_seconds",
                "Time a rank was in a collective, waiting for others included; 0 where a device runs them",
            ),
            calls: add(to, "cohort_collective_calls", "Collectives a rank took part in"),
            sent: add(to, "cohort_collective_sent_bytes", "Payload a rank sent in a collective"),
            received: add(to, "cohort_collective_received_bytes", "Payload a rank got in a collective"),
            experts: add(
                to,
                "cohort_expert_rows",
                "Rows that chose an expert, over all layers; none where the device does not count",
            ),
            imbalance: add(
                to,
                "cohort_expert_imbalance",
                "Rows of the busiest expert of a layer by those of its average one, in the most uneven layer",
            ),
        }
    }

    /// Brings the counters to what was told.
    pub(super) fn show(&self, group: &GroupActivity) {
        for (rank, told) in (0..).zip(&group.ranks) {
            follow(&self.steps.get_or_create(&OfRank { rank }), told.steps);
            follow(&self.rows.get_or_create(&OfRank { rank }), told.rows);
            for of in &told.collectives {
                let label = OfCollective { rank, collective: of.operation.clone() };
                follow(&self.calls.get_or_create(&label), of.calls);
                follow(&self.sent.get_or_create(&label), of.bytes_sent);
                follow(&self.received.get_or_create(&label), of.bytes_received);
                let seconds = self.seconds.get_or_create(&label);
                seconds.inc_by((of.seconds - seconds.get()).max(0.0));
            }
        }
        let experts = group.layers.iter().map(|layer| layer.chosen.len()).max().unwrap_or(0);
        for expert in 0..experts {
            let rows = group.layers.iter().filter_map(|layer| layer.chosen.get(expert)).sum();
            let expert = u32::try_from(expert).unwrap_or(u32::MAX);
            follow(&self.experts.get_or_create(&OfExpert { expert }), rows);
        }
        let unevenness = |chosen: &[u64]| {
            let (most, all) = (chosen.iter().max()?, chosen.iter().sum::<u64>());
            (all > 0).then(|| *most as f64 * chosen.len() as f64 / all as f64)
        };
        let layers = group.layers.iter().filter_map(|layer| unevenness(&layer.chosen));
        self.imbalance.set(layers.fold(0.0, f64::max));
    }
}

/// Two pages that are written at once may each bring news; the later one has more.
fn follow(counter: &Counter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}
