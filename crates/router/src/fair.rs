//! Who of those that wait is let in next. Pure: it is told the time.
//!
//! Every API key is a flow. Flows of one priority share what becomes free by start-time fair queuing: the head of a flow
//! starts, in virtual time, where the flow's last request ended, or now if that is past, and the earliest start goes next; a
//! request ends as many tokens later as it may cost. So a key that asks for much and a key that asks for little get equally
//! many tokens for as long as both wait, and a key that comes anew is not made to pay for the time it was away.
//!
//! Among priorities the head that is due first goes first. A request is due when it came, and each level of priority is
//! worth [`AGEING_PER_LEVEL`] of that, as in the groups' engines: waiting makes up for any priority in the end.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use types::Priority;

/// Waiting this long is worth one level of priority; as in a group's engine.
pub const AGEING_PER_LEVEL: Duration = Duration::from_millis(100);
/// Flows of one priority with nobody waiting whose past is remembered.
const FLOWS_PAST_MAX: usize = 1024;

/// Bounds of what waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Places that are waited for; 0 lets nobody wait.
    pub requests: u32,
    /// Tokens that may cost, of all that wait together.
    pub tokens: u64,
    /// Bytes of their prompts.
    pub bytes: usize,
    /// Places that one key waits for; callers without a key are bounded together only.
    pub key_requests: u32,
}

/// One who would wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiter {
    /// The API key's name; empty for callers without one.
    pub key: Arc<str>,
    /// How urgent it is.
    pub priority: Priority,
    /// Places it needs, all at once.
    pub places: u32,
    /// Tokens it may cost: its prompt and all it may generate.
    pub tokens: u64,
    /// Bytes its prompt takes while it waits.
    pub bytes: usize,
}

/// The bound that keeps one from waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Full {
    /// [`Bounds::requests`].
    Requests,
    /// [`Bounds::tokens`].
    Tokens,
    /// [`Bounds::bytes`].
    Bytes,
    /// [`Bounds::key_requests`].
    KeyRequests,
}

/// The place of one in the queue, to leave it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    priority: Priority,
    key: Arc<str>,
    number: u64,
}

/// Those that wait, each with something of the caller's.
#[derive(Debug)]
pub struct Queue<T> {
    classes: BTreeMap<Priority, Class<T>>,
    keys: HashMap<Arc<str>, u32>,
    requests: u32,
    tokens: u64,
    bytes: usize,
    /// When the first time was told; times are counted from there.
    origin: Option<Instant>,
    next_number: u64,
}

/// Those of one priority.
#[derive(Debug)]
struct Class<T> {
    flows: HashMap<Arc<str>, Flow<T>>,
    /// The head of every flow in which somebody waits: start in virtual time, number, key.
    heads: BTreeSet<(u64, u64, Arc<str>)>,
    /// The start of the last one let in.
    virtual_time: u64,
}

/// Those of one key and priority, in the order in which they came.
#[derive(Debug)]
struct Flow<T> {
    waiters: VecDeque<Entry<T>>,
    /// Where the head starts.
    start: u64,
    /// Where the last one that was let in ended.
    finish: u64,
}

#[derive(Debug)]
struct Entry<T> {
    number: u64,
    since: Instant,
    waiter: Waiter,
    own: T,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            classes: BTreeMap::new(),
            keys: HashMap::new(),
            requests: 0,
            tokens: 0,
            bytes: 0,
            origin: None,
            next_number: 0,
        }
    }
}

impl<T> Queue<T> {
    /// Places that are waited for.
    #[must_use]
    pub const fn requests(&self) -> u32 {
        self.requests
    }

    /// Tokens that all who wait may cost.
    #[must_use]
    pub const fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// Lets one wait from `now` on.
    ///
    /// # Errors
    /// The bound that would be passed.
    pub fn push(&mut self, waiter: Waiter, own: T, bounds: &Bounds, now: Instant) -> Result<Ticket, Full> {
        self.check(&waiter, bounds)?;
        self.origin.get_or_insert(now);
        let (priority, key, number) = (waiter.priority, Arc::clone(&waiter.key), self.next_number);
        self.next_number += 1;
        self.count(&waiter);
        let class = self.classes.entry(priority).or_insert_with(Class::new);
        class.push(Entry { number, since: now, waiter, own });
        Ok(Ticket { priority, key, number })
    }

    /// Who goes next, and with what; stays in the queue.
    #[must_use]
    pub fn peek(&self) -> Option<&Waiter> {
        let (_, entry) = self.next()?;
        Some(&entry.waiter)
    }

    /// Takes out who goes next.
    pub fn pop(&mut self) -> Option<(Waiter, T)> {
        let (priority, _) = self.next()?;
        let class = self.classes.get_mut(&priority)?;
        let entry = class.pop()?;
        if class.heads.is_empty() {
            self.classes.remove(&priority);
        }
        self.uncount(&entry.waiter);
        Some((entry.waiter, entry.own))
    }

