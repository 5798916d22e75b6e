//! The spans of one request at a router. Of a request that is not traced nothing is found out here.

use std::time::Instant;

use proto::{Failure, v1, worker};
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use trace::{Kind, Parent, Sampling, Span, TRACEPARENT, TRACESTATE};
use types::limits::SESSION_ID_BYTES_MAX;

use crate::call::Call;

/// Most bytes of a prompt or an answer that are written into a span.
const CONTENT_BYTES_MAX: usize = 64 << 10;

/// Which requests are traced, and what is written of them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Tracing {
    /// Which.
    pub sampling: Sampling,
    /// Whether prompts and answers are.
    pub record_content: bool,
}

/// What a request's way down leaves its mark on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trail {
    root: Span,
    /// What the caller said, for the groups when nothing is traced here.
    caller: Option<Parent>,
    /// Whether the answer is sent as it comes.
    streams: bool,
}

impl Trail {
    /// Reads who calls.
    pub(crate) fn of(headers: &MetadataMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let caller = Parent::read(text(TRACEPARENT), text(TRACESTATE));
        Self { root: Span::none(), caller, streams: false }
    }

    /// Notes whether the answer is sent as it comes, or at once when it is whole.
    pub(crate) fn streams(&mut self, streams: bool) {
        self.streams = streams;
    }

    /// One try of `request` at a group, which lasts as long as its stream.
    pub(crate) fn attempt(&self, group: &str, request: &worker::GenerateRequest) -> Span {
        let span = self.root.child("attempt", Kind::Client);
        if span.is_on() {
            span.set("server.address", group.to_owned());
            span.set("gen_ai.request.id", request.request_id.clone());
            span.set("cohort.resumed_tokens", request.resume_tokens.len() as i64);
        }
        span
    }

    /// The search for a group that goes on with a request.
    pub(crate) fn migration(&self, request: &worker::GenerateRequest, why: &Failure) -> Span {
        let span = self.root.child("migration", Kind::Internal);
        if span.is_on() {
            span.set("cohort.sequence", i64::from(request.first_stream));
            span.set("cohort.resumed_tokens", request.resume_tokens.len() as i64);
            span.set("cohort.migration.reason", why.to_string());
        }
        span
    }

    /// Tells a group which trace a call belongs to.
    pub(crate) fn tell(&self, attempt: &Span, headers: &mut MetadataMap) {
        let Some(parent) = attempt.parent().or_else(|| self.caller.clone()) else { return };
        let mut insert = |name, text: String| {
            if let Ok(value) = AsciiMetadataValue::try_from(text) {
                headers.insert(name, value);
            }
        };
        insert(TRACEPARENT, parent.traceparent());
        if let Some(state) = parent.tracestate() {
            insert(TRACESTATE, state);
        }
    }
}

/// A request that is counted, seen as a span with its stages.
#[derive(Debug, Default)]
pub(crate) struct Traced {
    root: Span,
    /// The stage it is in.
    stage: Span,
    answers: Option<Box<Answers>>,
}

/// What came up of a traced request.
#[derive(Debug)]
struct Answers {
    arrived: Instant,
    first: Option<Instant>,
    usage: v1::Usage,
    /// Why each answer ended.
    finished: Vec<&'static str>,
    /// The answers' text so far, where it is recorded.
    content: Option<String>,
}

impl Traced {
    /// Decides whether a request is traced, and begins its span and that of the first stage.
    pub(crate) fn begin(
        call: &mut Call,
        request: &v1::GenerateRequest,
        tracing: Tracing,
        served: impl FnOnce() -> Option<String>,
    ) -> Self {
        if !tracing.sampling.takes(call.trail.caller.as_ref()) {
            return Self::default();
        }
        let operation = match request.prompt {
            Some(v1::generate_request::Prompt::Chat(_)) => "chat",
            Some(_) | None => "text_completion",
        };
        let served = served().unwrap_or_default();
        let asked = if request.model.is_empty() { &served } else { &request.model };
        let name = format!("{operation} {asked}");
        let root = Span::begin(name.trim_end(), Kind::Server, call.trail.caller.as_ref());
        if !root.is_on() {
            return Self::default();
        }
        root.set("gen_ai.operation.name", operation);
        root.set("gen_ai.provider.name", "cohere");
        root.set("gen_ai.request.model", asked.clone());
        root.set("gen_ai.response.model", served);
        root.set("gen_ai.response.id", call.request_id.clone());
        root.set("gen_ai.request.id", call.request_id.clone());
        root.set("gen_ai.request.stream", call.trail.streams);
        describe(&root, request);
        if tracing.record_content {
            root.set_some("gen_ai.input.messages", content(request));
        }
        call.trail.root = root.clone();
        let stage = root.child("admission", Kind::Internal);
        let content = tracing.record_content.then(String::new);
        let (first, finished) = (None, Vec::new());
        let answers =
            Answers { arrived: Instant::now(), first, usage: v1::Usage::default(), finished, content };
        Self { root, stage, answers: Some(Box::new(answers)) }
    }

    /// All places are taken: it waits for its turn.
    pub(crate) fn waits(&mut self) {
        if self.root.is_on() {
            // One ends before the next begins.
            self.stage = Span::none();
            self.stage = self.root.child("queue", Kind::Internal);
        }
    }

    /// A stage ends, and the next begins.
    pub(crate) fn passed(&mut self, stage: &'static str) {
        if !self.root.is_on() {
            return;
        }
        // One ends before the next begins.
        self.stage = Span::none();
        self.stage = match stage {
            "admit" | "wait" => self.root.child("tokenize", Kind::Internal),
            "tokenize" => self.root.child("placement", Kind::Internal),
            // What comes now are attempts.
            _ => Span::none(),
        };
    }

