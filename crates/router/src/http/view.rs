//! Answers in the two forms of OpenAI's API.

use std::sync::Arc;

use proto::v1;
use proto::v1::finish::Matched;
use serde_json::{Map, Value, json};
use types::TokenId;

use super::generation::Shown;
use crate::text::Tokenizer;

/// Which API is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    Chat,
    Completion,
}

/// How the answers to one request are written.
#[derive(Debug)]
pub(super) struct View {
    pub(super) api: Api,
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
    pub(super) eos_token_ids: Vec<u32>,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    pub(super) shown: Shown,
    pub(super) logprobs: bool,
}

/// What is remembered of one choice of a stream.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Progress {
    begun: bool,
    calls: bool,
    /// Bytes of the text before the next token.
    offset: usize,
}

impl View {
    fn envelope(&self, stream: bool, choices: Value) -> Map<String, Value> {
        let object = match (self.api, stream) {
            (Api::Chat, false) => "chat.completion",
            (Api::Chat, true) => "chat.completion.chunk",
            (Api::Completion, _) => "text_completion",
        };
        Map::from_iter([
            ("id".to_owned(), json!(self.id)),
            ("object".to_owned(), json!(object)),
            ("created".to_owned(), json!(self.created)),
            ("model".to_owned(), json!(self.model)),
            ("system_fingerprint".to_owned(), json!(self.fingerprint)),
            ("choices".to_owned(), choices),
        ])
    }

    /// All answers at once; `prompts` tells which of them are the first to their prompt.
    pub(super) fn whole(&self, answers: Vec<v1::GenerateOnceResponse>, per_prompt: usize) -> Value {
        let mut usage = Usage::default();
        let mut prompts = Vec::new();
        let mut shown = Vec::with_capacity(answers.len());
        for (index, mut answer) in answers.into_iter().enumerate() {
            let first = index % per_prompt == 0;
            usage.add(answer.usage.unwrap_or_default(), first);
            if first {
                prompts.push(answer.prompt.take().unwrap_or_default());
                shown.push(Vec::with_capacity(per_prompt));
            }
            if let Some(own) = shown.last_mut() {
                own.push(answer);
            }
        }
        if let Some(best) = self.shown.best {
            for own in &mut shown {
                own.sort_by(|a, b| likelihood(b).total_cmp(&likelihood(a)));
                own.truncate(best);
            }
        }
        let choices = shown.into_iter().flatten().enumerate();
        let choices: Vec<Value> = choices.map(|(index, answer)| self.choice(index, answer)).collect();
        let mut body = self.envelope(false, Value::Array(choices));
        body.insert("usage".to_owned(), usage.to_json());
        let one = |mut list: Vec<Value>| if list.len() == 1 { list.remove(0) } else { Value::Array(list) };
        if self.shown.return_token_ids {
            let ids = prompts.iter().map(|prompt| json!(prompt.token_ids)).collect();
            body.insert("prompt_token_ids".to_owned(), one(ids));
        }
        if prompts.iter().any(|prompt| !prompt.logprobs.is_empty()) {
            let logprobs = prompts.iter().map(|prompt| self.prompt_logprobs(prompt)).collect();
            body.insert("prompt_logprobs".to_owned(), one(logprobs));
        }
        Value::Object(body)
    }

    fn choice(&self, index: usize, answer: v1::GenerateOnceResponse) -> Value {
        let finish = answer.finish.clone().unwrap_or_default();
        let text = self.with_stop(answer.text, &finish);
        let mut choice = match self.api {
            Api::Completion => {
                json!({ "text": text, "logprobs": self.legacy_logprobs(&answer.logprobs, &mut 0) })
            }
            Api::Chat => {
                let calls: Vec<Value> = answer.tool_calls.iter().map(call).collect();
                let content = if text.is_empty() && !calls.is_empty() { Value::Null } else { json!(text) };
                let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
                if !answer.reasoning.is_empty() {
                    message["reasoning"] = json!(answer.reasoning);
                }
                if !calls.is_empty() {
                    message["tool_calls"] = Value::Array(calls);
                }
                if !answer.citations.is_empty() {
                    message["citations"] = answer.citations.iter().map(citation).collect();
                }
                json!({ "message": message, "logprobs": self.chat_logprobs(&answer.logprobs) })
            }
        };
        choice["index"] = json!(index);
        choice["finish_reason"] = json!(finish_reason(&finish, !answer.tool_calls.is_empty()));
        choice["stop_reason"] = self.stop_reason(&finish);
        if self.shown.return_token_ids {
            choice["token_ids"] = json!(answer.token_ids);
        }
        choice
    }

