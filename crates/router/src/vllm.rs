//! The API of vLLM's gRPC server over the same pipeline: `vllm.Inference` and what of `vllm.Control` applies to a
//! router.

mod request;
mod response;

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use proto::vllm::control_server::Control as ControlService;
use proto::vllm::inference_server::Inference as InferenceService;
use proto::{Failure, Prompt, Violation, v1, vllm};
use tonic::{Request, Response, Status};

use crate::answer::Answer;
use crate::call::{Call, random_u64};
use crate::pipeline::Shared;
use crate::service::VERSION;

use request::Asked;
use response::View;

/// The schema that `proto/vllm` follows.
const SCHEMA_VERSION: &str = "0.6.0";

/// `vllm.Inference`.
#[derive(Debug, Clone)]
pub(crate) struct Inference {
    shared: Arc<Shared>,
}

impl Inference {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The answers to a request as they come, and how they are shown.
    async fn start(&self, call: &Call, request: vllm::GenerateRequest) -> Result<(Answer, View), Failure> {
        let Asked { mut request, truncate, shown } = Asked::try_from(request)?;
        let (_, facts) = self.shared.served()?;
        if let Some(most) = truncate {
            request.prompt = Some(self.truncated(call, request.prompt, most).await?);
        }
        let answer = self.shared.generate(call.clone(), request).await.map_err(request::renamed)?;
        Ok((answer, View::new(shown, facts.eos_token_ids.clone())))
    }

    /// The last `most` tokens of a prompt.
    async fn truncated(
        &self,
        call: &Call,
        prompt: Option<v1::generate_request::Prompt>,
        most: usize,
    ) -> Result<v1::generate_request::Prompt, Failure> {
        let permit = self.shared.permit()?;
        let prompt = Prompt::try_from(prompt).map_err(request::renamed)?;
        let (_, ids) = call.within(self.shared.tokenize(prompt, &permit)).await?;
        let from = ids.len().saturating_sub(most);
        let ids = ids[from..].iter().map(|id| id.0).collect();
        Ok(v1::generate_request::Prompt::TokenIds(v1::TokenIds { ids }))
    }
}

fn call<T>(request: &Request<T>, request_id: &str) -> Result<Call, Status> {
    Call::new(request.metadata(), request.extensions(), request_id).map_err(Status::from)
}

fn respond<T>(call: &Call, result: Result<T, Failure>) -> Result<Response<T>, Status> {
    match result {
        Ok(message) => {
            let mut response = Response::new(message);
            call.label(response.metadata_mut());
            Ok(response)
        }
        Err(failure) => Err(call.status(&failure)),
    }
}

#[tonic::async_trait]
impl InferenceService for Inference {
    type GenerateStreamStream = Pin<Box<dyn Stream<Item = Result<vllm::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<vllm::GenerateRequest>,
    ) -> Result<Response<vllm::GenerateResponse>, Status> {
        let call = call(&request, &request.get_ref().request_id)?.listed(&self.shared.running);
        let request = request.into_inner();
        if request.sampling.is_some_and(|sampling| sampling.num_sequences > 1) {
            let reason = "must be 0 or 1 here; GenerateStream takes more";
            return Err(call.status(&Violation::new("sampling.num_sequences", reason).into()));
        }
        let result = async {
            let (answer, mut view) = self.start(&call, request).await?;
            // An aborted request is answered with what there was.
            let mut messages = Box::pin(answer.into_stream());
            let mut whole = v1::GenerateResponse::default();
            while let Some(message) = messages.next().await {
                match message {
                    Ok(message) => response::append(&mut whole, message),
                    Err(Failure::Cancelled) => return Ok(view.aborted(whole)),
                    Err(failure) => return Err(failure),
                }
            }
            Ok(view.message(whole))
        };
        respond(&call, result.await)
    }

    async fn generate_stream(
        &self,
        request: Request<vllm::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let mut call = call(&request, &request.get_ref().request_id)?.listed(&self.shared.running);
        call.trail.streams(true);
        let result = self.start(&call, request.into_inner()).await;
        let labelled = call.clone();
        let stream = result.map(|(answer, mut view)| {
            let messages = answer.into_stream().flat_map(move |message| {
                futures::stream::iter(match message {
                    Ok(message) => vec![Ok(view.message(message))],
                    Err(Failure::Cancelled) => view.aborted_all().into_iter().map(Ok).collect(),
                    Err(failure) => vec![Err(labelled.status(&failure))],
                })
            });
            Box::pin(messages) as Self::GenerateStreamStream
        });
        respond(&call, stream)
    }
}

/// `vllm.Control`.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    shared: Arc<Shared>,
    instance: String,
}

impl Control {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, instance: format!("{:016x}", random_u64()) }
    }

    fn server_info(&self) -> Result<vllm::ServerInfo, Failure> {
        let (_, facts) = self.shared.served()?;
        let (groups, _) = self.shared.groups.counts();
        let groups = u32::try_from(groups).unwrap_or(u32::MAX);
        Ok(vllm::ServerInfo {
            engine_version: VERSION.to_owned(),
            api_version: "v1".to_owned(),
            instance_id: self.instance.clone(),
            parallelism: Some(vllm::ParallelismInfo {
                tensor_parallel_size: facts.tensor_parallel,
                pipeline_parallel_size: 1,
                data_parallel_size: groups,
                decode_context_parallel_size: 1,
                world_size: u64::from(groups) * u64::from(facts.tensor_parallel),
                data_parallel_size_local: groups,
                ..vllm::ParallelismInfo::default()
            }),
            max_model_len: facts.context_tokens_max,
            max_running_requests: u64::from(self.shared.tuning.get().limits.requests_max),
            rl_capabilities: Some(vllm::RlCapabilities::default()),
            total_kv_blocks: self.shared.groups.kv_blocks(),
            proto_version: SCHEMA_VERSION.to_owned(),
            ..vllm::ServerInfo::default()
        })
    }

    fn model_info(&self) -> Result<vllm::ModelInfo, Failure> {
        let (served_model_name, facts) = self.shared.served()?;
        Ok(vllm::ModelInfo {
            model_id: facts.name.clone(),
            served_model_name,
            supports_text_input: self.shared.text.is_some(),
            supports_token_ids_input: true,
            ..vllm::ModelInfo::default()
        })
    }
}

#[tonic::async_trait]
impl ControlService for Control {
    async fn get_server_info(
        &self,
        request: Request<vllm::GetServerInfoRequest>,
    ) -> Result<Response<vllm::ServerInfo>, Status> {
        respond(&call(&request, "")?, self.server_info())
    }

    async fn get_model_info(
        &self,
        request: Request<vllm::GetModelInfoRequest>,
    ) -> Result<Response<vllm::ModelInfo>, Status> {
        respond(&call(&request, "")?, self.model_info())
    }

    async fn abort(
        &self,
        request: Request<vllm::AbortRequest>,
    ) -> Result<Response<vllm::AbortResponse>, Status> {
        let call = call(&request, "")?;
        let ended = request.get_ref().request_ids.iter().map(|id| self.shared.running.abort(id));
        let ended: usize = ended.sum();
        tracing::info!(ended, "asked to end requests");
        respond(&call, Ok(vllm::AbortResponse {}))
    }
}