    /// Where the request was placed.
    pub(crate) fn placed(&self, group: &str, prompt_tokens: usize) {
        if self.stage.is_on() {
            self.stage.set("server.address", group.to_owned());
            self.stage.set("gen_ai.usage.input_tokens", prompt_tokens as i64);
        }
    }

    /// A message goes up.
    pub(crate) fn message(&mut self, message: &v1::GenerateResponse) {
        let Some(answers) = &mut self.answers else { return };
        answers.first.get_or_insert_with(Instant::now);
        if let Some(content) = &mut answers.content {
            for part in [&message.reasoning, &message.text] {
                content.push_str(fitting(part, CONTENT_BYTES_MAX.saturating_sub(content.len())));
            }
        }
        if let Some(usage) = &message.usage {
            let all = &mut answers.usage;
            all.prompt_tokens = all.prompt_tokens.max(usage.prompt_tokens);
            all.cached_tokens = all.cached_tokens.max(usage.cached_tokens);
            all.output_tokens = all.output_tokens.saturating_add(usage.output_tokens);
            all.reasoning_tokens = all.reasoning_tokens.saturating_add(usage.reasoning_tokens);
        }
        if let Some(finish) = &message.finish {
            answers.finished.push(match finish.reason() {
                v1::FinishReason::Length => "length",
                v1::FinishReason::Stop | v1::FinishReason::Unspecified => "stop",
            });
        }
    }

    /// The request is over: `OK`, or how it failed.
    pub(crate) fn ended(&mut self, outcome: &'static str, failure: Option<&Failure>) {
        let Some(answers) = self.answers.take() else { return };
        let Answers { arrived, first, usage, finished, content } = *answers;
        let root = &self.root;
        let since = |at: Instant| at.duration_since(arrived).as_secs_f64();
        for key in ["gen_ai.response.time_to_first_chunk", "gen_ai.latency.time_to_first_token"] {
            root.set_some(key, first.map(since));
        }
        root.set("gen_ai.latency.e2e", since(Instant::now()));
        if first.is_some() {
            for (key, tokens) in [
                ("gen_ai.usage.input_tokens", usage.prompt_tokens),
                ("gen_ai.usage.prompt_tokens", usage.prompt_tokens),
                ("gen_ai.usage.output_tokens", usage.output_tokens),
                ("gen_ai.usage.completion_tokens", usage.output_tokens),
                ("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens),
                ("gen_ai.usage.reasoning.output_tokens", usage.reasoning_tokens),
            ] {
                root.set(key, i64::from(tokens));
            }
            root.set_all("gen_ai.response.finish_reasons", finished);
        }
        let answer = content.filter(|text| !text.is_empty());
        root.set_some("gen_ai.output.messages", answer.map(|text| message("assistant", &text)));
        if let Some(failure) = failure {
            let of_stage = &self.stage;
            of_stage.fail(outcome, failure.to_string());
            root.fail(outcome, failure.to_string());
        } else if first.is_none() || outcome != crate::metrics::OK {
            root.fail(outcome, "the caller left");
        }
        self.stage = Span::none();
        self.root = Span::none();
    }
}

/// What a request asks for.
fn describe(root: &Span, request: &v1::GenerateRequest) {
    let number = |value: Option<u32>| value.map(i64::from);
    let conversation = Some(&request.session_id).filter(|id| !id.is_empty());
    root.set_some(
        "gen_ai.conversation.id",
        conversation.map(|id| fitting(id, SESSION_ID_BYTES_MAX).to_owned()),
    );
    if let Some(sampling) = &request.sampling {
        root.set_some("gen_ai.request.temperature", sampling.temperature.map(f64::from));
        root.set_some("gen_ai.request.top_p", sampling.top_p.map(f64::from));
        root.set_some("gen_ai.request.top_k", number(sampling.top_k));
        root.set_some("gen_ai.request.seed", sampling.seed.map(|seed| seed as i64));
        root.set_some("gen_ai.request.frequency_penalty", sampling.frequency_penalty.map(f64::from));
        root.set_some("gen_ai.request.presence_penalty", sampling.presence_penalty.map(f64::from));
        for key in ["gen_ai.request.choice.count", "gen_ai.request.n"] {
            root.set_some(key, number(sampling.n));
        }
    }
    if let Some(stopping) = &request.stopping {
        root.set_some("gen_ai.request.max_tokens", number(stopping.max_tokens));
        if !stopping.stop.is_empty() {
            root.set_all("gen_ai.request.stop_sequences", stopping.stop.iter().map(String::as_str));
        }
    }
}

/// What is asked, in the form of the convention; token ids are no text.
fn content(request: &v1::GenerateRequest) -> Option<String> {
    match request.prompt.as_ref()? {
        v1::generate_request::Prompt::Text(text) => Some(message("user", text)),
        v1::generate_request::Prompt::Chat(chat) => {
            let mut left = CONTENT_BYTES_MAX;
            let mut messages = Vec::new();
            for one in &chat.messages {
                let text = fitting(&one.content, left);
                left -= text.len();
                messages.push(part(&one.role, text));
            }
            Some(serde_json::Value::Array(messages).to_string())
        }
        v1::generate_request::Prompt::TokenIds(_) => None,
    }
}

fn message(role: &str, text: &str) -> String {
    serde_json::Value::Array(vec![part(role, fitting(text, CONTENT_BYTES_MAX))]).to_string()
}

fn part(role: &str, text: &str) -> serde_json::Value {
    serde_json::json!({ "role": role, "parts": [{ "type": "text", "content": text }] })
}

/// The beginning of `text` that has at most so many bytes.
fn fitting(text: &str, bytes_max: usize) -> &str {
    let mut end = bytes_max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
