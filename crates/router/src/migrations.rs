//! Requests that went on, or began again, after the loss of their group.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

/// What was moved, as others call it too: a request that had generated nothing, or one that had.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    migration_type: &'static str,
}

const NEW: &str = "new_request";
const ONGOING: &str = "ongoing_request";

/// How many there were of each kind.
#[derive(Debug, Clone)]
pub(crate) struct Migrations(Family<Kind, Counter>);

impl Default for Migrations {
    fn default() -> Self {
        let family = Family::default();
        for migration_type in [NEW, ONGOING] {
            let _ = family.get_or_create(&Kind { migration_type });
        }
        Self(family)
    }
}

impl Migrations {
    /// For whoever shows it.
    pub(crate) fn family(&self) -> impl prometheus_client::registry::Metric + use<> {
        self.0.clone()
    }

    /// One that has so many tokens moved.
    pub(crate) fn count(&self, tokens: usize) {
        let migration_type = if tokens == 0 { NEW } else { ONGOING };
        self.0.get_or_create(&Kind { migration_type }).inc();
    }
}
