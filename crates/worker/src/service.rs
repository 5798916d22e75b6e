//! The leader's gRPC service: checks a request, hands it to the engine thread, streams what comes back.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use engine::{PrefixReuse, RequestOptions};
use futures::{Stream, StreamExt};
use proto::worker::worker_server::Worker;
use proto::worker::{
    AcknowledgeRequest, AcknowledgeResponse, CancelRequest, CancelResponse, GenerateChunk, GenerateRequest,
    GetActivityRequest, GetStepsRequest, GroupActivity, StepRecords, WatchRequest, WorkerState,
};
use proto::{Failure, GenerationFields, Phase, RETRY_AFTER, Violation};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use trace::{Kind, Parent, Span, TRACEPARENT, TRACESTATE};
use types::{GenerationSpec, Priority, TokenId};

use crate::activity::Plan;
use crate::flight::{FlightRecorder, STEPS_KEPT};
use crate::guide::{Guidance, Guide, Kitchen};
use crate::inbox::{Asker, Inbox, Message, Submission};
use crate::metrics::{Asked, Metered, Metrics};
use crate::state::{StatePublisher, Watching};
use crate::{activity, chunk};

/// What the service knows.
pub(crate) struct Service {
    pub(crate) inbox: Inbox,
    pub(crate) state: Arc<StatePublisher>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) flight: Arc<FlightRecorder>,
    /// The group's.
    pub(crate) plan: Plan,
    pub(crate) kitchen: Arc<Kitchen>,
    /// Ends the watch streams, which otherwise would keep the server from closing.
    pub(crate) closing: CancellationToken,
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    /// The group's state, when it serves.
    fn serving(&self) -> Result<WorkerState, Failure> {
        let state = self.state.subscribe().borrow().clone();
        let phase = Phase::from_wire(state.phase).unwrap_or(Phase::Starting);
        match phase {
            Phase::Serving => Ok(state),
            Phase::Starting | Phase::Loading | Phase::Warming | Phase::Draining => {
                Err(Failure::NotServing { phase, percent: state.percent, retry_after: RETRY_AFTER })
            }
        }
    }
}

