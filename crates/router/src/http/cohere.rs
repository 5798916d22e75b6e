//! Cohere's `/v2/chat`: its request, its answer and its stream of events, over the same pipeline.

mod message;
mod request;
mod view;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{Peekable, unfold};
use futures::{Stream, StreamExt};
use proto::{Failure, Violation, v1};
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::{Context, call, read, stream};
use crate::call::REQUEST_ID;
use crate::pipeline::Shared;
use crate::text::Text;

use request::Asked;
use view::{Progress, View};

/// What is refused has Cohere's form: `{"message", "id"}`.
struct Refusal {
    id: String,
    error: ApiError,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self { id, error } = self;
        let body = json!({ "id": id, "message": error.message() });
        let mut response = error.into_response();
        let status = response.status();
        let headers = std::mem::take(response.headers_mut());
        let mut response = (status, Json(body)).into_response();
        // The body's own headers are of the other form.
        for (name, value) in &headers {
            if name == header::RETRY_AFTER || name == header::WWW_AUTHENTICATE {
                response.headers_mut().insert(name, value.clone());
            }
        }
        response
    }
}

/// What is refused before a chat is looked at.
pub(super) fn refuse(error: ApiError) -> Response {
    Refusal { id: String::new(), error }.into_response()
}

/// Answers a chat.
pub(super) async fn chat(State(context): State<Context>, request: Request) -> Response {
    let mut id = String::new();
    match answer(&context.shared, request, &mut id).await {
        Ok(mut response) => {
            if let Ok(id) = HeaderValue::from_str(&id) {
                response.headers_mut().insert(HeaderName::from_static(REQUEST_ID), id);
            }
            response
        }
        Err(error) => Refusal { id, error }.into_response(),
    }
}

async fn answer(shared: &Arc<Shared>, request: Request, id: &mut String) -> Result<Response, ApiError> {
    let take = |mut fields: Fields, text: Option<&Text>| {
        let asked = request::take(&mut fields, text);
        // What is refused of its fields is refused with the call's id.
        Ok(fields.finish().map(|()| asked))
    };
    let (parts, asked) = read(shared, request, take).await?;
    let mut call = call(&parts, "")?.listed(&shared.running);
    call.request_id.clone_into(id);
    let Asked { request, stream, show } = asked?;
    let tokenizer = shared.text.as_ref().map(|text| Arc::clone(text.tokenizer()));
    call.trail.streams(stream);
    let answer = shared.generate(call, request).await.map_err(named)?;
    let view = View::new(id.clone(), show, tokenizer);
    if stream {
        return respond(view, answer.into_stream(), shared.tuning.get().http_patience.quiet).await;
    }
    let mut whole = answer.collect().await.map_err(named)?;
    Ok(Json(view.whole(whole.pop().unwrap_or_default())).into_response())
}

/// Names fields as this API's callers sent them.
fn named(failure: Failure) -> ApiError {
    let name = |violation: Violation| {
        let Violation { field, reason } = violation;
        let name = match &*field {
            "sampling.top_p" => "p".to_owned(),
            "sampling.top_k" => "k".to_owned(),
            "chat.reasoning" => "thinking".to_owned(),
            "response.logprobs" => "logprobs".to_owned(),
            "stopping.thinking_tokens_max" => "thinking.token_budget".to_owned(),
            "constraint.json_object" => "response_format".to_owned(),
            other => other
                .replace("constraint.json", "response_format.json_schema")
                .replace("chat.template_arguments.grounding", "citation_options")
                .replace("chat.template_arguments.", "")
                .replace("stopping.stop[", "stop_sequences[")
                .replace("].results[", "].content["),
        };
        let name = if name == "stopping.stop" { "stop_sequences".to_owned() } else { name };
        Violation::new(name, reason)
    };
    match failure {
        Failure::Invalid(wrong) => Failure::Invalid(wrong.into_iter().map(name).collect()).into(),
        other => other.into(),
    }
}

type Messages = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Failure>> + Send>>;

/// An answer on its way out. Dropping it cancels the request.
struct Feed {
    view: View,
    /// `None` once everything has been read or something failed.
    messages: Option<Pin<Box<Peekable<Messages>>>>,
    progress: Progress,
    ready: VecDeque<Value>,
    done: bool,
}

async fn respond(
    view: View,
    messages: impl Stream<Item = Result<v1::GenerateResponse, Failure>> + Send + 'static,
    quiet: Duration,
) -> Result<Response, ApiError> {
    let messages: Messages = Box::pin(messages);
    let mut messages = Box::pin(messages.peekable());
    if let Some(Err(failure)) = stream::first(quiet, messages.as_mut().peek()).await {
        return Err(named(failure.clone()));
    }
    let feed = Feed {
        view,
        messages: Some(messages),
        progress: Progress::default(),
        ready: VecDeque::new(),
        done: false,
    };
    let events = unfold(feed, |mut feed| async move { feed.next().await.map(|event| (event, feed)) });
    let events = events.map(Ok::<Event, Infallible>);
    Ok(Sse::new(events).keep_alive(stream::keep_alive(quiet)).into_response())
}

impl Feed {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                let kind = event["type"].as_str().unwrap_or_default();
                return Some(Event::default().event(kind).data(event.to_string()));
            }
            let Some(messages) = &mut self.messages else {
                return (!std::mem::replace(&mut self.done, true)).then(|| Event::default().data("[DONE]"));
            };
            match messages.next().await {
                Some(Ok(message)) => self.ready.extend(self.view.events(message, &mut self.progress)),
                Some(Err(failure)) => {
                    self.ready.extend(self.view.failed(&failure, &mut self.progress));
                    self.messages = None;
                }
                None => self.messages = None,
            }
        }
    }
}