    /// Takes out one that will not wait any longer; `None` when it is not there any more.
    pub fn remove(&mut self, ticket: &Ticket) -> Option<(Waiter, T)> {
        let class = self.classes.get_mut(&ticket.priority)?;
        let entry = class.remove(ticket)?;
        if class.heads.is_empty() {
            self.classes.remove(&ticket.priority);
        }
        self.uncount(&entry.waiter);
        Some((entry.waiter, entry.own))
    }

    fn check(&self, waiter: &Waiter, bounds: &Bounds) -> Result<(), Full> {
        if self.requests.saturating_add(waiter.places) > bounds.requests {
            return Err(Full::Requests);
        }
        let of_key = self.keys.get(&waiter.key).copied().unwrap_or_default();
        if !waiter.key.is_empty() && of_key.saturating_add(waiter.places) > bounds.key_requests {
            return Err(Full::KeyRequests);
        }
        if self.tokens.saturating_add(waiter.tokens) > bounds.tokens {
            return Err(Full::Tokens);
        }
        if self.bytes.saturating_add(waiter.bytes) > bounds.bytes {
            return Err(Full::Bytes);
        }
        Ok(())
    }

    fn count(&mut self, waiter: &Waiter) {
        *self.keys.entry(Arc::clone(&waiter.key)).or_default() += waiter.places;
        self.requests += waiter.places;
        self.tokens += waiter.tokens;
        self.bytes += waiter.bytes;
    }

    fn uncount(&mut self, waiter: &Waiter) {
        if let Some(of_key) = self.keys.get_mut(&waiter.key) {
            *of_key -= waiter.places;
            if *of_key == 0 {
                self.keys.remove(&waiter.key);
            }
        }
        self.requests -= waiter.places;
        self.tokens -= waiter.tokens;
        self.bytes -= waiter.bytes;
    }

    fn next(&self) -> Option<(Priority, &Entry<T>)> {
        let origin = self.origin?;
        let heads = self.classes.iter().filter_map(|(priority, class)| Some((*priority, class.head()?)));
        heads.min_by_key(|(priority, entry)| (due(entry.since, origin, *priority), entry.number))
    }
}

/// When it came, in microseconds, had it had priority 0.
fn due(since: Instant, origin: Instant, priority: Priority) -> i128 {
    let came = since.saturating_duration_since(origin).as_micros();
    i128::try_from(came).unwrap_or(i128::MAX)
        - i128::from(priority.level()) * AGEING_PER_LEVEL.as_micros() as i128
}

impl<T> Class<T> {
    fn new() -> Self {
        Self { flows: HashMap::new(), heads: BTreeSet::new(), virtual_time: 0 }
    }

    fn head(&self) -> Option<&Entry<T>> {
        let (_, _, key) = self.heads.first()?;
        self.flows.get(key)?.waiters.front()
    }

    fn push(&mut self, entry: Entry<T>) {
        let key = Arc::clone(&entry.waiter.key);
        let none = || Flow { waiters: VecDeque::new(), start: 0, finish: 0 };
        let flow = self.flows.entry(Arc::clone(&key)).or_insert_with(none);
        flow.waiters.push_back(entry);
        if flow.waiters.len() == 1 {
            self.raise(&key);
        }
    }

    fn pop(&mut self) -> Option<Entry<T>> {
        let (start, _, key) = self.heads.pop_first()?;
        self.virtual_time = start;
        let flow = self.flows.get_mut(&key)?;
        let entry = flow.waiters.pop_front()?;
        flow.finish = start.saturating_add(entry.waiter.tokens.max(1));
        self.raise(&key);
        Some(entry)
    }

    fn remove(&mut self, ticket: &Ticket) -> Option<Entry<T>> {
        let flow = self.flows.get_mut(&ticket.key)?;
        // Numbers grow along the flow.
        let at = flow.waiters.binary_search_by_key(&ticket.number, |entry| entry.number).ok()?;
        let entry = flow.waiters.remove(at)?;
        if at == 0 {
            self.heads.remove(&(flow.start, ticket.number, Arc::clone(&ticket.key)));
            self.raise(&ticket.key);
        }
        Some(entry)
    }

    /// Puts the head of a flow that has a new one among the others. Who left without being let in has cost nothing.
    fn raise(&mut self, key: &Arc<str>) {
        let Some(flow) = self.flows.get_mut(key) else { return };
        match flow.waiters.front() {
            Some(head) => {
                flow.start = flow.finish.max(self.virtual_time);
                self.heads.insert((flow.start, head.number, Arc::clone(key)));
            }
            None if flow.finish <= self.virtual_time => {
                self.flows.remove(key);
            }
            None => self.forget(),
        }
    }

    /// Keeps flows that only have a past from growing without bound: callers may be anybody.
    fn forget(&mut self) {
        if self.flows.len() - self.heads.len() <= FLOWS_PAST_MAX {
            return;
        }
        let now = self.virtual_time;
        self.flows.retain(|_, flow| !flow.waiters.is_empty() || flow.finish > now);
        if self.flows.len() - self.heads.len() > FLOWS_PAST_MAX {
            self.flows.retain(|_, flow| !flow.waiters.is_empty());
        }
    }
}