    /// The chunks for one message of choice `index`.
    pub(super) fn chunks(
        &self,
        index: usize,
        message: v1::GenerateResponse,
        progress: &mut Progress,
    ) -> Vec<Value> {
        let mut chunks = Vec::new();
        if self.api == Api::Chat && !std::mem::replace(&mut progress.begun, true) {
            let delta = json!({ "role": "assistant", "content": "" });
            chunks.push(self.chunk(json!({ "index": index, "delta": delta, "finish_reason": null })));
        }
        progress.calls |= !message.tool_calls.is_empty();
        let finish = message.finish.clone();
        let text = match &finish {
            Some(finish) => self.with_stop(message.text, finish),
            None => message.text,
        };
        let said = text.len() + message.reasoning.len();
        let nothing = said + message.tool_calls.len() + message.citations.len() == 0;
        if nothing && finish.is_none() && !self.logprobs && !self.shown.return_token_ids {
            return chunks;
        }
        let mut choice = match self.api {
            Api::Completion => {
                let logprobs = self.legacy_logprobs(&message.logprobs, &mut progress.offset);
                json!({ "text": text, "logprobs": logprobs })
            }
            Api::Chat => {
                let mut delta = Map::new();
                if !message.reasoning.is_empty() {
                    delta.insert("reasoning".to_owned(), json!(message.reasoning));
                }
                if !text.is_empty() {
                    delta.insert("content".to_owned(), json!(text));
                }
                if !message.tool_calls.is_empty() {
                    delta
                        .insert("tool_calls".to_owned(), message.tool_calls.iter().map(call_delta).collect());
                }
                if !message.citations.is_empty() {
                    delta.insert("citations".to_owned(), message.citations.iter().map(citation).collect());
                }
                json!({ "delta": delta, "logprobs": self.chat_logprobs(&message.logprobs) })
            }
        };
        choice["index"] = json!(index);
        choice["finish_reason"] = json!(finish.as_ref().map(|finish| finish_reason(finish, progress.calls)));
        if let Some(finish) = &finish {
            choice["stop_reason"] = self.stop_reason(finish);
        }
        if self.shown.return_token_ids {
            choice["token_ids"] = json!(message.token_ids);
        }
        chunks.push(self.chunk(choice));
        chunks
    }

    fn chunk(&self, choice: Value) -> Value {
        let mut body = self.envelope(true, Value::Array(vec![choice]));
        if self.shown.include_usage {
            body.insert("usage".to_owned(), Value::Null);
        }
        Value::Object(body)
    }

    /// The chunk after the last choice, when usage was asked for.
    pub(super) fn usage_chunk(&self, usage: Usage) -> Option<Value> {
        let mut body = self.envelope(true, json!([]));
        body.insert("usage".to_owned(), usage.to_json());
        self.shown.include_usage.then_some(Value::Object(body))
    }

    fn with_stop(&self, mut text: String, finish: &v1::Finish) -> String {
        if let (true, Some(Matched::Stop(stop))) = (self.shown.include_stop, &finish.matched) {
            text.push_str(stop);
        }
        text
    }

    /// What stopped the answer, when it was not the model's own end.
    fn stop_reason(&self, finish: &v1::Finish) -> Value {
        match &finish.matched {
            Some(Matched::Stop(stop)) => json!(stop),
            Some(Matched::TokenId(id)) if !self.eos_token_ids.contains(id) => json!(id),
            Some(Matched::TokenId(_)) | None => Value::Null,
        }
    }

    /// A token's text and bytes; without a tokenizer, its id is its text.
    fn token(&self, id: u32) -> (String, Vec<u8>) {
        match &self.tokenizer {
            None => (format!("token_id:{id}"), Vec::new()),
            Some(tokenizer) => {
                let bytes = tokenizer.token_bytes(TokenId(id)).to_vec();
                (String::from_utf8_lossy(&bytes).into_owned(), bytes)
            }
        }
    }

