//! The guides of all open sequences, and the threads that work ahead for them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;

use grammar::Error;
use types::{SeqId, TokenId};

use super::{Choice, Guide};

/// Guides that may wait for a thread; the sampler does the work of those that find no room.
const WAITING_MAX: usize = 1024;
/// Threads are few: a mask takes far less time than a step of a real model, and the model has better use for cores.
const THREADS_MAX: usize = 4;

/// A guide, and what the request is called that it belongs to.
type Asked = (Arc<Guide>, Arc<str>);

/// Guides by their sequence.
#[derive(Debug)]
pub(crate) struct Guides {
    open: RwLock<HashMap<SeqId, Asked>>,
    work: SyncSender<Arc<Guide>>,
    ready: AtomicU64,
    late: AtomicU64,
}

impl Guides {
    /// No guides, and threads that wait for some. They end when this is dropped.
    ///
    /// # Errors
    /// The system's, when it has no threads left.
    pub(crate) fn start() -> std::io::Result<Self> {
        let (work, todo) = sync_channel(WAITING_MAX);
        let todo = Arc::new(Mutex::new(todo));
        let cores = thread::available_parallelism().map_or(1, usize::from);
        for number in 0..(cores / 2).clamp(1, THREADS_MAX) {
            let todo = Arc::clone(&todo);
            thread::Builder::new().name(format!("masks-{number}")).spawn(move || prepare_all(&todo))?;
        }
        Ok(Self { open: RwLock::default(), work, ready: AtomicU64::new(0), late: AtomicU64::new(0) })
    }

    /// Takes the guide of a sequence that is about to be submitted, and works ahead for its first token.
    pub(crate) fn open(&self, seq: SeqId, guide: Guide, request: Arc<str>) {
        let guide = Arc::new(guide);
        let _ = self.work.try_send(Arc::clone(&guide));
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(seq, (guide, request));
    }

    /// Forgets the guide of a sequence that has ended.
    pub(crate) fn close(&self, seq: SeqId) {
        if self.get(seq).is_some() {
            self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&seq);
        }
    }

    /// Whether they say what `seq` may draw.
    pub(crate) fn guide(&self, seq: SeqId) -> bool {
        self.get(seq).is_some()
    }

    fn get(&self, seq: SeqId) -> Option<Arc<Guide>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(&seq).map(|(guide, _)| Arc::clone(guide))
    }

    /// What the request of `seq` is called, if it is guided.
    pub(crate) fn request(&self, seq: SeqId) -> Option<Arc<str>> {
        self.open
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&seq)
            .map(|(_, request)| Arc::clone(request))
    }

    /// What `seq` may draw behind `position` tokens of output.
    ///
    /// # Errors
    /// When its grammar cannot be followed there.
    pub(crate) fn choice(&self, seq: SeqId, position: u32) -> Result<Choice, Error> {
        let Some(guide) = self.get(seq) else { return Ok(Choice::Any) };
        let asked = guide.choice(position)?;
        let count = if asked.was_ready { &self.ready } else { &self.late };
        count.fetch_add(1, Ordering::Relaxed);
        Ok(asked.choice)
    }

    /// Takes note of what `seq` drew, and works ahead for what follows.
    pub(crate) fn drew(&self, seq: SeqId, position: u32, token: TokenId) {
        let Some(guide) = self.get(seq) else { return };
        guide.drew(position, token);
        let _ = self.work.try_send(guide);
    }

    /// How many masks were ready when the sampler asked for them, and how many it computed itself or waited for.
    pub(crate) fn counts(&self) -> [u64; 2] {
        [&self.ready, &self.late].map(|count| count.load(Ordering::Relaxed))
    }
}

fn prepare_all(todo: &Mutex<Receiver<Arc<Guide>>>) {
    loop {
        let next = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match next {
            Ok(guide) => guide.prepare(),
            Err(_) => return,
        }
    }
}
