//! Which group gets a request. Pure: numbers and random draws in, an index out.

/// What is known of one group at the moment of choosing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Whether it takes requests and serves the right model, and this request has not been refused there.
    pub eligible: bool,
    /// Requests this router has open there, a count that is never stale.
    pub in_flight: usize,
    /// Requests that others had there when the group reported last, running and waiting.
    pub others: usize,
    /// Tokens of the request's prompt that it has computed before, as far as is known.
    pub known_tokens: usize,
}

impl Candidate {
    const fn load(&self) -> usize {
        self.in_flight.saturating_add(self.others)
    }
}

/// Why a group was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It had less to do than another one.
    LeastLoaded,
    /// It knows the beginning of the prompt, and has little more to do than the others.
    Prefix,
}

/// Requests a group may have more than the less loaded one and still be chosen for what it knows: each of them costs the
/// others a share of every step, and what is known saves one prompt.
const SLACK_REQUESTS: usize = 4;
/// Likewise, in parts of the less loaded one's requests.
const SLACK_PART: usize = 4;

/// The better of two: the less loaded of two eligible groups drawn at random, and the group that knows most of the prompt,
/// which is better while its load is not much more. `None` when none is eligible.
///
/// Two at random and not all of them: several routers see the same reports, and would all send what comes next to the
/// same group. `below` draws a number below the one it is given.
#[must_use]
pub fn choose(candidates: &[Candidate], mut below: impl FnMut(usize) -> usize) -> Option<(usize, Why)> {
    let eligible = || candidates.iter().enumerate().filter(|(_, candidate)| candidate.eligible);
    let nth = |n: usize| eligible().nth(n);
    let (index, less) = match eligible().count() {
        0 => return None,
        1 => nth(0)?,
        2 => less_loaded(nth(0)?, nth(1)?),
        count => {
            let first = below(count);
            let second = below(count - 1);
            less_loaded(nth(first)?, nth(second + usize::from(second >= first))?)
        }
    };
    let most = less.load() + less.load() / SLACK_PART + SLACK_REQUESTS;
    let knowing = eligible()
        .filter(|(_, candidate)| candidate.known_tokens > less.known_tokens && candidate.load() <= most)
        .min_by_key(|(_, candidate)| (std::cmp::Reverse(candidate.known_tokens), candidate.load()));
    Some(knowing.map_or((index, Why::LeastLoaded), |(index, _)| (index, Why::Prefix)))
}

/// The one with less to do; the first of equals.
const fn less_loaded<'a>(
    first: (usize, &'a Candidate),
    second: (usize, &'a Candidate),
) -> (usize, &'a Candidate) {
    if second.1.load() < first.1.load() { second } else { first }
}
