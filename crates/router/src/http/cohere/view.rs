//! Answers in Cohere's form: at once, or as events.

use std::sync::Arc;

use proto::v1::finish::Matched;
use proto::{Failure, v1};
use serde_json::{Value, json};
use types::TokenId;

use super::request::{Citations, Show, Thoughts};
use crate::text::Tokenizer;

/// How the answer to one request is written.
#[derive(Debug)]
pub(super) struct View {
    id: String,
    show: Show,
    tokenizer: Option<Arc<Tokenizer>>,
}

/// What is remembered of a stream.
#[derive(Debug, Default)]
pub(super) struct Progress {
    begun: bool,
    /// The part that is open.
    open: Option<Open>,
    /// Parts of content so far.
    blocks: u32,
    /// The part of content that a kind of text is in.
    text_block: Option<u32>,
    thinking_block: Option<u32>,
    calls: bool,
    citations: u32,
    /// Log-probabilities of tokens that showed nothing yet.
    logprobs: Vec<v1::TokenLogprob>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    Thinking(u32),
    Text(u32),
    Call(u32),
}

impl View {
    pub(super) fn new(id: String, show: Show, tokenizer: Option<Arc<Tokenizer>>) -> Self {
        Self { id, show, tokenizer }
    }

    /// The answer at once.
    pub(super) fn whole(&self, answer: v1::GenerateOnceResponse) -> Value {
        let mut content = Vec::new();
        let mut message = json!({ "role": "assistant" });
        let mut thinking_block = None;
        if !answer.reasoning.is_empty() {
            match self.show.thoughts {
                Thoughts::Content => {
                    thinking_block = Some(0);
                    content.push(json!({ "type": "thinking", "thinking": answer.reasoning }));
                }
                Thoughts::Plan => message["tool_plan"] = json!(answer.reasoning),
            }
        }
        let text_block = u32::try_from(content.len()).ok();
        if !answer.text.is_empty() || answer.tool_calls.is_empty() {
            content.push(json!({ "type": "text", "text": answer.text }));
        }
        if !content.is_empty() {
            message["content"] = Value::Array(content);
        }
        if !answer.tool_calls.is_empty() {
            let call = |call: &v1::ToolCall| tool_call(&call.id, &call.name, &call.arguments);
            message["tool_calls"] = answer.tool_calls.iter().map(call).collect();
        }
        let shown = answer.citations.iter().filter(|_| self.show.citations == Citations::Shown);
        let citations: Vec<Value> =
            shown.map(|cited| self.citation(cited, text_block, thinking_block)).collect();
        if !citations.is_empty() {
            message["citations"] = Value::Array(citations);
        }
        let finish = answer.finish.unwrap_or_default();
        let mut body = json!({
            "id": self.id,
            "finish_reason": finish_reason(&finish, !answer.tool_calls.is_empty()),
            "message": message,
            "usage": usage(answer.usage.unwrap_or_default()),
        });
        if self.show.logprobs {
            let item = |position: &v1::TokenLogprob| self.logprobs(std::slice::from_ref(position));
            body["logprobs"] = answer.logprobs.iter().map(item).collect();
        }
        body
    }

    /// The events of one message.
    pub(super) fn events(&self, message: v1::GenerateResponse, progress: &mut Progress) -> Vec<Value> {
        let mut events = Vec::new();
        self.begin(progress, &mut events);
        if self.show.logprobs {
            progress.logprobs.extend(message.logprobs);
        }
        match self.show.thoughts {
            Thoughts::Plan if !message.reasoning.is_empty() => {
                close(progress, &mut events);
                let delta = json!({ "message": { "tool_plan": message.reasoning } });
                events.push(json!({ "type": "tool-plan-delta", "delta": delta }));
            }
            Thoughts::Content if !message.reasoning.is_empty() => {
                self.content(Part::Thinking, &message.reasoning, progress, &mut events);
            }
            Thoughts::Plan | Thoughts::Content => {}
        }
        if !message.text.is_empty() {
            self.content(Part::Text, &message.text, progress, &mut events);
        }
        if self.show.citations == Citations::Shown {
            for cited in &message.citations {
                let index = progress.citations;
                progress.citations += 1;
                let citation = self.citation(cited, progress.text_block, progress.thinking_block);
                let delta = json!({ "message": { "citations": citation } });
                events.push(json!({ "type": "citation-start", "index": index, "delta": delta }));
                events.push(json!({ "type": "citation-end", "index": index }));
            }
        }
        for piece in &message.tool_calls {
            call_piece(piece, progress, &mut events);
        }
        if let Some(finish) = message.finish {
            // An answer of nothing has an empty text, as it has when it is given at once.
            if progress.blocks == 0 && !progress.calls {
                self.content(Part::Text, "", progress, &mut events);
            }
            close(progress, &mut events);
            let delta = json!({
                "finish_reason": finish_reason(&finish, progress.calls),
                "usage": usage(message.usage.unwrap_or_default()),
            });
            events.push(json!({ "type": "message-end", "id": self.id, "delta": delta }));
        }
        events
    }

    /// The events of a failure after the stream has begun.
    pub(super) fn failed(&self, failure: &Failure, progress: &mut Progress) -> Vec<Value> {
        let mut events = Vec::new();
        self.begin(progress, &mut events);
        close(progress, &mut events);
        let reason = match failure {
            Failure::DeadlineExceeded => "TIMEOUT",
            _ => "ERROR",
        };
        let delta = json!({ "finish_reason": reason, "error": failure.to_string() });
        events.push(json!({ "type": "message-end", "id": self.id, "delta": delta }));
        events
    }

