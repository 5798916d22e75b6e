//! Which layer a value came from that is no number, when every layer is looked at (`--check-numerics`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ops::Backend;
use proto::Failure;

/// The first place of the newest step that had such a value: 0 for none, 1 for the embedding, then the layers. Shared by
/// the thread that computes and the one that answers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Numerics(Arc<AtomicU32>);

impl Numerics {
    /// Looks at a step's residual stream after the embedding (0) or layer `at` (from 1); true when it holds a value that
    /// is no finite number.
    pub(crate) fn look<B: Backend>(
        &self,
        backend: &mut B,
        at: usize,
        x: &B::Tensor,
    ) -> Result<bool, ops::Error> {
        let found = backend.read(x)?.iter().any(|value| !value.is_finite());
        if found {
            self.0.store(u32::try_from(at + 1).unwrap_or(u32::MAX), Ordering::Release);
        }
        Ok(found)
    }

    /// The place as a number, 0 when there is none, and forgets it: for a rank that tells its leader.
    pub(crate) fn take(&self) -> u32 {
        self.0.swap(0, Ordering::AcqRel)
    }

    /// Takes note of a place that another rank found, when it found one.
    pub(crate) fn found(&self, place: u32) {
        if place > 0 {
            self.0.store(place, Ordering::Release);
        }
    }

    /// What a request is told whose logits are no numbers.
    pub(crate) fn failure(&self) -> Failure {
        let place = match self.0.load(Ordering::Acquire) {
            0 => "the head: every layer was finite".to_owned(),
            1 => "the embedding".to_owned(),
            layer => format!("layer {}", layer - 2),
        };
        let why = format!(
            "a logit is not a number; values that are none first came from {place}: its weights are damaged, or its \
             computation overflowed"
        );
        Failure::Internal { why }
    }
}
