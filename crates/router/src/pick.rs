//! Which group gets a request. Pure: numbers and random draws in, an index out.

use std::cmp::Ordering;

/// What is known of one group at the moment of choosing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Whether it takes requests and serves the right model, and this request has not been refused there.
    pub eligible: bool,
    /// Its share of the requests, beside those of the others; with 0 it gets none.
    pub weight: u32,
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

    /// Which has more to do for its weight with one request more than it has: of two idle ones, the lighter.
    fn busier(&self, other: &Self) -> Ordering {
        let share = |of: &Self, than: &Self| (of.load() as u128 + 1) * u128::from(than.weight);
        share(self, other).cmp(&share(other, self))
    }

    /// Whether it has no more to do, for its weight, than `load` requests are for a group of weight `of`.
    fn has_at_most(&self, load: usize, of: u32) -> bool {
        self.load() as u128 * u128::from(of) <= load as u128 * u128::from(self.weight)
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
/// others a share of every step, and what is known saves one prompt. Of groups with other weights, as many for each weight.
const SLACK_REQUESTS: usize = 4;
/// Likewise, in parts of the less loaded one's requests.
const SLACK_PART: usize = 4;

/// The better of two: the less loaded of two eligible groups drawn at random, and the group that knows most of the prompt,
/// which is better while its load is not much more. Loads are taken by weight, and a group is drawn as often as its weight
/// says. `None` when none is eligible.
///
/// Two at random and not all of them: several routers see the same reports, and would all send what comes next to the
/// same group. `below` draws a number below the one it is given.
#[must_use]
pub fn choose(candidates: &[Candidate], below: impl FnMut(usize) -> usize) -> Option<(usize, Why)> {
    let eligible: Vec<(usize, &Candidate)> = candidates
        .iter()
        .enumerate()
        .filter(|(_, candidate)| candidate.eligible && candidate.weight > 0)
        .collect();
    let (index, less) = match eligible.as_slice() {
        [] => return None,
        [only] => *only,
        [first, second] => less_loaded(*first, *second),
        several => {
            let (first, second) = two_of(several, below);
            less_loaded(first, second)
        }
    };
    let most = less.load() + less.load() / SLACK_PART + SLACK_REQUESTS;
    let knowing = eligible
        .into_iter()
        .filter(|(_, candidate)| candidate.known_tokens > less.known_tokens)
        .filter(|(_, candidate)| candidate.has_at_most(most, less.weight))
        .min_by(|(_, one), (_, other)| {
            other.known_tokens.cmp(&one.known_tokens).then_with(|| one.busier(other))
        });
    Some(knowing.map_or((index, Why::LeastLoaded), |(index, _)| (index, Why::Prefix)))
}

/// Two different ones, each drawn as often as its weight says among those that are left.
fn two_of<'a>(
    several: &[(usize, &'a Candidate)],
    mut below: impl FnMut(usize) -> usize,
) -> ((usize, &'a Candidate), (usize, &'a Candidate)) {
    let weight = |at: usize| several[at].1.weight as usize;
    let all: usize = (0..several.len()).map(weight).sum();
    let first = at_weight((0..several.len()).map(|at| (at, weight(at))), below(all));
    let others = (0..several.len()).filter(|&at| at != first);
    let second = at_weight(others.map(|at| (at, weight(at))), below(all - weight(first)));
    (several[first], several[second])
}

/// The one whose stretch of the line holds `drawn`, when each lies there as long as its weight.
fn at_weight(weights: impl Iterator<Item = (usize, usize)>, drawn: usize) -> usize {
    let mut end = 0;
    let mut last = 0;
    for (at, weight) in weights {
        end += weight;
        last = at;
        if drawn < end {
            break;
        }
    }
    last
}

/// The one with less to do for its weight; the first of equals.
fn less_loaded<'a>(first: (usize, &'a Candidate), second: (usize, &'a Candidate)) -> (usize, &'a Candidate) {
    if second.1.busier(first.1) == Ordering::Less { second } else { first }
}
