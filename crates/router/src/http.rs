//! The HTTP listener: OpenAI's API and Cohere's chat over the same pipeline as gRPC, probes, version and the list of
//! models.

mod chat;
mod cohere;
mod completions;
mod error;
mod fields;
mod form;
mod generation;
mod listen;
mod start;
mod stream;
mod tokens;
mod view;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Bytes, to_bytes};
use axum::extract::{Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::future::try_join_all;
use proto::{Failure, v1};
use serde_json::{Value, json};
use tonic::metadata::MetadataMap;
use types::limits::{JSON_IN_PLACE_BYTES_MAX, MESSAGE_BYTES_MAX};

use crate::call::{Call, REQUEST_ID};
use crate::gate::Gate;
use crate::metrics;
use crate::pipeline::Shared;
use crate::service::VERSION;
use crate::text::Text;
use crate::workers::Progress;

use error::ApiError;
use fields::Fields;
use generation::Common;
pub(crate) use listen::serve as listen;
pub(crate) use start::routes as start;
use view::{Api, View};

/// Enough of the configuration's hash to tell two of them apart.
const FINGERPRINT_DIGITS: usize = 12;

#[derive(Clone)]
struct Context {
    shared: Arc<Shared>,
    started: u64,
}

/// The routes: OpenAI's API under `/v1`, Cohere's `/v2/chat`, `/tokenize` and `/detokenize`; `/livez` (this process
/// runs), `/startupz` (it listens), `/readyz`, `/health` and `/ping` (a group serves), `/load` (requests taken now),
/// `/metrics`, `/version`.
pub(crate) fn routes(shared: Arc<Shared>) -> Router {
    let (counted, gate) = (Arc::clone(&shared.metrics), Arc::clone(&shared.gate));
    Router::new()
        .route("/livez", get(livez))
        .route("/startupz", get(startupz))
        .route("/readyz", get(readyz))
        .route("/health", get(readyz))
        .route("/ping", get(readyz).post(readyz))
        .route("/load", get(load))
        .route("/version", get(version))
        .route("/metrics", get(metrics_page))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(plain_completions))
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/responses", post(responses))
        .route("/inference/v1/generate", post(tokens_to_tokens))
        .route("/v2/chat", post(cohere::chat))
        .route("/cohere/v2/chat", post(cohere::chat))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(axum::middleware::from_fn(move |request, next| admit(Arc::clone(&gate), request, next)))
        .layer(axum::middleware::from_fn(move |request, next| {
            metrics::count_http(Arc::clone(&counted), request, next)
        }))
        .with_state(Context { shared, started: now() })
}

/// Refuses whoever may not call, before anything of the body is read.
async fn admit(gate: Arc<Gate>, mut request: Request, next: Next) -> Response {
    let failure = match gate.admit(&mut request) {
        Ok(()) => return next.run(request).await,
        Err(failure) => failure,
    };
    start::refusal(request.uri().path(), failure)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

async fn no_such_path(request: Request) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no {}", request.uri().path()))
}

