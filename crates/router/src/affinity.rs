//! What each group has seen of prompts, so that a prompt goes where its beginning has been computed. Pure: it is told the
//! time. A guess: a group may have dropped from its cache what it is thought to know.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

/// Tokens of one link of a chain: short enough for short prompts, long enough that few are kept.
pub const LINK_TOKENS: usize = 16;
/// Links of one prompt that are looked at: the rest of a longer prompt is not worth the memory.
const LINKS_MAX: usize = 2048;
/// Links of one generation, some 16 MiB; two are kept.
const GENERATION_LINKS_MAX: usize = 1 << 18;
/// What has not been used for one to two of these is forgotten, as groups do under load.
const GENERATION_AGE: Duration = Duration::from_secs(300);
/// Groups that can be told apart; those after them are chosen by load alone.
const GROUPS_MAX: usize = u64::BITS as usize;

/// A prompt's beginnings: link `i` stands for its first `(i + 1) * LINK_TOKENS` tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain(Vec<u64>);

impl Chain {
    /// The chain of a prompt. Prompts with different salts share nothing.
    #[must_use]
    pub fn of(prompt: &[u32], salt: &[u8]) -> Self {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        let link = |tokens: &[u32]| {
            tokens.hash(&mut hasher);
            hasher.finish()
        };
        Self(prompt.chunks_exact(LINK_TOKENS).take(LINKS_MAX).map(link).collect())
    }
}

/// Which groups have been sent which beginnings, as bits.
type Links = HashMap<u64, u64>;

/// The memory of all placements.
#[derive(Debug)]
pub struct Affinity {
    young: Links,
    old: Links,
    since: Instant,
}

impl Affinity {
    /// One that knows nothing.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { young: Links::new(), old: Links::new(), since: now }
    }

    /// Tokens of the prompt's beginning that each of `groups` groups has been sent.
    #[must_use]
    pub fn known(&self, chain: &Chain, groups: usize) -> Vec<usize> {
        let mut known = vec![0; groups];
        let mut all = u64::MAX;
        for (index, link) in chain.0.iter().enumerate() {
            let at = |links: &Links| links.get(link).copied().unwrap_or_default();
            // A later beginning counts only where all earlier ones are known too.
            all &= at(&self.young) | at(&self.old);
            if all == 0 {
                break;
            }
            for (group, known) in known.iter_mut().enumerate().take(GROUPS_MAX) {
                if all >> group & 1 == 1 {
                    *known = (index + 1) * LINK_TOKENS;
                }
            }
        }
        known
    }

    /// Notes that `group` has been sent the prompt.
    pub fn learn(&mut self, chain: &Chain, group: usize, now: Instant) {
        if group >= GROUPS_MAX {
            return;
        }
        if now.saturating_duration_since(self.since) >= GENERATION_AGE
            || self.young.len() + chain.0.len() > GENERATION_LINKS_MAX
        {
            self.old = std::mem::take(&mut self.young);
            self.since = now;
        }
        for link in &chain.0 {
            *self.young.entry(*link).or_default() |= 1 << group;
        }
    }

    /// Forgets what a group knew, which begins anew.
    pub fn forget(&mut self, group: usize) {
        if group >= GROUPS_MAX {
            return;
        }
        for links in [&mut self.young, &mut self.old] {
            links.retain(|_, groups| {
                *groups &= !(1 << group);
                *groups != 0
            });
        }
    }
}
