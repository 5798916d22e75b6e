//! What one rank needs to know to start. Plain data: `settings` and the command line fill it in.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use security::{ClientTls, ServerTls, SharedSecret};
use types::{BlockSize, DType, Dispatch, ExpertSharding, TpRank, TpSize};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// A GPU when one is found, else the CPU; the choice is reported.
    Auto,
    /// The CPU op set.
    Cpu,
    /// An NVIDIA GPU; refused with the missing piece named when there is none.
    Cuda,
}

/// What the weights are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadFormat {
    /// Those of the checkpoint.
    Checkpoint,
    /// Seeded random numbers in the model's shape, made where they live: nothing but a `config.json` is needed.
    Dummy,
}

impl LoadFormat {
    /// The name used in flags and configuration files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Dummy => "dummy",
        }
    }
}

impl fmt::Display for LoadFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LoadFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "checkpoint" => Ok(Self::Checkpoint),
            "dummy" => Ok(Self::Dummy),
            other => Err(format!("unknown load format `{other}`; use checkpoint or dummy")),
        }
    }
}

/// Bounds of one group's engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens per KV block.
    pub block_size: BlockSize,
    /// Tokens of context the KV cache holds over all sequences.
    pub kv_tokens: u32,
    /// Most tokens computed in one step.
    pub step_tokens_max: u32,
    /// Most sequences in the running batch.
    pub running_max: u32,
    /// Most requests waiting for a place in the batch.
    pub waiting_requests_max: u32,
    /// Most prompt tokens of all waiting requests together.
    pub waiting_tokens_max: u32,
}

/// One rank's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The checkpoint.
    pub model: model::Files,
    /// What the weights are.
    pub load_format: LoadFormat,
    /// Layers to keep, when not all of them; with dummy weights only.
    pub layers: Option<u32>,
    /// Name the model is served under.
    pub model_name: String,
    /// Compute dtype.
    pub dtype: DType,
    /// Where the model runs.
    pub device: Device,
    /// CPU threads of this rank; `None` shares the machine's cores among the ranks.
    pub threads: Option<usize>,
    /// Who this is among all ranks of the group.
    pub rank: TpRank,
    /// Ranks of a sub-group, which share attention and see the same rows; all ranks when there is one sub-group.
    pub tensor: TpSize,
    /// How the routed experts are shared out.
    pub experts: ExpertSharding,
    /// How rows reach their experts.
    pub dispatch: Dispatch,
    /// File that says which experts each rank holds; `None` deals them out in order.
    pub expert_placement: Option<PathBuf>,
    /// Where rank 0 listens for the others (port 0: any, reported), and where the others find it.
    pub rendezvous: SocketAddr,
    /// Where the others find rank 0 instead, as `host:port`; the name is looked up at every try.
    pub leader: Option<String>,
    /// Where the leader serves routers (port 0: any, reported); only read on rank 0.
    pub listen: SocketAddr,
    /// Where this rank serves metrics and probes over HTTP, if at all (port 0: any, logged).
    pub metrics_listen: Option<SocketAddr>,
    /// Bounds of the engine.
    pub limits: Limits,
    /// Keys a sliding layer sees, when it is not the checkpoint's `sliding_window`.
    pub window_keys: Option<u32>,
    /// Whether every layer's output is looked at for values that are no numbers, so that the failing request is told the
    /// layer. Each layer then waits for a copy to the host.
    pub check_numerics: bool,
    /// Longest wait for all ranks to come together.
    pub boot_timeout: Duration,
    /// Longest a collective may take before the missing rank is named and the group ends.
    pub step_timeout: Duration,
    /// Where the leader writes its last steps when the group fails; `None` is the system's directory for temporary files.
    pub fault_dir: Option<PathBuf>,
    /// Longest open requests may go on after the order to stop.
    pub drain_grace: Duration,
    /// Who may call the leader.
    pub access: Access,
    /// Whom the leader tells that it is there; only read on rank 0.
    pub routers: Routers,
}

/// The routers at which a leader registers. The default: none, they have a list of their own.
#[derive(Debug, Clone, Default)]
pub struct Routers {
    /// Each `http://host:port`, or `dns+http://name:port` for every address of a name; `https` likewise.
    pub addresses: Vec<String>,
    /// Where they reach the leader, as `http://host:port`; `None` is where it listens.
    pub advertise: Option<String>,
    /// The authorities of routers whose address is `https://`.
    pub tls: Option<ClientTls>,
}

/// Who may call a leader. The default: everybody.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Files for TLS on the leader's listeners; plain text without. Callers of the one for metrics need no certificate.
    pub tls: Option<ServerTls>,
    /// The cluster's secret, which routers must show.
    pub secret: Option<SharedSecret>,
}
