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
    /// Tokens of the request's prompt that it has computed before, as far as is known.
    pub known_tokens: usize,
}

/// Why a group was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It had the least to do.
    LeastLoaded,
    /// It knows the beginning of the prompt, and has little more to do than the others.
    Prefix,
}

/// Requests a group may have more than the least loaded one and still be chosen for what it knows: each of them costs the
/// others a share of every step, and what is known saves one prompt.
const SLACK_REQUESTS: usize = 4;
/// Likewise, in parts of the least loaded one's requests.
const SLACK_PART: usize = 4;

/// The better of two: the least loaded eligible group (fewest requests of our own, a count that is never stale, then fewest
/// reported, then the first), and the one that knows most of the prompt, which is better while its load is not much more.
/// `None` when none is eligible.
#[must_use]
pub fn choose(candidates: &[Candidate]) -> Option<(usize, Why)> {
    let eligible = || candidates.iter().enumerate().filter(|(_, candidate)| candidate.eligible);
    let load = |candidate: &Candidate| (candidate.in_flight, candidate.reported);
    let (idle, least) = eligible().min_by_key(|(_, candidate)| load(candidate))?;
    let knowing = eligible()
        .filter(|(_, candidate)| candidate.known_tokens > least.known_tokens)
        .filter(|(_, candidate)| {
            let most = least.in_flight + least.in_flight / SLACK_PART + SLACK_REQUESTS;
            candidate.in_flight <= most
        })
        .min_by_key(|(_, candidate)| (std::cmp::Reverse(candidate.known_tokens), load(candidate)));
    Some(knowing.map_or((idle, Why::LeastLoaded), |(index, _)| (index, Why::Prefix)))
}
