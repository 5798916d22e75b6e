//! The requests that run here, by their ids, so that a caller can end one it has lost hold of.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::{Failure, RETRY_AFTER};
use tokio_util::sync::CancellationToken;

/// Requests by id. An id is the caller's to choose, so several may share one: ending it ends all of them.
#[derive(Debug)]
pub(crate) struct Running {
    by_id: Mutex<HashMap<String, Vec<Arc<CancellationToken>>>>,
    /// Ends all of them: the router is shutting down.
    closing: CancellationToken,
}

/// A request's line in the list, which is struck when this is dropped.
#[derive(Debug)]
pub(crate) struct Entry {
    running: Arc<Running>,
    id: String,
    abort: Arc<CancellationToken>,
}

impl Running {
    /// An empty list, whose requests end with `closing`.
    pub(crate) fn new(closing: CancellationToken) -> Self {
        Self { by_id: Mutex::default(), closing }
    }

    /// Lists a request.
    pub(crate) fn enter(self: &Arc<Self>, id: &str) -> Entry {
        let abort = Arc::new(self.closing.child_token());
        self.by_id().entry(id.to_owned()).or_default().push(Arc::clone(&abort));
        Entry { running: Arc::clone(self), id: id.to_owned(), abort }
    }

    /// Ends every request with this id; returns how many there were.
    pub(crate) fn abort(&self, id: &str) -> usize {
        let tokens = self.by_id().get(id).cloned().unwrap_or_default();
        for token in &tokens {
            token.cancel();
        }
        tokens.len()
    }

    fn by_id(&self) -> MutexGuard<'_, HashMap<String, Vec<Arc<CancellationToken>>>> {
        // Every change is complete before its lock is given back.
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// Returns why the request is to end, once it is.
    pub(crate) async fn aborted(&self) -> Failure {
        self.abort.cancelled().await;
        match self.running.closing.is_cancelled() {
            true => Failure::Unavailable {
                why: "the router is shutting down".to_owned(),
                retry_after: RETRY_AFTER,
            },
            false => Failure::Cancelled,
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut by_id = self.running.by_id();
        if let Some(tokens) = by_id.get_mut(&self.id) {
            tokens.retain(|token| !Arc::ptr_eq(token, &self.abort));
            if tokens.is_empty() {
                by_id.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_id_ends_all_that_share_it_and_is_forgotten_with_them() {
        let running = Arc::new(Running::new(CancellationToken::new()));
        let (first, second, other) = (running.enter("a"), running.enter("a"), running.enter("b"));
        assert_eq!((running.abort("a"), running.abort("nobody")), (2, 0));
        assert_eq!(first.aborted().await, Failure::Cancelled);
        assert_eq!(second.aborted().await, Failure::Cancelled);
        assert!(!other.abort.is_cancelled());
        drop((first, second));
        assert_eq!(running.abort("a"), 0);
        drop(other);
        assert!(running.by_id().is_empty());
    }
}