    fn begin(&self, progress: &mut Progress, events: &mut Vec<Value>) {
        if !std::mem::replace(&mut progress.begun, true) {
            let message = json!({
                "role": "assistant", "content": [], "tool_plan": "", "tool_calls": [], "citations": [],
            });
            events.push(json!({ "type": "message-start", "id": self.id, "delta": { "message": message } }));
        }
    }

    fn content(&self, part: Part, text: &str, progress: &mut Progress, events: &mut Vec<Value>) {
        let name = part.name();
        let index = match (part, progress.open) {
            (Part::Text, Some(Open::Text(index))) | (Part::Thinking, Some(Open::Thinking(index))) => index,
            _ => {
                close(progress, events);
                let index = progress.blocks;
                progress.blocks += 1;
                let block = match part {
                    Part::Text => &mut progress.text_block,
                    Part::Thinking => &mut progress.thinking_block,
                };
                block.get_or_insert(index);
                progress.open = Some(part.open(index));
                let content = json!({ "type": name, name: "" });
                let delta = json!({ "message": { "content": content } });
                events.push(json!({ "type": "content-start", "index": index, "delta": delta }));
                index
            }
        };
        if text.is_empty() {
            return;
        }
        let delta = json!({ "message": { "content": { name: text } } });
        let mut event = json!({ "type": "content-delta", "index": index, "delta": delta });
        if self.show.logprobs {
            event["logprobs"] = self.logprobs(&std::mem::take(&mut progress.logprobs));
        }
        events.push(event);
    }

    fn citation(&self, cited: &v1::Citation, text_block: Option<u32>, thinking_block: Option<u32>) -> Value {
        let numbers = cited
            .sources
            .iter()
            .flat_map(|source| source.results.iter().map(move |&at| (source.tool_call, at)));
        let sources: Vec<Value> =
            numbers.filter_map(|(call, at)| self.show.citable.source(call, at)).collect();
        let (kind, block) = match (cited.reasoning, self.show.thoughts) {
            (false, _) => ("TEXT_CONTENT", text_block),
            (true, Thoughts::Content) => ("THINKING_CONTENT", thinking_block),
            (true, Thoughts::Plan) => ("PLAN", None),
        };
        let mut citation = json!({
            "start": cited.start, "end": cited.end, "text": cited.text, "sources": sources, "type": kind,
        });
        if let Some(block) = block {
            citation["content_index"] = json!(block);
        }
        citation
    }

    fn logprobs(&self, positions: &[v1::TokenLogprob]) -> Value {
        let bytes: Vec<u8> = match &self.tokenizer {
            None => Vec::new(),
            Some(tokenizer) => {
                let tokens = positions.iter().flat_map(|p| tokenizer.token_bytes(TokenId(p.token_id)));
                tokens.copied().collect()
            }
        };
        let ids: Vec<u32> = positions.iter().map(|position| position.token_id).collect();
        let values: Vec<f32> = positions.iter().map(|position| position.logprob).collect();
        json!({ "text": String::from_utf8_lossy(&bytes), "token_ids": ids, "logprobs": values })
    }
}

/// A part of content.
#[derive(Debug, Clone, Copy)]
enum Part {
    Text,
    Thinking,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Thinking => "thinking",
        }
    }

    const fn open(self, index: u32) -> Open {
        match self {
            Self::Text => Open::Text(index),
            Self::Thinking => Open::Thinking(index),
        }
    }
}

fn close(progress: &mut Progress, events: &mut Vec<Value>) {
    match progress.open.take() {
        None => {}
        Some(Open::Text(index) | Open::Thinking(index)) => {
            events.push(json!({ "type": "content-end", "index": index }));
        }
        Some(Open::Call(index)) => events.push(json!({ "type": "tool-call-end", "index": index })),
    }
}

fn call_piece(piece: &v1::ToolCallDelta, progress: &mut Progress, events: &mut Vec<Value>) {
    let index = piece.index;
    if !piece.name.is_empty() {
        close(progress, events);
        progress.calls = true;
        progress.open = Some(Open::Call(index));
        let call = tool_call(&piece.id, &piece.name, "");
        let delta = json!({ "message": { "tool_calls": call } });
        events.push(json!({ "type": "tool-call-start", "index": index, "delta": delta }));
    }
    if !piece.arguments.is_empty() {
        let delta = json!({ "message": { "tool_calls": { "function": { "arguments": piece.arguments } } } });
        events.push(json!({ "type": "tool-call-delta", "index": index, "delta": delta }));
    }
}

fn tool_call(id: &str, name: &str, arguments: &str) -> Value {
    json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } })
}

fn finish_reason(finish: &v1::Finish, calls: bool) -> &'static str {
    match (finish.reason(), &finish.matched) {
        (v1::FinishReason::Length, _) => "MAX_TOKENS",
        (_, Some(Matched::Stop(_))) => "STOP_SEQUENCE",
        (v1::FinishReason::Stop | v1::FinishReason::Unspecified, _) if calls => "TOOL_CALL",
        (v1::FinishReason::Stop | v1::FinishReason::Unspecified, _) => "COMPLETE",
    }
}

fn usage(usage: v1::Usage) -> Value {
    let tokens = json!({ "input_tokens": usage.prompt_tokens, "output_tokens": usage.output_tokens });
    json!({ "billed_units": tokens, "tokens": tokens })
}