async fn no_such_method(request: Request) -> ApiError {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn embeddings() -> ApiError {
    ApiError::new(StatusCode::NOT_IMPLEMENTED, "the served model generates text and has no embeddings")
}

async fn responses() -> ApiError {
    ApiError::new(StatusCode::NOT_IMPLEMENTED, "/v1/responses is not served; use /v1/chat/completions")
}

async fn tokens_to_tokens() -> ApiError {
    let message = "/inference/v1/generate is not served; token ids are answered with token ids by the gRPC calls Generate \
                   and GenerateOnce of cohort.v1.Cohort, and with text by /v1/completions";
    ApiError::new(StatusCode::NOT_IMPLEMENTED, message)
}

async fn chat_completions(State(context): State<Context>, request: Request) -> Result<Response, ApiError> {
    let (parts, common) = read(&context.shared, request, take_chat).await?;
    let requests = vec![common.request.clone()];
    generate(&context.shared, &parts, Api::Chat, (common, requests)).await
}

/// The body of a `/v1/chat/completions` request as our own message; `text` is that of the served checkpoint. What the
/// listener does with every such body, by itself.
///
/// # Errors
/// The refusal in words: every field that is wrong.
pub fn read_chat(body: &[u8], text: Option<&Text>) -> Result<v1::GenerateRequest, String> {
    let common = Fields::read(body).and_then(|fields| take_chat(fields, text));
    common.map(|common| common.request).map_err(|error| error.message().to_owned())
}

fn take_chat(mut fields: Fields, text: Option<&Text>) -> Result<Common, ApiError> {
    let common = chat::take(&mut fields, text);
    fields.finish()?;
    Ok(common)
}

async fn plain_completions(State(context): State<Context>, request: Request) -> Result<Response, ApiError> {
    let take = |mut fields: Fields, _: Option<&Text>| {
        let taken = completions::take(&mut fields);
        fields.finish()?;
        Ok(taken)
    };
    let (parts, (common, prompts)) = read(&context.shared, request, take).await?;
    let each = |prompt| v1::GenerateRequest { prompt: Some(prompt), ..common.request.clone() };
    let requests = prompts.into_iter().map(each).collect();
    generate(&context.shared, &parts, Api::Completion, (common, requests)).await
}

/// Runs one request for each prompt through the pipeline and writes the answers. A caller that goes away drops this,
/// and with it all that runs for it.
async fn generate(
    shared: &Arc<Shared>,
    parts: &Parts,
    api: Api,
    asked: (Common, Vec<v1::GenerateRequest>),
) -> Result<Response, ApiError> {
    let (common, requests) = asked;
    let mut call = call(parts, &common.request.request_id)?.listed(&shared.running);
    call.trail.streams(common.stream);
    let answers = shared.generate_all(&call, requests).await.map_err(|failure| common.named(failure))?;
    let view = view(shared, api, &call, &common)?;
    let per_prompt = common.count();
    let mut response = match common.stream {
        true => stream::respond(view, answers, per_prompt, shared.tuning.get().http_patience.quiet).await?,
        false => {
            let whole = try_join_all(answers.into_iter().map(crate::answer::Answer::collect)).await?;
            Json(view.whole(whole.concat(), per_prompt)).into_response()
        }
    };
    if let Ok(id) = HeaderValue::from_str(&call.request_id) {
        response.headers_mut().insert(HeaderName::from_static(REQUEST_ID), id);
    }
    Ok(response)
}

fn view(shared: &Shared, api: Api, call: &Call, common: &Common) -> Result<View, Failure> {
    let (model, facts) = shared.served()?;
    let prefix = match api {
        Api::Chat => "chatcmpl",
        Api::Completion => "cmpl",
    };
    Ok(View {
        api,
        id: format!("{prefix}-{}", call.request_id),
        created: now(),
        model,
        fingerprint: format!(
            "fp_{VERSION}_{}",
            facts.config_hash.get(..FINGERPRINT_DIGITS).unwrap_or(&facts.config_hash)
        ),
        eos_token_ids: facts.eos_token_ids.clone(),
        tokenizer: shared.text.as_ref().map(|text| Arc::clone(text.tokenizer())),
        shown: common.shown,
        logprobs: common.logprobs,
    })
}

fn call(parts: &Parts, request_id: &str) -> Result<Call, Failure> {
    Call::new(&MetadataMap::from_headers(parts.headers.clone()), &parts.extensions, request_id)
}

/// The head of a request and what `take` makes of its fields, with the text of the served checkpoint: on a thread that may
/// block when the body is long.
async fn read<T: Send + 'static>(
    shared: &Shared,
    request: Request,
    take: impl FnOnce(Fields, Option<&Text>) -> Result<T, ApiError> + Send + 'static,
) -> Result<(Parts, T), ApiError> {
    let (parts, body) = receive(shared, request).await?;
    if body.len() <= JSON_IN_PLACE_BYTES_MAX {
        return Ok((parts, take(Fields::read(&body)?, shared.text.as_ref())?));
    }
    let text = shared.text.clone();
    let work = tokio::task::spawn_blocking(move || take(Fields::read(&body)?, text.as_ref()));
    let taken = work.await.unwrap_or_else(|error| {
        Err(Failure::Internal { why: format!("reading the body failed: {error}") }.into())
    });
    Ok((parts, taken?))
}

