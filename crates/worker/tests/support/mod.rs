//! A group of ranks on threads of the test, as `cohort worker` would run them, and a client of its leader.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use proto::worker::worker_client::WorkerClient;
use proto::worker::{GenerateChunk, GenerateRequest, Generation};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};
use types::{BlockSize, DType, ExpertSharding, TpRank, TpSize};
use worker::{Config, Device, Error, Limits, Report, Reporter};

/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/assets/demo")
}

/// One rank of a group of `size`, on the demo model, with generous limits.
pub(crate) fn config(rank: u32, size: u32) -> Config {
    let size = TpSize::new(size).unwrap();
    Config {
        model: model::Files::Directory(demo()),
        load_format: worker::LoadFormat::Checkpoint,
        check_numerics: false,
        layers: None,
        model_name: "demo".into(),
        dtype: DType::F32,
        device: Device::Cpu,
        threads: Some(1),
        rank: TpRank::new(rank, size).unwrap(),
        tensor: size,
        expert_placement: None,
        experts: ExpertSharding::Tensor,
        dispatch: types::Dispatch::Replicated,
        rendezvous: ([127, 0, 0, 1], 0).into(),
        leader: None,
        listen: ([127, 0, 0, 1], 0).into(),
        metrics_listen: None,
        limits: Limits {
            block_size: BlockSize::new(16).unwrap(),
            kv_tokens: 8192,
            step_tokens_max: 256,
            running_max: 8,
            waiting_requests_max: 8,
            waiting_tokens_max: 8192,
        },
        window_keys: None,
        boot_timeout: Duration::from_secs(30),
        step_timeout: Duration::from_secs(10),
        fault_dir: None,
        drain_grace: Duration::from_secs(30),
        access: worker::Access::default(),
        routers: worker::Routers::default(),
    }
}

/// One rank of `data` sub-groups of `tensor` ranks, on the demo model, which send rows to whole experts.
pub(crate) fn among(rank: u32, tensor: u32, data: u32) -> Config {
    let tensor_size = TpSize::new(tensor).unwrap();
    let (experts, dispatch) = (ExpertSharding::Expert, types::Dispatch::AllToAll);
    Config { tensor: tensor_size, experts, dispatch, ..config(rank, tensor * data) }
}

/// A running rank.
pub(crate) struct Rank {
    pub(crate) reports: Receiver<Report>,
    pub(crate) shutdown: CancellationToken,
    running: JoinHandle<Result<(), Error>>,
}

impl Rank {
    pub(crate) fn start(config: Config) -> Self {
        let (sender, reports) = channel();
        let shutdown = CancellationToken::new();
        let stop = shutdown.clone();
        let reporter: Arc<dyn Reporter> = Arc::new(move |report| _ = sender.send(report));
        let running = thread::spawn(move || worker::run(&config, &reporter, &stop));
        Self { reports, shutdown, running }
    }

    /// Waits for the first report for which `found` has an answer.
    pub(crate) fn wait<T>(&self, found: impl Fn(&Report) -> Option<T>) -> T {
        loop {
            let report = self.reports.recv_timeout(PATIENCE).expect("the rank reports it");
            if let Some(found) = found(&report) {
                return found;
            }
        }
    }

    pub(crate) fn listening(&self) -> SocketAddr {
        self.wait(|report| if let Report::Listening(address) = report { Some(*address) } else { None })
    }

    pub(crate) fn ready(&self) {
        self.wait(|report| matches!(report, Report::Ready { .. }).then_some(()));
    }

    /// How the rank ended.
    pub(crate) fn end(self) -> Result<(), Error> {
        self.running.join().unwrap()
    }
}

/// A client of a leader, with a runtime of its own.
pub(crate) struct Client {
    pub(crate) runtime: Runtime,
    pub(crate) client: WorkerClient<Channel>,
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(WorkerClient::connect(format!("http://{address}"))).unwrap();
        Self { runtime, client }
    }

    /// All chunks of one request, or the status that ended it.
    pub(crate) fn generate(&self, request: GenerateRequest) -> Result<Vec<GenerateChunk>, Status> {
        let mut client = self.client.clone();
        self.runtime.block_on(async {
            let all = async {
                let mut stream = client.generate(request).await?.into_inner();
                let mut chunks = Vec::new();
                while let Some(chunk) = stream.message().await? {
                    chunks.push(chunk);
                }
                Ok(chunks)
            };
            tokio::time::timeout(PATIENCE, all)
                .await
                .unwrap_or_else(|_| Err(Status::new(Code::Unknown, "hangs")))
        })
    }
}

/// A greedy request that goes on past the end of sequence.
pub(crate) fn request(prompt: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    let generation = Generation {
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        ignore_eos: true,
        ..Generation::default()
    };
    GenerateRequest {
        request_id: "test".into(),
        prompt,
        generation: Some(generation),
        ..GenerateRequest::default()
    }
}
