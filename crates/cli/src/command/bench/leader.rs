//! A leader that computes nothing: what a request costs beside it is the router's part. It has a thread of its own, as a
//! leader is a process of its own: whoever calls it, the generator or a router, has to wake it.

use std::net::SocketAddr;
use std::pin::Pin;
use std::thread;

use anyhow::Context;
use futures::{Stream, StreamExt, stream};
use proto::worker;
use proto::worker::worker_server::{Worker, WorkerServer};
use tokio::net::TcpListener;
use tokio::runtime;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Context the leader claims to have.
const CONTEXT_TOKENS: u32 = 65_536;
/// A token that is text.
const TOKEN: u32 = 300;

/// A running leader.
pub(super) struct NullLeader {
    pub(super) address: SocketAddr,
    release: CancellationToken,
    _stop: DropGuard,
}

/// Answers every request at once. With `ignore_eos`, what it answers is held back after the first token until
/// [`NullLeader::release`].
#[derive(Debug, Clone)]
struct Service {
    facts: worker::ModelFacts,
    release: CancellationToken,
}

impl NullLeader {
    pub(super) fn start(vocab_size: u32) -> anyhow::Result<Self> {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).context("listen for the router")?;
        listener.set_nonblocking(true).context("listen for the router")?;
        let address = listener.local_addr()?;
        let facts = worker::ModelFacts {
            name: "null".to_owned(),
            vocab_size,
            context_tokens_max: CONTEXT_TOKENS,
            dtype: "none".to_owned(),
            tensor_parallel: 1,
            config_hash: "null".to_owned(),
            ..worker::ModelFacts::default()
        };
        let (release, stop) = (CancellationToken::new(), CancellationToken::new());
        let service = Service { facts, release: release.clone() };
        let runtime =
            runtime::Builder::new_current_thread().enable_all().build().context("start the null leader")?;
        let served = stop.clone().run_until_cancelled_owned(serve(listener, service));
        let work = move || {
            if let Some(Err(error)) = runtime.block_on(served) {
                tracing::warn!(%error, "the null leader ended");
            }
        };
        thread::Builder::new().name("null-leader".to_owned()).spawn(work).context("start the null leader")?;
        Ok(Self { address, release, _stop: stop.drop_guard() })
    }

    /// Lets every answer that is held back go on to its end.
    pub(super) fn release(&self) {
        self.release.cancel();
    }
}

async fn serve(listener: std::net::TcpListener, service: Service) -> anyhow::Result<()> {
    let incoming = TcpIncoming::from(TcpListener::from_std(listener)?).with_nodelay(Some(true));
    Ok(Server::builder().add_service(WorkerServer::new(service)).serve_with_incoming(incoming).await?)
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Worker for Service {
    type WatchStream = Boxed<worker::WorkerState>;
    type GenerateStream = Boxed<worker::GenerateChunk>;

    async fn watch(&self, _: Request<worker::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let state = worker::WorkerState {
            phase: worker::Phase::Serving.into(),
            percent: 100,
            model: Some(self.facts.clone()),
            ..worker::WorkerState::default()
        };
        let states = stream::once(async { Ok(state) }).chain(stream::pending());
        Ok(Response::new(Box::pin(states)))
    }

    async fn acknowledge(
        &self,
        _: Request<worker::AcknowledgeRequest>,
    ) -> Result<Response<worker::AcknowledgeResponse>, Status> {
        Ok(Response::new(worker::AcknowledgeResponse {}))
    }

    /// Nothing: it computes nothing.
    async fn get_activity(
        &self,
        _: Request<worker::GetActivityRequest>,
    ) -> Result<Response<worker::GroupActivity>, Status> {
        Ok(Response::new(worker::GroupActivity::default()))
    }

    async fn get_steps(
        &self,
        _: Request<worker::GetStepsRequest>,
    ) -> Result<Response<worker::StepRecords>, Status> {
        Ok(Response::new(worker::StepRecords::default()))
    }

    async fn generate(
        &self,
        request: Request<worker::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let generation = request.into_inner().generation.unwrap_or_default();
        let tokens = generation.max_tokens.unwrap_or(1).max(1);
        let from = move |first: u32| stream::iter((first..=tokens).map(move |at| Ok(chunk(at == tokens))));
        if !generation.ignore_eos {
            return Ok(Response::new(Box::pin(from(1))));
        }
        let release = self.release.clone();
        let held = stream::once(release.cancelled_owned()).flat_map(move |()| from(2));
        Ok(Response::new(Box::pin(stream::iter([Ok(chunk(false))]).chain(held))))
    }

    /// Without effect: the router asks for one answer, and leaves it by dropping the stream.
    async fn cancel(
        &self,
        _: Request<worker::CancelRequest>,
    ) -> Result<Response<worker::CancelResponse>, Status> {
        Ok(Response::new(worker::CancelResponse {}))
    }
}

fn chunk(last: bool) -> worker::GenerateChunk {
    let finish = last.then(|| worker::Finish { reason: worker::FinishReason::Length.into(), token_id: None });
    worker::GenerateChunk { token_ids: vec![TOKEN], finish, ..worker::GenerateChunk::default() }
}
