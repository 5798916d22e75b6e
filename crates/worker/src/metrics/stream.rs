//! A request's stream, measured on its way to the router.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures::{Stream, StreamExt};
use proto::Failure;
use proto::worker::{FinishReason, GenerateChunk};
use tonic::Status;

use super::{CACHED, COMPUTED, Finished, Metrics, Rejected, Source};
use crate::inbox::Asker;

/// What a request asked for, as far as it is counted.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) asker: Asker,
    pub(crate) prompt_tokens: usize,
    pub(crate) max_tokens: u32,
    pub(crate) sequences: u32,
}

impl Metrics {
    /// Counts a refusal.
    pub(crate) fn rejected(&self, failure: &Failure) {
        self.requests.rejected.get_or_create(&Rejected { reason: failure.reason() }).inc();
    }
}

/// A stream of chunks whose tokens and times are counted. Dropped before its end, it counts as aborted.
pub(crate) struct Metered<S> {
    inner: S,
    metrics: Arc<Metrics>,
    asked: Asked,
    arrived: Instant,
    first: Option<Instant>,
    /// When each sequence had its last token.
    last: BTreeMap<u32, Instant>,
    tokens: u64,
    /// Whether the prompt's tokens were counted by where they come from.
    sourced: bool,
    /// Sequences that have ended.
    ended: u32,
    over: bool,
}

impl<S> Metered<S> {
    /// Measures `inner` from now on.
    pub(crate) fn new(inner: S, metrics: Arc<Metrics>, asked: Asked) -> Self {
        let requests = &metrics.requests;
        requests.prompt_tokens.inc_by(asked.prompt_tokens as u64);
        requests.prompt_length.observe(asked.prompt_tokens as f64);
        requests.max_tokens.observe(asked.max_tokens.into());
        requests.sequences.observe(asked.sequences.into());
        Self {
            inner,
            metrics,
            asked,
            arrived: Instant::now(),
            first: None,
            last: BTreeMap::new(),
            tokens: 0,
            sourced: false,
            ended: 0,
            over: false,
        }
    }

    fn saw(&mut self, item: &Result<GenerateChunk, Status>) {
        match item {
            Ok(chunk) => {
                self.saw_cached(chunk.cached_tokens);
                self.saw_tokens(chunk.index, chunk.token_ids.len());
                if let Some(finish) = &chunk.finish {
                    self.ended += 1;
                    if self.ended >= self.asked.sequences {
                        self.end(match finish.reason() {
                            FinishReason::Length => "length",
                            _ => "stop",
                        });
                    }
                }
            }
            Err(status) => self.failed(status),
        }
    }

    /// The first chunk of a request's first sequence says what was found of its prompt.
    fn saw_cached(&mut self, cached: Option<u32>) {
        let requests = &self.metrics.requests;
        requests.cached_tokens.inc_by(cached.unwrap_or(0).into());
        if let Some(cached) = cached.filter(|_| !std::mem::replace(&mut self.sourced, true)) {
            let cached = u64::from(cached);
            let computed = (self.asked.prompt_tokens as u64).saturating_sub(cached);
            for (source, tokens) in [(COMPUTED, computed), (CACHED, cached)] {
                requests.by_source.get_or_create(&Source { source }).inc_by(tokens);
            }
        }
    }

    fn saw_tokens(&mut self, sequence: u32, tokens: usize) {
        if tokens == 0 {
            return;
        }
        let now = Instant::now();
        let requests = &self.metrics.requests;
        requests.generation_tokens.inc_by(tokens as u64);
        self.tokens += tokens as u64;
        if self.first.is_none() {
            self.first = Some(now);
            requests.first_token.observe((now - self.arrived).as_secs_f64());
        }
        if let Some(last) = self.last.insert(sequence, now) {
            requests.between_tokens.observe((now - last).as_secs_f64());
        }
    }

    fn failed(&mut self, status: &Status) {
        let failure = Failure::from_status(status);
        let kind = failure.as_ref().map_or("INTERNAL", Failure::reason);
        self.asked.asker.span.fail(kind, status.message());
        if self.tokens == 0
            && let Some(failure) = &failure
        {
            self.metrics.rejected(failure);
        }
        let gone = matches!(failure, Some(Failure::Cancelled | Failure::DeadlineExceeded));
        self.end(if gone { "abort" } else { "error" });
    }

    fn end(&mut self, finished_reason: &'static str) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        let Asker { request, span, .. } = &self.asked.asker;
        tracing::debug!(request = &**request, finished_reason, tokens = self.tokens, "ended");
        for (key, tokens) in [
            ("gen_ai.usage.input_tokens", self.asked.prompt_tokens as i64),
            ("gen_ai.usage.prompt_tokens", self.asked.prompt_tokens as i64),
            ("gen_ai.usage.output_tokens", self.tokens as i64),
            ("gen_ai.usage.completion_tokens", self.tokens as i64),
        ] {
            span.set(key, tokens);
        }
        span.set("gen_ai.request.id", request.to_string());
        span.set("gen_ai.latency.e2e", self.arrived.elapsed().as_secs_f64());
        span.set_all("gen_ai.response.finish_reasons", [finished_reason]);
        let requests = &self.metrics.requests;
        requests.finished.get_or_create(&Finished { finished_reason }).inc();
        requests.whole.observe(self.arrived.elapsed().as_secs_f64());
        requests.generation_length.observe(self.tokens as f64);
        if let Some(first) = self.first {
            let decode = first.elapsed().as_secs_f64();
            requests.decode.observe(decode);
            // The sequences of a request are generated side by side.
            let steps = self.tokens / u64::from(self.asked.sequences.max(1));
            if steps > 1 {
                requests.time_per_token.observe(decode / (steps - 1) as f64);
            }
        }
    }
}

impl<S: Stream<Item = Result<GenerateChunk, Status>> + Unpin> Stream for Metered<S> {
    type Item = Result<GenerateChunk, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = self.inner.poll_next_unpin(context);
        if let Poll::Ready(Some(item)) = &item {
            self.saw(item);
        }
        item
    }
}

impl<S> Drop for Metered<S> {
    fn drop(&mut self) {
        self.end("abort");
    }
}
