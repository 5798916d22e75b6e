//! A scripted leader, a router in front of it, and what both need.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::Stream;
use proto::v1::cohort_client::CohortClient;
use proto::worker::worker_server::{Worker, WorkerServer};
use proto::{Failure, Phase, v1, worker};
use router::text::Tokenizer;
use router::{Bound, Change, Config, Limits, ModelFiles, Start};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

pub(crate) const VOCAB: u32 = 4096;
pub(crate) const CONTEXT: u32 = 64;
pub(crate) const EOS: u32 = 9;
/// Longer than anything here takes; reached only when something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Fails the test instead of hanging it.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("this should not take so long")
}

pub(crate) fn demo_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/assets/demo")
}

pub(crate) fn demo_files() -> ModelFiles {
    ModelFiles::read_dir(&demo_dir()).unwrap()
}

pub(crate) fn demo_tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(&demo_files().tokenizer_json.unwrap()).unwrap()
}

/// The token ids of `text` without BOS.
pub(crate) fn ids(text: &str) -> Vec<u32> {
    demo_tokenizer().encode(text, false).unwrap().into_iter().map(|id| id.0).collect()
}

/// A small generator for tests (SplitMix64); its seed is printed by whoever makes one.
pub(crate) struct Random(u64);

impl Random {
    #[allow(clippy::print_stdout, reason = "a failing test must say what it drew from")]
    pub(crate) fn seeded(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((x ^ (x >> 31)) % bound as u64).unwrap()
    }
}

pub(crate) fn facts(name: &str) -> worker::ModelFacts {
    worker::ModelFacts {
        name: name.to_owned(),
        vocab_size: VOCAB,
        context_tokens_max: CONTEXT,
        eos_token_ids: vec![EOS],
        dtype: "float32".to_owned(),
        tensor_parallel: 2,
        config_hash: "abc".to_owned(),
    }
}

pub(crate) fn state(phase: Phase, percent: u32, model: Option<worker::ModelFacts>) -> worker::WorkerState {
    worker::WorkerState {
        phase: worker::Phase::from(phase).into(),
        percent,
        model,
        ..worker::WorkerState::default()
    }
}

pub(crate) fn chunk(token_ids: &[u32]) -> worker::GenerateChunk {
    worker::GenerateChunk { token_ids: token_ids.to_vec(), ..worker::GenerateChunk::default() }
}

pub(crate) fn last(
    token_ids: &[u32],
    reason: worker::FinishReason,
    token_id: Option<u32>,
) -> worker::GenerateChunk {
    let finish = Some(worker::Finish { reason: reason.into(), token_id });
    worker::GenerateChunk { finish, ..chunk(token_ids) }
}

/// The same chunk of another sequence.
pub(crate) fn of(index: u32, chunk: worker::GenerateChunk) -> worker::GenerateChunk {
    worker::GenerateChunk { index, ..chunk }
}

/// One token a chunk, then EOS.
pub(crate) fn answer(text: &str) -> Vec<worker::GenerateChunk> {
    let mut chunks: Vec<worker::GenerateChunk> = ids(text).iter().map(|&id| chunk(&[id])).collect();
    chunks.push(last(&[EOS], worker::FinishReason::Eos, Some(EOS)));
    chunks
}

/// A request as it reached a leader. Sending on `chunks` answers it; `chunks.closed()` is its cancellation.
pub(crate) struct Open {
    pub(crate) request: worker::GenerateRequest,
    pub(crate) headers: MetadataMap,
    pub(crate) chunks: mpsc::Sender<Result<worker::GenerateChunk, Status>>,
}

impl Open {
    pub(crate) fn sequences(&self) -> u32 {
        self.request.generation.as_ref().unwrap().n.unwrap()
    }

    pub(crate) async fn play(&self, script: Vec<worker::GenerateChunk>) {
        for chunk in script {
            if self.chunks.send(Ok(chunk)).await.is_err() {
                return;
            }
        }
    }
}