#[tonic::async_trait]
impl Worker for Service {
    type WatchStream = Boxed<WorkerState>;
    type GenerateStream = Metered<ReceiverStream<Result<GenerateChunk, Status>>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let router = &request.get_ref().router_id;
        tracing::info!(%router, "a router watches this group");
        let watching = self.state.watched_by(router);
        let closed = self.closing.clone().cancelled_owned();
        let states = WatchStream::new(self.state.subscribe()).map(move |state| {
            // It ends with the stream, and that with the router or its connection.
            let _: &Watching = &watching;
            Ok(state)
        });
        let states = states.take_until(closed);
        Ok(Response::new(Box::pin(states)))
    }

    async fn acknowledge(
        &self,
        request: Request<AcknowledgeRequest>,
    ) -> Result<Response<AcknowledgeResponse>, Status> {
        let AcknowledgeRequest { router_id, refusal } = request.into_inner();
        self.state.acknowledged(&router_id, &refusal);
        Ok(Response::new(AcknowledgeResponse {}))
    }

    async fn get_activity(
        &self,
        _request: Request<GetActivityRequest>,
    ) -> Result<Response<GroupActivity>, Status> {
        self.serving()?;
        let (asker, told) = oneshot::channel();
        self.inbox.ask(Message::Activity(asker))?;
        let dropped = || Failure::Unavailable {
            why: "the group is stopping, or many callers ask for its activity".into(),
            retry_after: RETRY_AFTER,
        };
        let ranks = told.await.map_err(|_| dropped())?;
        Ok(Response::new(activity::wire(&self.plan, &ranks)))
    }

    /// Reads what is recorded, without the engine's thread: also while that is stuck, or has not begun.
    async fn get_steps(&self, request: Request<GetStepsRequest>) -> Result<Response<StepRecords>, Status> {
        let last = match request.into_inner().last {
            0 => STEPS_KEPT,
            last => last as usize,
        };
        Ok(Response::new(StepRecords { steps: self.flight.last(last) }))
    }

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let timeout = proto::timeout(request.metadata())?;
        let span = span(request.metadata());
        let mut request = request.into_inner();
        let facts = self.serving()?.model.unwrap_or_default();
        let vocab_size = facts.vocab_size;
        let Some(generation) = request.generation.take() else {
            return Err(Failure::from(Violation::new("generation", "is missing")).into());
        };
        let guide = request.guide.take().unwrap_or_default();
        let guided = !guide.grammar.is_empty();
        let generation = GenerationSpec { guided, ..GenerationSpec::from(generation) }
            .validate(0, vocab_size)
            .map_err(|error| GenerationFields::Worker.refuse(error))?;
        let key = request.key;
        let asker = Asker { request: std::mem::take(&mut request.request_id).into(), span, counted: true };
        let asked = Asked {
            asker: asker.clone(),
            prompt_tokens: request.prompt.len(),
            max_tokens: generation.max_tokens(),
            sequences: generation.sequences(),
        };
        let guidance = self.kitchen.guidance(guide, facts).await?;
        let (sink, stream) = mpsc::channel(chunk::messages_max(request.prompt.len(), &generation));
        let request = engine::Request {
            options: options(&request)?,
            prompt: request.prompt.into_iter().map(TokenId).collect(),
            generation,
            deadline: None,
        };
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let guides = guidance.map_or_else(|| Ok(Vec::new()), |guidance| guides(&guidance, &request))?;
        self.inbox
            .submit(Submission { request, deadline, sink, key, guides, asker })
            .inspect_err(|failure| self.metrics.rejected(failure))?;
        Ok(Response::new(Metered::new(ReceiverStream::new(stream), Arc::clone(&self.metrics), asked)))
    }

    async fn cancel(&self, request: Request<CancelRequest>) -> Result<Response<CancelResponse>, Status> {
        let CancelRequest { key, index } = request.into_inner();
        self.inbox.cancel(key, index);
        Ok(Response::new(CancelResponse {}))
    }
}

/// The span of a request, when the router says that it is traced.
fn span(headers: &MetadataMap) -> Span {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match Parent::read(text(TRACEPARENT), text(TRACESTATE)).filter(Parent::is_sampled) {
        Some(parent) => Span::begin("generate", Kind::Server, Some(&parent)),
        None => Span::none(),
    }
}

/// A guide for each sequence of a request, behind what was generated already.
fn guides(guidance: &Guidance, request: &engine::Request) -> Result<Vec<Guide>, Failure> {
    let resumed = &request.options.resume_tokens;
    let refuse = |error: grammar::Error| Violation::new("resume_tokens", error.to_string()).into();
    (0..request.generation.sequences()).map(|_| guidance.resume(resumed).map_err(refuse)).collect()
}

/// What a request says beside its prompt and generation.
fn options(request: &GenerateRequest) -> Result<RequestOptions, Failure> {
    let priority =
        Priority::new(request.priority).map_err(|error| Violation::new("priority", error.to_string()))?;
    let reuse = match (request.bypass_prefix_cache, request.cache_salt.as_slice()) {
        (false, []) => PrefixReuse::Open,
        (true, []) => PrefixReuse::Bypass,
        (true, _) => return Err(Violation::new("cache_salt", "is set, and so is bypass_prefix_cache").into()),
        (false, salt) => {
            let wrong =
                |_| Violation::new("cache_salt", format!("has {} bytes; it must have 16", salt.len()));
            PrefixReuse::Salted(u128::from_le_bytes(salt.try_into().map_err(wrong)?))
        }
    };
    let resume_tokens = request.resume_tokens.iter().copied().map(TokenId).collect();
    Ok(RequestOptions { priority, reuse, resume_tokens, first_stream: request.first_stream })
}