    fn chat_logprobs(&self, logprobs: &[v1::TokenLogprob]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let entry = |id: u32, logprob: f32| {
            let (token, bytes) = self.token(id);
            json!({ "token": token, "logprob": logprob, "bytes": bytes })
        };
        let content = logprobs.iter().map(|position| {
            let mut whole = entry(position.token_id, position.logprob);
            whole["top_logprobs"] = position.top.iter().map(|top| entry(top.token_id, top.logprob)).collect();
            whole
        });
        json!({ "content": content.collect::<Vec<Value>>(), "refusal": null })
    }

    fn legacy_logprobs(&self, logprobs: &[v1::TokenLogprob], offset: &mut usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let (mut tokens, mut values, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
        for position in logprobs {
            let (token, _) = self.token(position.token_id);
            offsets.push(*offset);
            *offset += token.chars().count();
            let top = position.top.iter().map(|top| (self.token(top.token_id).0, json!(top.logprob)));
            tops.push(Value::Object(top.collect()));
            tokens.push(token);
            values.push(position.logprob);
        }
        json!({ "tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets })
    }

    /// One map a position from token id to its log-probability; null for the first.
    fn prompt_logprobs(&self, prompt: &v1::PromptInfo) -> Value {
        let entry = |id: u32, logprob: f32| {
            (id.to_string(), json!({ "logprob": logprob, "decoded_token": self.token(id).0 }))
        };
        let position = |position: &v1::PromptLogprob| match &position.value {
            None => Value::Null,
            Some(value) => {
                let top = value.top.iter().map(|top| entry(top.token_id, top.logprob));
                Value::Object(top.chain([entry(value.token_id, value.logprob)]).collect())
            }
        };
        prompt.logprobs.iter().map(position).collect()
    }
}

/// Tokens of all choices together.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    prompt: u64,
    cached: u64,
    output: u64,
    reasoning: u64,
}

impl Usage {
    /// Adds one choice's; a prompt counts once, with the first answer to it.
    pub(super) fn add(&mut self, usage: v1::Usage, first: bool) {
        if first {
            self.prompt += u64::from(usage.prompt_tokens);
            self.cached += u64::from(usage.cached_tokens);
        }
        self.output += u64::from(usage.output_tokens);
        self.reasoning += u64::from(usage.reasoning_tokens);
    }

    fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output,
            "prompt_tokens_details": { "cached_tokens": self.cached },
            "completion_tokens_details": { "reasoning_tokens": self.reasoning },
        })
    }
}

/// The mean log-probability of an answer's tokens.
fn likelihood(answer: &v1::GenerateOnceResponse) -> f64 {
    let sum: f64 = answer.logprobs.iter().map(|position| f64::from(position.logprob)).sum();
    sum / answer.logprobs.len().max(1) as f64
}

fn finish_reason(finish: &v1::Finish, calls: bool) -> &'static str {
    match finish.reason() {
        v1::FinishReason::Length => "length",
        v1::FinishReason::Stop | v1::FinishReason::Unspecified if calls => "tool_calls",
        v1::FinishReason::Stop | v1::FinishReason::Unspecified => "stop",
    }
}

fn call(call: &v1::ToolCall) -> Value {
    json!({ "id": call.id, "type": "function", "function": { "name": call.name, "arguments": call.arguments } })
}

/// A field OpenAI's API does not have: a span and what it rests on, as in `cohort.v1.Citation`.
fn citation(cited: &v1::Citation) -> Value {
    let source =
        |source: &v1::CitedSource| json!({ "tool_call": source.tool_call, "results": source.results });
    json!({
        "start": cited.start, "end": cited.end, "text": cited.text, "reasoning": cited.reasoning,
        "sources": cited.sources.iter().map(source).collect::<Vec<Value>>(),
    })
}

fn call_delta(piece: &v1::ToolCallDelta) -> Value {
    match piece.name.is_empty() {
        true => json!({ "index": piece.index, "function": { "arguments": piece.arguments } }),
        false => json!({
            "index": piece.index, "id": piece.id, "type": "function",
            "function": { "name": piece.name, "arguments": piece.arguments },
        }),
    }
}
