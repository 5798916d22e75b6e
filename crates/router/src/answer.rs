//! A request's way up: chunks of token ids from a leader become messages with text for the caller.

use std::sync::Arc;

use futures::Stream;
use futures::stream::unfold;
use proto::{Failure, RETRY_AFTER, v1, worker};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use types::TokenId;

use crate::call::Call;
use crate::forward::{Placed, WorkerStream};
use crate::pipeline::Permit;
use crate::text::{Detokenizer, Matched, StopStrings, Tokenizer};

/// One request's answer as it comes. Dropping it cancels the request at its group and gives the permit back.
pub(crate) struct Answer {
    call: Call,
    work: Work,
    assembler: Assembler,
    permit: Option<Permit>,
    closing: CancellationToken,
}

enum Work {
    Placed(Placed),
    Running(WorkerStream),
    Done,
}

impl Answer {
    pub(crate) fn new(
        call: Call,
        placed: Placed,
        assembler: Assembler,
        permit: Permit,
        closing: CancellationToken,
    ) -> Self {
        Self { call, work: Work::Placed(placed), assembler, permit: Some(permit), closing }
    }

    /// The messages, the last of which has `finish`, or a status.
    pub(crate) fn into_stream(self) -> impl Stream<Item = Result<v1::GenerateResponse, Status>> + Send {
        unfold(self, |mut answer| async move {
            let message = answer.next().await?;
            Some((message.map_err(|failure| answer.call.status(&failure)), answer))
        })
    }

    /// All messages as one.
    ///
    /// # Errors
    /// What any of them failed with.
    pub(crate) async fn collect(mut self) -> Result<v1::GenerateOnceResponse, Failure> {
        let mut whole = v1::GenerateOnceResponse::default();
        while let Some(message) = self.next().await {
            let message = message?;
            whole.request_id = message.request_id;
            whole.prompt = whole.prompt.or(message.prompt);
            whole.text.push_str(&message.text);
            whole.token_ids.extend(message.token_ids);
            whole.logprobs.extend(message.logprobs);
            whole.finish = message.finish;
            whole.usage = message.usage;
        }
        Ok(whole)
    }

    async fn next(&mut self) -> Option<Result<v1::GenerateResponse, Failure>> {
        if matches!(self.work, Work::Done) {
            return None;
        }
        let (call, closing) = (self.call.clone(), self.closing.clone());
        let result = tokio::select! {
            biased;
            () = closing.cancelled() => Err(Failure::Unavailable {
                why: "the router is shutting down".to_owned(),
                retry_after: RETRY_AFTER,
            }),
            result = call.within(self.step()) => result,
        };
        let last = result.as_ref().map_or(true, |message| message.finish.is_some());
        if last {
            // Leaving the stream cancels what the group still does for it, as after a stop string.
            self.work = Work::Done;
            self.permit = None;
            match &result {
                Ok(_) => tracing::debug!(request = %self.call.request_id, "finished"),
                Err(failure) => tracing::info!(request = %self.call.request_id, %failure, "failed"),
            }
        }
        Some(result)
    }

    async fn step(&mut self) -> Result<v1::GenerateResponse, Failure> {
        loop {
            let mut stream = match std::mem::replace(&mut self.work, Work::Done) {
                Work::Placed(placed) => placed.open(self.call.deadline).await?,
                Work::Running(stream) => stream,
                Work::Done => {
                    return Err(Failure::Internal { why: "read past the end of an answer".to_owned() });
                }
            };
            let chunk = stream.next().await?;
            self.work = Work::Running(stream);
            if let Some(message) = self.assembler.take(chunk)? {
                return Ok(message);
            }
        }
    }
}

/// Puts messages together from chunks. Pure: one chunk in, at most one message out.
pub(crate) struct Assembler {
    request_id: String,
    /// Taken by the first message.
    prompt: Option<v1::PromptInfo>,
    prompt_tokens: u32,
    output_tokens: u32,
    tokenizer: Option<Arc<Tokenizer>>,
    detokenizer: Detokenizer,
    stop: StopStrings,
}

impl Assembler {
    /// For one request and its tokenized prompt; without a tokenizer the text stays empty.
    pub(crate) fn new(request_id: String, prompt: Vec<TokenId>, tokenizer: Option<Arc<Tokenizer>>) -> Self {
        // Admission has compared the length with the context, which fits u32.
        let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let token_ids = prompt.into_iter().map(|id| id.0).collect();
        let prompt = Some(v1::PromptInfo { token_ids, logprobs: Vec::new() });
        let (detokenizer, stop) = (Detokenizer::new(false), StopStrings::new(Vec::new()));
        Self { request_id, prompt, prompt_tokens, output_tokens: 0, tokenizer, detokenizer, stop }
    }

    /// With marker tokens kept in the text or not, and ended by any of `stop`.
    pub(crate) fn with_text(mut self, keep_special: bool, stop: Vec<String>) -> Self {
        self.detokenizer = Detokenizer::new(keep_special);
        self.stop = StopStrings::new(stop);
        self
    }

    /// The message for `chunk`; `None` for one that only brings log-probabilities of the prompt, which are gathered
    /// for the first message.
    fn take(&mut self, chunk: worker::GenerateChunk) -> Result<Option<v1::GenerateResponse>, Failure> {
        let worker::GenerateChunk { mut token_ids, mut logprobs, prompt_logprobs, finish } = chunk;
        if let Some(prompt) = &mut self.prompt {
            prompt.logprobs.extend(prompt_logprobs.into_iter().map(Into::into));
        }
        if token_ids.is_empty() && finish.is_none() {
            return Ok(None);
        }
        let mut text = String::new();
        let mut finish: Option<v1::Finish> = finish.map(TryInto::try_into).transpose()?;
        if let Some((used, stop)) = self.read(&token_ids, finish.is_some(), &mut text) {
            token_ids.truncate(used);
            logprobs.truncate(used);
            let matched = Some(v1::finish::Matched::Stop(stop));
            finish = Some(v1::Finish { reason: v1::FinishReason::Stop.into(), matched });
        }
        self.output_tokens =
            self.output_tokens.saturating_add(u32::try_from(token_ids.len()).unwrap_or(u32::MAX));
        let usage = v1::Usage { prompt_tokens: self.prompt_tokens, output_tokens: self.output_tokens };
        Ok(Some(v1::GenerateResponse {
            request_id: self.request_id.clone(),
            prompt: self.prompt.take(),
            text,
            token_ids,
            logprobs: logprobs.into_iter().map(Into::into).collect(),
            usage: finish.is_some().then_some(usage),
            finish,
        }))
    }

    /// Appends the text of `token_ids` that is now certain. When a stop string is complete, returns it and how many
    /// of the tokens it took.
    fn read(&mut self, token_ids: &[u32], last: bool, text: &mut String) -> Option<(usize, String)> {
        let tokenizer = self.tokenizer.as_ref()?;
        let mut piece = String::new();
        for (index, &id) in token_ids.iter().enumerate() {
            piece.clear();
            self.detokenizer.push(tokenizer, TokenId(id), &mut piece);
            if let Some(Matched { stop }) = self.stop.push(&piece, text) {
                return Some((index + 1, stop));
            }
        }
        if last {
            piece.clear();
            self.detokenizer.finish(&mut piece);
            if let Some(Matched { stop }) = self.stop.push(&piece, text) {
                return Some((token_ids.len(), stop));
            }
            self.stop.finish(text);
        }
        None
    }
}
