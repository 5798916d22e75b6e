//! A request's way up: chunks of token ids from a leader become messages with text for the caller.

use std::sync::Arc;

use futures::stream::unfold;
use futures::{Stream, StreamExt};
use proto::{Failure, v1, worker};
use types::TokenId;

use crate::call::Call;
use crate::forward::{Chunks, Placed};
use crate::metrics::Counted;
use crate::pipeline::Permit;
use crate::text::{
    CallPiece, Citation, Cited, CitedSource, Detokenizer, Matched, Parsed, Parser, StopStrings, Tokenizer,
};

/// One request's answers as they come. Dropping it cancels the request at its group and gives the permit back.
pub(crate) struct Answer {
    call: Call,
    counted: Counted,
    work: Work,
    /// One for each of the answers.
    assemblers: Vec<Assembler>,
    permit: Option<Permit>,
}

enum Work {
    Open(Chunks),
    Done,
}

impl Answer {
    pub(crate) fn new(
        (call, counted): (Call, Counted),
        placed: Placed,
        assemblers: Vec<Assembler>,
        permit: Permit,
    ) -> Self {
        let work = Work::Open(placed.into_chunks(call.deadline));
        Self { call, counted, work, assemblers, permit: Some(permit) }
    }

    /// The messages, the last of each answer with `finish`, or a failure.
    pub(crate) fn into_stream(self) -> impl Stream<Item = Result<v1::GenerateResponse, Failure>> + Send {
        unfold(self, |mut answer| async move {
            let message = answer.next().await?;
            Some((message, answer))
        })
    }

    /// All messages of each answer as one.
    ///
    /// # Errors
    /// What any of them failed with.
    pub(crate) async fn collect(mut self) -> Result<Vec<v1::GenerateOnceResponse>, Failure> {
        let mut all = vec![v1::GenerateOnceResponse::default(); self.assemblers.len()];
        while let Some(message) = self.next().await {
            let message = message?;
            let Some(whole) = all.get_mut(message.index as usize) else { continue };
            whole.request_id = message.request_id;
            whole.prompt = whole.prompt.take().or(message.prompt);
            whole.text.push_str(&message.text);
            whole.reasoning.push_str(&message.reasoning);
            for piece in message.tool_calls {
                add_piece(&mut whole.tool_calls, piece);
            }
            whole.citations.extend(message.citations);
            whole.token_ids.extend(message.token_ids);
            whole.logprobs.extend(message.logprobs);
            whole.finish = message.finish;
            whole.usage = message.usage;
        }
        Ok(all)
    }

    async fn next(&mut self) -> Option<Result<v1::GenerateResponse, Failure>> {
        if matches!(self.work, Work::Done) {
            return None;
        }
        let result = self.call.within(step(&mut self.work, &mut self.assemblers)).await;
        if let Ok(message) = &result {
            self.counted.message(message);
        }
        if result.is_err() || self.assemblers.iter().all(|one| one.ended) {
            // Leaving the stream cancels what the group still does for it, as after a stop string.
            self.work = Work::Done;
            self.permit = None;
            self.counted.ended(result.as_ref().err());
            match &result {
                Ok(_) => tracing::debug!(request = %self.call.request_id, "finished"),
                Err(failure) => tracing::info!(request = %self.call.request_id, %failure, "failed"),
            }
        }
        Some(result)
    }
}

/// The next message.
async fn step(work: &mut Work, assemblers: &mut [Assembler]) -> Result<v1::GenerateResponse, Failure> {
    let internal = |why: String| Failure::Internal { why };
    loop {
        let Work::Open(chunks) = work else {
            return Err(internal("read past the end of an answer".to_owned()));
        };
        let Some(chunk) = chunks.next().await else {
            return Err(internal("the leader ended some sequence twice, and others never".to_owned()));
        };
        let (chunk, sequences) = (chunk?, assemblers.len());
        let wrong = || format!("the leader generated sequence {} of {sequences}", chunk.index);
        let assembler = assemblers.get_mut(chunk.index as usize).ok_or_else(|| internal(wrong()))?;
        if let Some(message) = assembler.take(chunk)? {
            return Ok(message);
        }
    }
}

/// Adds a piece of a tool call to the calls so far.
fn add_piece(calls: &mut Vec<v1::ToolCall>, piece: v1::ToolCallDelta) {
    if !piece.name.is_empty() {
        return calls.push(v1::ToolCall { id: piece.id, name: piece.name, arguments: piece.arguments });
    }
    // Pieces of one call come together, the first of them with its name.
    if let Some(call) = calls.last_mut() {
        call.arguments.push_str(&piece.arguments);
    }
}

impl From<Citation> for v1::Citation {
    fn from(citation: Citation) -> Self {
        let Citation { part, start, end, text, sources } = citation;
        let source =
            |source: CitedSource| v1::CitedSource { tool_call: source.call, results: source.results };
        let sources = sources.into_iter().map(source).collect();
        Self { reasoning: part == Cited::Reasoning, start, end, text, sources }
    }
}

/// Puts the messages of one answer together from chunks. Pure: one chunk in, at most one message out.
pub(crate) struct Assembler {
    request_id: String,
    index: u32,
    /// Taken by the first message; only the first answer has it.
    prompt: Option<v1::PromptInfo>,
    usage: v1::Usage,
    reader: Option<Reader>,
    /// Nothing comes after the end, as when a stop string ended it and its group does not know.
    ended: bool,
}

/// Token ids to what the caller reads.
struct Reader {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    /// Unless the text is wanted as it is.
    parser: Option<Parser>,
    stop: StopStrings,
    /// Tokens read while the model was thinking.
    reasoning_tokens: u32,
}