/// What a leader does before its first chunk.
#[derive(Default)]
struct Refusal {
    with: Mutex<Option<Failure>>,
    given: Notify,
    /// What routers say that many times more is not heard.
    words_missed: AtomicUsize,
}

struct Service {
    states: watch::Receiver<worker::WorkerState>,
    opened: mpsc::UnboundedSender<Open>,
    cancelled: mpsc::UnboundedSender<worker::CancelRequest>,
    acknowledged: mpsc::UnboundedSender<String>,
    refusal: Arc<Refusal>,
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Worker for Service {
    type WatchStream = Boxed<worker::WorkerState>;
    type GenerateStream = Boxed<worker::GenerateChunk>;

    async fn watch(&self, _: Request<worker::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let states = futures::StreamExt::map(WatchStream::new(self.states.clone()), Ok);
        Ok(Response::new(Box::pin(states)))
    }

    async fn acknowledge(
        &self,
        request: Request<worker::AcknowledgeRequest>,
    ) -> Result<Response<worker::AcknowledgeResponse>, Status> {
        let deaf = |left: usize| left.checked_sub(1);
        if self.refusal.words_missed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, deaf).is_ok() {
            return Err(Status::unavailable("it has not heard"));
        }
        // Nobody may care.
        let _ = self.acknowledged.send(request.into_inner().refusal);
        Ok(Response::new(worker::AcknowledgeResponse {}))
    }

    async fn get_activity(
        &self,
        _: Request<worker::GetActivityRequest>,
    ) -> Result<Response<worker::GroupActivity>, Status> {
        let all_reduces = worker::CollectiveActivity {
            operation: "all_reduce_sum".to_owned(),
            calls: 50,
            messages_sent: 100,
            bytes_sent: 1000,
            bytes_received: 1000,
            seconds: 0.5,
        };
        let rank =
            worker::RankActivity { steps: 7, rows: 9, collectives: vec![all_reduces], ..Default::default() };
        let ranks = vec![rank.clone(), rank];
        Ok(Response::new(worker::GroupActivity {
            plan: "tensor=2".to_owned(),
            ranks,
            layers: Vec::new(),
            tokens: 9,
        }))
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
        if let Some(failure) = self.refusal.with.lock().unwrap().clone() {
            self.refusal.given.notify_one();
            return Err(failure.to_status());
        }
        let (chunks, stream) = mpsc::channel(1);
        let headers = request.metadata().clone();
        self.opened.send(Open { request: request.into_inner(), headers, chunks }).unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn cancel(
        &self,
        request: Request<worker::CancelRequest>,
    ) -> Result<Response<worker::CancelResponse>, Status> {
        self.cancelled.send(request.into_inner()).unwrap();
        Ok(Response::new(worker::CancelResponse {}))
    }
}

/// The service of a leader that stays as it is and takes no requests.
pub(crate) fn still_leader(first: worker::WorkerState) -> impl Worker {
    let (states, seen) = watch::channel(first);
    // It lives as long as the test.
    std::mem::forget(states);
    let (opened, _) = mpsc::unbounded_channel();
    let (cancelled, _) = mpsc::unbounded_channel();
    let (acknowledged, _) = mpsc::unbounded_channel();
    Service { states: seen, opened, cancelled, acknowledged, refusal: Arc::default() }
}

/// A leader in its own runtime, so that [`Leader::kill`] cuts its connections as the death of a process would.
pub(crate) struct Leader {
    pub(crate) address: String,
    pub(crate) states: watch::Sender<worker::WorkerState>,
    pub(crate) opened: mpsc::UnboundedReceiver<Open>,
    /// Single sequences that were cancelled.
    pub(crate) cancelled: mpsc::UnboundedReceiver<worker::CancelRequest>,
    /// What routers made of it: empty where they use it, else why not.
    pub(crate) acknowledged: mpsc::UnboundedReceiver<String>,
    refusal: Arc<Refusal>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Leader {
    /// One that serves the model `demo`.
    pub(crate) async fn serving() -> Self {
        Self::start(state(Phase::Serving, 100, Some(facts("demo")))).await
    }

    pub(crate) async fn start(first: worker::WorkerState) -> Self {
        Self::start_at(any_port(), first).await
    }

    pub(crate) async fn start_at(address: SocketAddr, first: worker::WorkerState) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (states, states_seen) = watch::channel(first);
        let (opened_at, opened) = mpsc::unbounded_channel();
        let (cancelled_at, cancelled) = mpsc::unbounded_channel();
        let (acknowledged_at, acknowledged) = mpsc::unbounded_channel();
        let refusal = Arc::<Refusal>::default();
        let service = Service {
            states: states_seen,
            opened: opened_at,
            cancelled: cancelled_at,
            acknowledged: acknowledged_at,
            refusal: Arc::clone(&refusal),
        };
        let (tell, told) = oneshot::channel();
        runtime.spawn(async move {
            let listener = TcpListener::bind(address).await.unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            let server = Server::builder().add_service(WorkerServer::new(service));
            server.serve_with_incoming(TcpIncoming::from(listener)).await.unwrap();
        });
        let address = format!("http://{}", soon(told).await.unwrap());
        Self { address, states, opened, cancelled, acknowledged, refusal, runtime: Some(runtime) }
    }

