//! A request's way up: chunks of token ids from a leader become messages with text for the caller.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;
use futures::stream::unfold;
use proto::{Failure, v1, worker};
use tokio::sync::Notify;
use types::TokenId;

use crate::call::Call;
use crate::forward::{Broken, Chunks, Piece, Placed};
use crate::metrics::Counted;
use crate::pipeline::Permit;
use crate::resume::Replay;
use crate::text::{
    CallPiece, Citation, Cited, CitedSource, Detokenizer, Matched, Parsed, Parser, StopStrings, Tokenizer,
};

/// One request's answers as they come. Dropping it cancels the request at its group and gives the permit back.
pub(crate) struct Answer {
    call: Call,
    counted: Counted,
    work: Work,
    permit: Option<Permit>,
    /// Told when a group has taken the request.
    taken: Arc<Notify>,
}

/// What is generated for a request.
struct Work {
    /// One stream, or one for each sequence that was resumed; `None` when nothing more is to come.
    streams: Option<Vec<Chunks>>,
    sequences: Vec<Sequence>,
    replay: Replay,
}

/// One of the answers.
struct Sequence {
    assembler: Assembler,
    /// All that was generated, to go on from.
    tokens: Vec<u32>,
}

impl Answer {
    pub(crate) fn new(
        (call, counted): (Call, Counted),
        way: (Placed, Replay),
        assemblers: impl Iterator<Item = Assembler>,
        permit: Permit,
    ) -> Self {
        let (placed, replay) = way;
        let taken = placed.taken();
        let streams = Some(vec![replay.start(placed)]);
        let sequences = assemblers.map(|assembler| Sequence { assembler, tokens: Vec::new() }).collect();
        Self { call, counted, work: Work { streams, sequences, replay }, permit: Some(permit), taken }
    }

    /// Told when a group has taken the request, at the latest with its first message; not before the messages are asked
    /// for.
    pub(crate) fn taken(&self) -> Arc<Notify> {
        Arc::clone(&self.taken)
    }

    /// The messages, the last of each answer with `finish`, or a failure.
    pub(crate) fn into_stream(self) -> impl Stream<Item = Result<v1::GenerateResponse, Failure>> + Send {
        // In a box: it moves with every message.
        unfold(Box::new(self), |mut answer| async move {
            let message = answer.next().await?;
            Some((message, answer))
        })
    }

    /// All messages of each answer as one.
    ///
    /// # Errors
    /// What any of them failed with.
    pub(crate) async fn collect(mut self) -> Result<Vec<v1::GenerateOnceResponse>, Failure> {
        let mut all = vec![v1::GenerateOnceResponse::default(); self.work.sequences.len()];
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
        self.work.streams.as_ref()?;
        let result = self.call.within(self.work.step()).await;
        if let Ok(message) = &result {
            self.counted.message(message);
            self.call.spend_tokens(message.token_ids.len());
        }
        if result.is_err() || self.work.is_done() {
            // Leaving the stream cancels what the group still does for it, as after a stop string.
            self.work.streams = None;
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

impl Work {
    fn is_done(&self) -> bool {
        self.sequences.iter().all(|one| one.assembler.ended)
    }

    /// The next message.
    async fn step(&mut self) -> Result<v1::GenerateResponse, Failure> {
        let internal = |why: String| Failure::Internal { why };
        loop {
            let Some(streams) = &mut self.streams else {
                return Err(internal("read past the end of an answer".to_owned()));
            };
            let Some(piece) = poll_fn(|cx| next_of(streams, cx)).await else {
                return Err(internal("the leader ended some sequence twice, and others never".to_owned()));
            };
            let Piece { chunk, group } = match piece {
                Ok(piece) => piece,
                Err(broken) => {
                    self.recover(&broken)?;
                    continue;
                }
            };
            let count = self.sequences.len();
            let wrong = || format!("the leader generated sequence {} of {count}", chunk.index);
            let sequence = self.sequences.get_mut(chunk.index as usize).ok_or_else(|| internal(wrong()))?;
            sequence.tokens.extend(&chunk.token_ids);
            let (index, runs) = (chunk.index, chunk.finish.is_none() && !sequence.assembler.ended);
            let message = sequence.assembler.take(chunk)?;
            if let Some(group) = group.filter(|_| runs && sequence.assembler.ended) {
                self.leave(group, index);
            }
            if let Some(message) = message {
                return Ok(message);
            }
        }
    }

    /// Lets go of a sequence that a stop string ended and its group goes on with. The end of the last one ends the
    /// stream, which says it too.
    fn leave(&self, group: usize, index: u32) {
        if !self.is_done() {
            self.replay.cancel(group, index);
        }
    }

    /// Goes on elsewhere with what a broken stream left unfinished.
    ///
    /// # Errors
    /// Why it broke, when that is not possible.
    fn recover(&mut self, broken: &Broken) -> Result<(), Failure> {
        let Some(streams) = &mut self.streams else { return Err(broken.failure.clone()) };
        let of_stream = (0..).zip(&mut self.sequences).filter(|(index, _)| broken.sequences.contains(index));
        let left: Vec<(u32, &mut Sequence)> = of_stream.filter(|(_, one)| !one.assembler.ended).collect();
        if left.is_empty() {
            return Ok(());
        }
        self.replay.lose(broken)?;
        let untouched = left.iter().all(|(_, one)| one.tokens.is_empty());
        let together = untouched && left.len() == broken.sequences.len();
        if together {
            // The prompt is computed once again, not once for each.
            streams.push(self.replay.again(broken));
        }
        for (index, Sequence { assembler, tokens }) in left {
            if tokens.is_empty() {
                assembler.begin_again();
            }
            if !together {
                streams.push(self.replay.resume(index, tokens, broken));
            }
        }
        Ok(())
    }
}

/// What comes next on any of the streams, in turn; `None` when all have ended.
fn next_of(streams: &mut Vec<Chunks>, cx: &mut Context<'_>) -> Poll<Option<Result<Piece, Broken>>> {
    let mut at = 0;
    while let Some(stream) = streams.get_mut(at) {
        match stream.as_mut().poll_next(cx) {
            Poll::Ready(Some(piece)) => {
                streams.rotate_left(at + 1);
                return Poll::Ready(Some(piece));
            }
            Poll::Ready(None) => drop(streams.remove(at)),
            Poll::Pending => at += 1,
        }
    }
    if streams.is_empty() { Poll::Ready(None) } else { Poll::Pending }
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
    /// Nothing comes after the end, as when a stop string ended it and its group does not know yet.
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

    /// Forgets what came before the first message.
    fn begin_again(&mut self) {
        if let Some(prompt) = &mut self.prompt {
            prompt.logprobs.clear();
        }
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
        // What a resumed answer found elsewhere is not what its caller asked about.
        if let Some(tokens) = chunk.cached_tokens.filter(|_| self.usage.output_tokens == 0) {
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