/// How the text of an answer is read.
pub(crate) struct Reading {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) keep_special: bool,
    pub(crate) parser: Option<Parser>,
    pub(crate) stop: Vec<String>,
}

impl Reader {
    fn new(reading: Reading) -> Self {
        let Reading { tokenizer, keep_special, parser, stop } = reading;
        // The parser finds its parts by the markers.
        let detokenizer = Detokenizer::new(keep_special || parser.is_some());
        Self { tokenizer, detokenizer, parser, stop: StopStrings::new(stop), reasoning_tokens: 0 }
    }

    /// Appends what is now certain of `token_ids` to `out`. When a stop string is complete, returns it and how many of
    /// the tokens it took.
    fn read(&mut self, token_ids: &[u32], last: bool, out: &mut Parsed) -> Option<(usize, String)> {
        let mut piece = String::new();
        for (index, &id) in token_ids.iter().enumerate() {
            piece.clear();
            if self.parser.as_ref().is_some_and(Parser::is_reasoning) {
                self.reasoning_tokens = self.reasoning_tokens.saturating_add(1);
            }
            self.detokenizer.push(&self.tokenizer, TokenId(id), &mut piece);
            if let Some(Matched { stop }) = self.take(&piece, false, out) {
                return Some((index + 1, stop));
            }
        }
        if last {
            piece.clear();
            self.detokenizer.finish(&mut piece);
            if let Some(Matched { stop }) = self.take(&piece, true, out) {
                return Some((token_ids.len(), stop));
            }
            self.stop.finish(&mut out.text);
        }
        None
    }

    fn take(&mut self, piece: &str, last: bool, out: &mut Parsed) -> Option<Matched> {
        let Some(parser) = &mut self.parser else { return self.stop.push(piece, &mut out.text) };
        let mut parsed = Parsed::default();
        parser.push(piece, &mut parsed);
        if last {
            parser.finish(&mut parsed);
        }
        out.reasoning.push_str(&parsed.reasoning);
        out.calls.append(&mut parsed.calls);
        out.citations.append(&mut parsed.citations);
        out.faults.append(&mut parsed.faults);
        self.stop.push(&parsed.text, &mut out.text)
    }
}

impl Assembler {
    /// For answer `index` to a tokenized prompt; without a reading the text stays empty.
    pub(crate) fn new(request_id: String, index: u32, prompt: &[TokenId], reading: Option<Reading>) -> Self {
        // Admission has compared the length with the context, which fits u32.
        let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let usage = v1::Usage { prompt_tokens, ..v1::Usage::default() };
        let prompt = (index == 0).then(|| v1::PromptInfo {
            token_ids: prompt.iter().map(|id| id.0).collect(),
            logprobs: Vec::new(),
        });
        Self { request_id, index, prompt, usage, reader: reading.map(Reader::new), ended: false }
    }

    /// The message for `chunk`; `None` for one that only brings log-probabilities of the prompt, which are gathered
    /// for the first message, and for one after the end.
    fn take(&mut self, chunk: worker::GenerateChunk) -> Result<Option<v1::GenerateResponse>, Failure> {
        let worker::GenerateChunk { mut token_ids, mut logprobs, prompt_logprobs, finish, .. } = chunk;
        if self.ended {
            return Ok(None);
        }
        if let Some(prompt) = &mut self.prompt {
            prompt.logprobs.extend(prompt_logprobs.into_iter().map(Into::into));
        }
        if let Some(tokens) = chunk.cached_tokens {
            self.usage.cached_tokens = tokens.min(self.usage.prompt_tokens);
        }
        if token_ids.is_empty() && finish.is_none() {
            return Ok(None);
        }
        let mut parsed = Parsed::default();
        let mut finish: Option<v1::Finish> = finish.map(TryInto::try_into).transpose()?;
        if let Some(reader) = &mut self.reader {
            if let Some((used, stop)) = reader.read(&token_ids, finish.is_some(), &mut parsed) {
                token_ids.truncate(used);
                logprobs.truncate(used);
                let matched = Some(v1::finish::Matched::Stop(stop));
                finish = Some(v1::Finish { reason: v1::FinishReason::Stop.into(), matched });
            }
            self.usage.reasoning_tokens = reader.reasoning_tokens;
        }
        for fault in &parsed.faults {
            tracing::warn!(request = %self.request_id, fault, "a tool call was not taken as one");
        }
        let tokens = u32::try_from(token_ids.len()).unwrap_or(u32::MAX);
        self.usage.output_tokens = self.usage.output_tokens.saturating_add(tokens);
        self.ended = finish.is_some();
        Ok(Some(v1::GenerateResponse {
            request_id: self.request_id.clone(),
            index: self.index,
            prompt: self.prompt.take(),
            text: parsed.text,
            token_ids,
            logprobs: logprobs.into_iter().map(Into::into).collect(),
            usage: finish.is_some().then_some(self.usage),
            finish,
            reasoning: parsed.reasoning,
            tool_calls: parsed.calls.into_iter().map(|piece| self.piece(piece)).collect(),
            citations: parsed.citations.into_iter().map(Into::into).collect(),
        }))
    }

    /// Calls are named after their request and answer, so that ids differ over a whole conversation.
    fn piece(&self, piece: CallPiece) -> v1::ToolCallDelta {
        let CallPiece { index, name, arguments } = piece;
        let id = name.as_ref().map(|_| match self.index {
            0 => format!("call_{}_{index}", self.request_id),
            answer => format!("call_{}_{answer}_{index}", self.request_id),
        });
        v1::ToolCallDelta { index, id: id.unwrap_or_default(), name: name.unwrap_or_default(), arguments }
    }
}