    /// The next request that reaches it.
    pub(crate) async fn next(&mut self) -> Open {
        soon(self.opened.recv()).await.unwrap()
    }

    /// Does not hear the next `words` of routers.
    pub(crate) fn miss(&self, words: usize) {
        self.refusal.words_missed.store(words, Ordering::Relaxed);
    }

    /// Refuses every further request with `failure` before its first chunk.
    pub(crate) fn refuse(&self, failure: Failure) {
        *self.refusal.with.lock().unwrap() = Some(failure);
    }

    /// Takes requests again.
    pub(crate) fn accept(&self) {
        *self.refusal.with.lock().unwrap() = None;
    }

    /// Waits until it has refused a request.
    pub(crate) async fn refused(&self) {
        soon(self.refusal.given.notified()).await;
    }

    /// Ends it without a word; its port is free afterwards.
    pub(crate) async fn kill(&mut self) {
        let runtime = self.runtime.take().unwrap();
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(PATIENCE)).await.unwrap();
    }

    /// Answers every request with `script` from now on, each of its sequences with the same.
    pub(crate) fn play_always(mut self, script: Vec<worker::GenerateChunk>) -> String {
        let address = self.address.clone();
        tokio::spawn(async move {
            while let Some(open) = self.opened.recv().await {
                for index in 0..open.sequences() {
                    open.play(script.iter().map(|chunk| of(index, chunk.clone())).collect()).await;
                }
            }
        });
        address
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A running router; dropping it ends it.
pub(crate) struct TestRouter {
    pub(crate) bound: Bound,
    pub(crate) shutdown: CancellationToken,
    changes: mpsc::Sender<Change>,
    pub(crate) served: JoinHandle<Result<(), router::Error>>,
}

pub(crate) fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

pub(crate) fn config(workers: &[&str]) -> Config {
    Config {
        tracing: router::Tracing::default(),
        grpc_listen: any_port(),
        http_listen: Some(any_port()),
        workers: workers.iter().map(|&address| address.to_owned()).collect(),
        weights: std::collections::BTreeMap::new(),
        names: router::discovery::Names::default(),
        registration_hold: None,
        model_name: None,
        limits: Limits::default(),
        connection_age_max: Duration::ZERO,
        resume_grace: Duration::ZERO,
        http_patience: router::HttpPatience::default(),
        withdraw_grace: Duration::ZERO,
        drain_grace: PATIENCE,
        access: router::Access::default(),
    }
}

impl TestRouter {
    /// With the demo's text files; waits until all of these groups take requests.
    pub(crate) async fn ready(workers: &[&str]) -> Self {
        let router = Self::start(config(workers), demo_files()).await;
        router.wait_for(ServingStatus::Serving).await;
        router.wait_for_groups(workers.len()).await;
        router
    }

    /// Waits until so many groups take requests.
    pub(crate) async fn wait_for_groups(&self, groups: usize) {
        let mut client = self.client().await;
        let ready = |info: v1::GetModelInfoResponse| info.groups_ready as usize == groups;
        while !ready(soon(client.get_model_info(v1::GetModelInfoRequest {})).await.unwrap().into_inner()) {
            tokio::task::yield_now().await;
        }
    }

    pub(crate) async fn start(config: Config, files: ModelFiles) -> Self {
        let shutdown = CancellationToken::new();
        let (tell, told) = oneshot::channel();
        let mut tell = Some(tell);
        let serves = move |start| {
            if let Start::Serving(bound) = start {
                tell.take().unwrap().send(bound).unwrap();
            }
        };
        let (changes, changed) = mpsc::channel(1);
        let files = move || Ok(files);
        let served = tokio::spawn(router::serve_changing(config, files, serves, shutdown.clone(), changed));
        Self { bound: soon(told).await.unwrap(), shutdown, changes, served }
    }

    /// Tells it to go on with another configuration.
    pub(crate) async fn change(&self, config: Config) -> Result<(), router::Error> {
        let (answer, answered) = oneshot::channel();
        self.changes.send(Change { config, answer }).await.unwrap();
        soon(answered).await.unwrap()
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.bound.grpc)).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn client(&self) -> CohortClient<Channel> {
        CohortClient::new(self.channel().await)
    }

    pub(crate) async fn wait_for(&self, wanted: ServingStatus) {
        let mut health = HealthClient::new(self.channel().await);
        let request = HealthCheckRequest { service: "cohort.v1.Cohort".to_owned() };
        let mut states = health.watch(request).await.unwrap().into_inner();
        while soon(states.message()).await.unwrap().unwrap().status() != wanted {}
    }
}

impl Drop for TestRouter {
    fn drop(&mut self) {
        self.served.abort();
    }
}

/// A request to continue these tokens.
pub(crate) fn from_ids(ids: &[u32]) -> v1::GenerateRequest {
    let prompt = v1::generate_request::Prompt::TokenIds(v1::TokenIds { ids: ids.to_vec() });
    v1::GenerateRequest { prompt: Some(prompt), ..v1::GenerateRequest::default() }
}

/// A request to continue this text.
pub(crate) fn from_text(text: &str) -> v1::GenerateRequest {
    let prompt = v1::generate_request::Prompt::Text(text.to_owned());
    v1::GenerateRequest { prompt: Some(prompt), ..v1::GenerateRequest::default() }
}

pub(crate) fn with_stop(request: v1::GenerateRequest, stop: &[&str]) -> v1::GenerateRequest {
    let stop = stop.iter().map(|&text| text.to_owned()).collect();
    v1::GenerateRequest { stopping: Some(v1::Stopping { stop, ..v1::Stopping::default() }), ..request }
}

/// All messages of a stream, or the status it ended with.
pub(crate) async fn all(
    router: &TestRouter,
    request: impl tonic::IntoRequest<v1::GenerateRequest>,
) -> Result<Vec<v1::GenerateResponse>, Status> {
    let mut stream = soon(router.client().await.generate(request)).await?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = soon(stream.message()).await? {
        messages.push(message);
    }
    Ok(messages)
}

/// The failure inside a status.
pub(crate) fn failure(status: &Status) -> Failure {
    Failure::from_status(status).unwrap_or_else(|| panic!("no details in {status:?}"))
}

/// The refused fields of a status.
pub(crate) fn fields(status: &Status) -> Vec<String> {
    match failure(status) {
        Failure::Invalid(wrong) => wrong.into_iter().map(|v| v.field.into_owned()).collect(),
        other => panic!("not a refusal of fields: {other}"),
    }
}