/// The head and body of a request.
async fn receive(shared: &Shared, request: Request) -> Result<(Parts, Bytes), ApiError> {
    let patience = shared.tuning.get().http_patience.body;
    let (parts, body) = request.into_parts();
    if let Some(kind) = parts.headers.get(header::CONTENT_TYPE) {
        let kind = kind.to_str().unwrap_or_default();
        let essence = kind.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            let message = format!("content-type `{kind}` is not supported; send application/json");
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
    }
    let too_large = || {
        let message = format!("the body has more than {MESSAGE_BYTES_MAX} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let length =
        parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if length.is_some_and(|length: u64| length > MESSAGE_BYTES_MAX as u64) {
        return Err(too_large());
    }
    let body = tokio::time::timeout(patience, to_bytes(body, MESSAGE_BYTES_MAX)).await;
    match body {
        Ok(Ok(body)) => Ok((parts, body)),
        // A body of unknown length was read up to the limit, or its connection broke and nobody reads this.
        Ok(Err(_)) => Err(too_large()),
        Err(_) => {
            let message = format!("the body did not arrive within {} s", patience.as_secs_f64());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// Answers that hold a place now, as vLLM names it, those that wait for one, and sequences that went on after the loss of
/// their group.
async fn load(State(context): State<Context>) -> Json<Value> {
    let shared = &context.shared;
    let occupancy = shared.tuning.room().occupancy();
    Json(json!({
        "server_load": occupancy.taken, "waiting": occupancy.waiting, "resumed": shared.groups.resumed(),
    }))
}

/// What this router counts, for Prometheus.
async fn metrics_page(State(context): State<Context>, headers: HeaderMap) -> impl IntoResponse {
    let shared = &context.shared;
    let page = shared.metrics.render(shared.tuning.room().occupancy(), &shared.groups.views());
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let (form, page) = proto::exposed(page, accept);
    ([(header::CONTENT_TYPE, form)], page)
}

async fn livez() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

async fn startupz(State(context): State<Context>) -> Json<Value> {
    let (phase, percent) = context.shared.groups.progress().describe();
    Json(json!({ "phase": phase, "percent": percent }))
}

async fn readyz(State(context): State<Context>) -> (StatusCode, Json<Value>) {
    if context.shared.withdrawn.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "phase": "draining", "percent": 0 })));
    }
    let progress = context.shared.groups.progress();
    let code = match progress {
        Progress::Serving => StatusCode::OK,
        Progress::Phase(..) | Progress::Unreachable(_) | Progress::Withheld => {
            StatusCode::SERVICE_UNAVAILABLE
        }
    };
    let (phase, percent) = progress.describe();
    (code, Json(json!({ "phase": phase, "percent": percent })))
}

async fn version() -> Json<Value> {
    Json(json!({ "version": VERSION }))
}

/// OpenAI's list form; empty until a group has said what it serves.
async fn models(State(context): State<Context>) -> Json<Value> {
    let data: Vec<Value> = context.model().into_iter().collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn model(State(context): State<Context>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let (name, _) = context.shared.served()?;
    match context.model().filter(|_| id == name) {
        Some(model) => Ok(Json(model)),
        None => Err(Failure::UnknownModel { asked: id, served: vec![name] }.into()),
    }
}

impl Context {
    fn model(&self) -> Option<Value> {
        let (name, facts) = self.shared.served().ok()?;
        Some(json!({
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "cohort",
            "max_model_len": facts.context_tokens_max,
        }))
    }
}
