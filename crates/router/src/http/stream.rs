//! Answers as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{Peekable, SelectAll, select_all, unfold};
use futures::{Stream, StreamExt};
use proto::{Failure, v1};
use serde_json::Value;

use super::error::ApiError;
use super::view::{Progress, Usage, View};
use crate::answer::Answer;

type Message = (usize, Result<v1::GenerateResponse, Failure>);
type Messages = Peekable<SelectAll<Pin<Box<dyn Stream<Item = Message> + Send>>>>;

/// All choices of one request on their way out. Dropping it cancels them.
struct Feed {
    view: View,
    /// `None` once everything has been read or something failed.
    messages: Option<Pin<Box<Messages>>>,
    progress: Vec<Progress>,
    per_prompt: usize,
    usage: Usage,
    /// Events of the message that was read last.
    ready: VecDeque<String>,
}

/// Streams the choices, `per_prompt` of each answer. What is refused before the first token
/// is answered with its status as long as nothing else had to be said.
pub(super) async fn respond(
    view: View,
    answers: Vec<Answer>,
    per_prompt: usize,
    quiet: Duration,
) -> Result<Response, ApiError> {
    let progress = vec![Progress::default(); answers.len() * per_prompt];
    let streams = answers.into_iter().enumerate().map(|(prompt, answer)| {
        let messages = answer.into_stream().map(move |message| {
            let index = message.as_ref().map_or(0, |message| message.index as usize);
            (prompt * per_prompt + index, message)
        });
        Box::pin(messages) as Pin<Box<dyn Stream<Item = Message> + Send>>
    });
    let mut messages = Box::pin(select_all(streams).peekable());
    if let Some((_, Err(failure))) = first(quiet, messages.as_mut().peek()).await {
        return Err(failure.clone().into());
    }
    let (usage, ready) = (Usage::default(), VecDeque::new());
    let feed = Feed { view, messages: Some(messages), progress, per_prompt, usage, ready };
    let events = unfold(feed, |mut feed| async move { feed.next().await.map(|event| (event, feed)) });
    let events = events.map(|data| Ok::<Event, Infallible>(Event::default().data(data)));
    Ok(Sse::new(events).keep_alive(keep_alive(quiet)).into_response())
}

/// The first message of a stream, unless it takes so long that something has to be said before.
pub(super) async fn first<T>(quiet: Duration, message: impl Future<Output = Option<T>>) -> Option<T> {
    tokio::time::timeout(quiet, message).await.ok().flatten()
}

/// Comments while there is nothing to say.
pub(super) fn keep_alive(quiet: Duration) -> KeepAlive {
    KeepAlive::new().interval(quiet)
}

impl Feed {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            match self.messages.as_mut()?.next().await {
                Some((index, Ok(message))) => {
                    if let Some(usage) = message.usage {
                        self.usage.add(usage, index % self.per_prompt == 0);
                    }
                    let chunks = self.view.chunks(index, message, &mut self.progress[index]);
                    self.ready.extend(chunks.iter().map(Value::to_string));
                }
                Some((_, Err(failure))) => self.end(Some(ApiError::from(failure).to_json())),
                None => self.end(self.view.usage_chunk(self.usage)),
            }
        }
    }

    /// The last events; what still runs is cancelled.
    fn end(&mut self, last: Option<Value>) {
        self.messages = None;
        self.ready.extend(last.map(|last| last.to_string()));
        self.ready.push_back("[DONE]".to_owned());
    }
}
