//! The gRPC service `cohort.v1.Cohort`.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use proto::v1::cohort_server::Cohort;
use proto::worker::GetActivityRequest;
use proto::{Failure, Prompt, v1};
use tonic::{Request, Response, Status};
use types::TokenId;

use crate::answer::Answer;
use crate::call::Call;
use crate::pipeline::Shared;
use crate::workers::in_time;

/// The version in `GetModelInfo` and `/version`.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Longest wait for a group to say what it did: it answers between two steps.
const ACTIVITY_PATIENCE: Duration = Duration::from_secs(5);

/// Answers the calls; all state is shared.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    shared: Arc<Shared>,
}

impl Service {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    async fn tokenize(&self, request: v1::TokenizeRequest) -> Result<v1::TokenizeResponse, Failure> {
        let permit = self.shared.permit()?;
        self.shared.text("Tokenize")?;
        let (rendered, ids) = self.shared.tokenize(Prompt::try_from(request.prompt)?, &permit).await?;
        Ok(v1::TokenizeResponse { token_ids: ids.into_iter().map(|id| id.0).collect(), rendered })
    }

    async fn detokenize(&self, request: v1::DetokenizeRequest) -> Result<v1::DetokenizeResponse, Failure> {
        let permit = self.shared.permit()?;
        let text = self.shared.text("Detokenize")?;
        let ids: Vec<TokenId> = request.token_ids.into_iter().map(TokenId).collect();
        let (_, facts) = self.shared.served()?;
        facts.check_ids("token_ids", &ids)?;
        Ok(v1::DetokenizeResponse { text: text.detokenize(ids, request.keep_special_tokens, permit).await? })
    }

    fn model_info(&self) -> Result<v1::GetModelInfoResponse, Failure> {
        let (model, facts) = self.shared.served()?;
        let (groups, ready) = self.shared.groups.counts();
        let text = self.shared.text.as_ref();
        Ok(v1::GetModelInfoResponse {
            model,
            vocab_size: facts.vocab_size,
            context_tokens_max: facts.context_tokens_max,
            eos_token_ids: facts.eos_token_ids.clone(),
            text: text.is_some(),
            chat: text.is_some_and(crate::text::Text::has_template),
            dtype: facts.dtype.clone(),
            tensor_parallel: facts.tensor_parallel,
            groups: u32::try_from(groups).unwrap_or(u32::MAX),
            groups_ready: u32::try_from(ready).unwrap_or(u32::MAX),
            version: VERSION.to_owned(),
        })
    }

    /// What the ranks of every ready group have said to each other so far; groups that do not answer are left out.
    async fn activity(&self) -> Vec<v1::GroupActivity> {
        let mut told = Vec::new();
        for group in self.shared.groups.ready() {
            match in_time(ACTIVITY_PATIENCE, group.client().get_activity(GetActivityRequest {})).await {
                Ok(answer) => told.push(summed(group.address(), &answer.into_inner())),
                Err(status) => {
                    tracing::warn!(group = group.address(), %status, "a group does not say what it did")
                }
            }
        }
        told
    }
}

/// A group's activity over all its ranks. Ranks of one sub-group compute the same tokens, so those are counted once.
fn summed(address: &str, group: &proto::worker::GroupActivity) -> v1::GroupActivity {
    let all = || group.ranks.iter().flat_map(|rank| &rank.collectives);
    v1::GroupActivity {
        address: address.to_owned(),
        plan: group.plan.clone(),
        ranks: u32::try_from(group.ranks.len()).unwrap_or(u32::MAX),
        steps: group.ranks.first().map_or(0, |rank| rank.steps),
        tokens: group.tokens,
        calls: all().map(|of| of.calls).sum(),
        messages_sent: all().map(|of| of.messages_sent).sum(),
        bytes_sent: all().map(|of| of.bytes_sent).sum(),
    }
}

/// Reads a call's headers; its failure has no id to be labelled with.
fn call<T>(request: &Request<T>, request_id: &str) -> Result<Call, Status> {
    Call::new(request.metadata(), request.extensions(), request_id).map_err(Status::from)
}

/// The answer to a call, labelled with its id either way.
fn respond<T>(call: &Call, result: Result<T, Failure>) -> Result<Response<T>, Status> {
    match result {
        Ok(message) => {
            let mut response = Response::new(message);
            call.label(response.metadata_mut());
            Ok(response)
        }
        Err(failure) => {
            tracing::debug!(request = %call.request_id, %failure, "refused");
            Err(call.status(&failure))
        }
    }
}

/// The messages of an answer, their failures labelled with its call.
pub(crate) struct Messages {
    call: Call,
    /// What came with the head.
    first: Option<Message>,
    rest: BoxStream<'static, Message>,
}

type Message = Result<v1::GenerateResponse, Failure>;

impl Messages {
    /// Waits until a group has taken the request: a first message that comes with that travels with the head of the
    /// answer, and its caller is woken once.
    async fn with_head(call: Call, answer: Answer) -> Self {
        let taken = answer.taken();
        let mut rest = answer.into_stream().boxed();
        let first = tokio::select! {
            biased;
            first = rest.next() => first,
            () = taken.notified() => None,
        };
        Self { call, first, rest }
    }
}

impl Stream for Messages {
    type Item = Result<v1::GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let message = match self.first.take() {
            Some(first) => Some(first),
            None => ready!(self.rest.poll_next_unpin(cx)),
        };
        Poll::Ready(message.map(|message| message.map_err(|failure| self.call.status(&failure))))
    }
}

/// The answers in one message: the first with the others in it.
fn as_one(answers: Vec<v1::GenerateOnceResponse>) -> v1::GenerateOnceResponse {
    let mut answers = answers.into_iter();
    let first = answers.next().unwrap_or_default();
    v1::GenerateOnceResponse { others: answers.collect(), ..first }
}

#[tonic::async_trait]
impl Cohort for Service {
    type GenerateStream = Messages;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Messages>, Status> {
        let mut call = call(&request, &request.get_ref().request_id)?;
        call.trail.streams(true);
        let messages = match self.shared.generate(call.clone(), request.into_inner()).await {
            Ok(answer) => Ok(Messages::with_head(call.clone(), answer).await),
            Err(failure) => Err(failure),
        };
        respond(&call, messages)
    }

    async fn generate_once(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::GenerateOnceResponse>, Status> {
        let call = call(&request, &request.get_ref().request_id)?;
        let result = match self.shared.generate(call.clone(), request.into_inner()).await {
            Ok(answer) => answer.collect().await.map(as_one),
            Err(failure) => Err(failure),
        };
        respond(&call, result)
    }

    async fn get_model_info(
        &self,
        request: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        respond(&call(&request, "")?, self.model_info())
    }

    async fn get_activity(
        &self,
        request: Request<v1::GetActivityRequest>,
    ) -> Result<Response<v1::GetActivityResponse>, Status> {
        let call = call(&request, "")?;
        let permit = self.shared.permit();
        let groups = match permit {
            Ok(_permit) => Ok(self.activity().await),
            Err(failure) => Err(failure),
        };
        respond(&call, groups.map(|groups| v1::GetActivityResponse { groups }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let call = call(&request, "")?;
        let result = call.within(self.tokenize(request.into_inner())).await;
        respond(&call, result)
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let call = call(&request, "")?;
        let result = call.within(self.detokenize(request.into_inner())).await;
        respond(&call, result)
    }
}
