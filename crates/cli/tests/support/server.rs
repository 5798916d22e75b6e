//! A server of the public API whose answers a test gives, message by message.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use proto::v1;
use proto::v1::cohort_server::{Cohort, CohortServer};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Server as Transport;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Longest wait for a client.
const PATIENCE: Duration = Duration::from_secs(30);

type Message = Result<v1::GenerateResponse, Status>;

/// A running server.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    runtime: Runtime,
    asked: Mutex<mpsc::UnboundedReceiver<Asked>>,
}

/// A request that waits for its answer.
pub(crate) struct Asked {
    request: v1::GenerateRequest,
    give: mpsc::UnboundedSender<Message>,
    runtime: Handle,
}

impl Server {
    pub(crate) fn start() -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let (ask, asked) = mpsc::unbounded_channel();
        let service = CohortServer::new(Answering(ask));
        runtime.spawn(async move {
            Transport::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener)).await
        });
        Self { address, runtime, asked: Mutex::new(asked) }
    }

    /// The next request.
    pub(crate) fn asked(&self) -> Asked {
        let mut asked = self.asked.lock().unwrap();
        in_time(self.runtime.handle(), asked.recv()).unwrap()
    }
}

impl Asked {
    pub(crate) fn request(&self) -> &v1::GenerateRequest {
        &self.request
    }

    /// Sends a message of the answer.
    pub(crate) fn send(&self, message: v1::GenerateResponse) {
        self.give.send(Ok(message)).unwrap();
    }

    /// Ends the answer.
    pub(crate) fn end(self) {}

    /// Ends the answer with a failure.
    pub(crate) fn fail(self, why: &str) {
        self.give.send(Err(Status::aborted(why))).unwrap();
    }

    /// Waits until the client has left.
    pub(crate) fn left(self) {
        in_time(&self.runtime, self.give.closed());
    }
}

fn in_time<T>(runtime: &Handle, work: impl Future<Output = T>) -> T {
    runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await.expect("nothing came") })
}

struct Answering(mpsc::UnboundedSender<Asked>);

#[tonic::async_trait]
impl Cohort for Answering {
    type GenerateStream = UnboundedReceiverStream<Message>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (give, take) = mpsc::unbounded_channel();
        let asked = Asked { request: request.into_inner(), give, runtime: Handle::current() };
        self.0.send(asked).map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(UnboundedReceiverStream::new(take)))
    }

    async fn generate_once(
        &self,
        _: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::GenerateOnceResponse>, Status> {
        Err(Status::unimplemented("only streams are answered"))
    }

    async fn get_model_info(
        &self,
        _: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        Err(Status::unimplemented("only streams are answered"))
    }

    async fn get_activity(
        &self,
        _: Request<v1::GetActivityRequest>,
    ) -> Result<Response<v1::GetActivityResponse>, Status> {
        Err(Status::unimplemented("only streams are answered"))
    }

    async fn tokenize(
        &self,
        _: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        Err(Status::unimplemented("only streams are answered"))
    }

    async fn detokenize(
        &self,
        _: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        Err(Status::unimplemented("only streams are answered"))
    }
}
