//! What each group has seen of prompts, so that a prompt goes where its beginning has been computed. Pure: it is told the
//! time. A guess: a group may have dropped from its cache what it is thought to know, the likelier the longer ago it was
//! sent it, so what is known is worth less with time.
//!
//! The memory is a prefix tree whose nodes are named by the hash of the way to them, so that it needs no pointers: a
//! prompt's way through it is its [`Chain`].

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use ahash::{HashMap, HashMapExt};
use smallvec::SmallVec;

/// Tokens of the first links of a chain: short enough for short prompts.
pub const LINK_TOKENS: usize = 16;
/// Links of that length. Every half as many more are twice as long as those before, so that a link is at most a quarter of
/// what is before it: what is known of a long prompt need not be known to the token, and each link costs a request two
/// misses of the caches.
const LINKS_FIRST: usize = 8;
/// After this time what a group was sent is worth half as much.
pub const HALF_LIFE: Duration = Duration::from_secs(300);
/// Links of one generation, some 8 MiB; two are kept.
const GENERATION_LINKS_MAX: usize = 1 << 17;
/// What has not been used for one to two of these is forgotten altogether.
const GENERATION_AGE: Duration = Duration::from_secs(900);
/// Groups that a node remembers: the ones that were sent it last.
const SENT_MAX: usize = 8;

/// A prompt's beginnings: each link stands for all tokens up to its end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain(Vec<u64>);

/// Tokens of link `index` itself.
const fn link_tokens(index: usize) -> usize {
    match index.checked_sub(LINKS_FIRST) {
        None => LINK_TOKENS,
        Some(later) => LINK_TOKENS << (1 + later / (LINKS_FIRST / 2)),
    }
}

impl Chain {
    /// The chain of a prompt. Prompts with different salts share nothing.
    #[must_use]
    pub fn of(prompt: &[u32], salt: &[u8]) -> Self {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        let mut rest = prompt;
        let links = (0..).map_while(|index| {
            let (tokens, after) = rest.split_at_checked(link_tokens(index))?;
            tokens.hash(&mut hasher);
            rest = after;
            Some(hasher.finish())
        });
        Self(links.collect())
    }
}

/// A group that was sent a beginning, and when: milliseconds since the memory began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sent {
    group: u32,
    at_ms: u32,
}

/// The groups that were sent a beginning. Most beginnings went to one or two.
type Node = SmallVec<[Sent; 2]>;

/// The memory of all placements.
#[derive(Debug)]
pub struct Affinity {
    young: HashMap<u64, Node>,
    old: HashMap<u64, Node>,
    /// When the young ones began.
    since: Instant,
    origin: Instant,
}

impl Affinity {
    /// One that knows nothing.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), since: now, origin: now }
    }

    /// Tokens of the prompt's beginning that each of `groups` groups has been sent, each worth half after [`HALF_LIFE`],
    /// a quarter after two, and so on.
    #[must_use]
    pub fn known(&self, chain: &Chain, groups: usize, now: Instant) -> Vec<usize> {
        let now_ms = self.millis(now);
        let mut worth = vec![0.0_f32; groups];
        // Groups that know all beginnings so far: a later one counts only where all earlier ones are known too.
        let mut there: SmallVec<[u32; SENT_MAX]> = SmallVec::new();
        for (index, link) in chain.0.iter().enumerate() {
            let Some(node) = self.node(*link) else { break };
            match index {
                0 => there.extend(node.iter().map(|sent| sent.group)),
                _ => there.retain(|group| node.iter().any(|sent| sent.group == *group)),
            }
            if there.is_empty() {
                break;
            }
            for Sent { group, at_ms } in node.iter().filter(|sent| there.contains(&sent.group)) {
                if let Some(worth) = worth.get_mut(*group as usize) {
                    *worth += link_tokens(index) as f32 * decay(now_ms.saturating_sub(*at_ms));
                }
            }
        }
        worth.into_iter().map(|tokens| tokens.round() as usize).collect()
    }

    /// Notes that `group` has been sent the prompt.
    pub fn learn(&mut self, chain: &Chain, group: usize, now: Instant) {
        let Ok(group) = u32::try_from(group) else { return };
        if now.saturating_duration_since(self.since) >= GENERATION_AGE
            || self.young.len() + chain.0.len() > GENERATION_LINKS_MAX
        {
            self.old = std::mem::take(&mut self.young);
            self.since = now;
        }
        let sent = Sent { group, at_ms: self.millis(now) };
        for link in &chain.0 {
            let old = || self.old.remove(link).unwrap_or_default();
            let node = self.young.entry(*link).or_insert_with(old);
            if let Some(known) = node.iter_mut().find(|known| known.group == group) {
                *known = sent;
            } else if node.len() < SENT_MAX {
                node.push(sent);
            } else if let Some(oldest) = node.iter_mut().min_by_key(|known| known.at_ms) {
                *oldest = sent;
            }
        }
    }

    /// Forgets what a group knew, which begins anew.
    pub fn forget(&mut self, group: usize) {
        for links in [&mut self.young, &mut self.old] {
            links.retain(|_, node| {
                node.retain(|sent| sent.group as usize != group);
                !node.is_empty()
            });
        }
    }

    fn node(&self, link: u64) -> Option<&Node> {
        self.young.get(&link).or_else(|| self.old.get(&link))
    }

    /// Fits for seven weeks; after that everything is equally new, which only makes the guess worse.
    fn millis(&self, now: Instant) -> u32 {
        u32::try_from(now.saturating_duration_since(self.origin).as_millis()).unwrap_or(u32::MAX)
    }
}

/// What is left of one after this time.
fn decay(age_ms: u32) -> f32 {
    (-(age_ms as f32) / HALF_LIFE.as_millis() as f32).exp2()
}
