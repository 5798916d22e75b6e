//! Which group gets a request. Pure: numbers in, an index out.

/// What is known of one group at the moment of choosing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Whether it takes requests and serves the right model, and this request has not been refused there.
    pub eligible: bool,
    /// Requests this router has open there.
    pub in_flight: usize,
    /// Requests the group reported last, of all routers, running and waiting.
    pub reported: u64,
}

/// The least loaded eligible group: fewest requests of our own (a count that is never stale), then fewest reported,
/// then the first. `None` when none is eligible.
#[must_use]
pub fn least_loaded(candidates: &[Candidate]) -> Option<usize> {
    let eligible = candidates.iter().enumerate().filter(|(_, candidate)| candidate.eligible);
    eligible.min_by_key(|(_, candidate)| (candidate.in_flight, candidate.reported)).map(|(index, _)| index)
}
