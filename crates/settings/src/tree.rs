//! The tree itself. A key is one field: its comment is its description everywhere (`cohort config explain`, the schema,
//! the reference page), its name ends with the unit, its default is in the `Default` of its struct.

mod jwt;

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use model::Preset;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use types::limits::{BLOCK_TOKENS_MAX, RANKS_MAX};
use types::{BlockSize, DType, DispatchChoice, ExpertSharding, TpSize};
use worker::{Device, LoadFormat};

use crate::check::{
    CONTEXT_MAX, GROUPS_MAX, LAYERS_MAX, PROMPT_BYTES_MAX, QUEUE_BYTES_MAX, QUEUE_TOKENS_MAX, REQUESTS_MAX,
    THREADS_MAX, TIMEOUT_MAX_S, TIMEOUT_MIN_S, TOKENS_MAX,
};
use crate::telemetry::Telemetry;
use crate::{schema, strict};

pub use jwt::RouterJwt;

/// Default of `group.block_size`.
const BLOCK_TOKENS: u32 = 16;

/// Everything that can be configured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// What is served, and how it is computed.
    pub model: Model,
    /// The front door: what callers reach and what they may ask.
    pub router: Router,
    /// Each worker group: one replica of the model.
    pub group: Group,
    /// What `cohort up` starts on one machine.
    pub cluster: Cluster,
    /// Logs, and the traces of requests.
    pub telemetry: Telemetry,
}

/// `[model]`: what is served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Directory of the checkpoint (`config.json`, `*.safetensors`, `tokenizer.json`). Default: the embedded demo
    /// model.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub path: Option<PathBuf>,
    /// A published model whose shape is built in, with `load_format = "dummy"`. Default: none.
    #[serde(with = "strict::parsed_option")]
    #[schemars(schema_with = "schema::preset")]
    pub preset: Option<Preset>,
    /// `checkpoint`, or `dummy`: seeded random weights in the model's shape, for which a `config.json` is enough.
    #[serde(with = "strict::parsed")]
    #[schemars(schema_with = "schema::load_format")]
    pub load_format: LoadFormat,
    /// Layers to keep of a model with dummy weights. Default: all.
    #[serde(deserialize_with = "strict::whole_option::deserialize")]
    #[schemars(with = "u32", range(min = 1, max = LAYERS_MAX))]
    pub layers: Option<u32>,
    /// Name the model is served under. Default: the directory's or preset's name, or `cohort-demo` for the embedded model.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub name: Option<String>,
    /// Compute dtype, `f32` or `bf16`.
    #[serde(with = "strict::parsed")]
    #[schemars(schema_with = "schema::dtype")]
    pub dtype: DType,
    /// `cpu`, `cuda` or `auto` (a GPU when one is found).
    #[serde(with = "strict::device")]
    #[schemars(schema_with = "schema::device")]
    pub device: Device,
    /// Look at every layer's output, so that a request that fails on a value that is no number is told the layer; slow.
    #[serde(with = "strict::truth")]
    #[schemars(with = "bool")]
    pub check_numerics: bool,
    /// Keys a sliding layer sees. Default: the checkpoint's `sliding_window`.
    #[serde(deserialize_with = "strict::whole_option::deserialize")]
    #[schemars(with = "u32", range(min = 1, max = CONTEXT_MAX))]
    pub window_keys: Option<u32>,
}

/// `[router]`: the front door.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Router {
    /// Address of the gRPC API; port 0 takes any free one.
    #[serde(with = "strict::parsed")]
    #[schemars(schema_with = "schema::address")]
    pub grpc_listen: SocketAddr,
    /// Address of the HTTP endpoints, or `off`.
    #[serde(with = "strict::parsed")]
    #[schemars(schema_with = "schema::address_or_off")]
    pub http_listen: HttpListen,
    /// Leaders of the worker groups, as `http://host:port` or `https://host:port`; `dns+http://name:port` and
    /// `dns+https://name:port` stand for every address of a name. May change while serving. `cohort up` fills this in.
    #[serde(deserialize_with = "strict::text_list::deserialize")]
    #[schemars(schema_with = "schema::workers")]
    pub workers: Vec<String>,
    /// Shares of the requests that workers get, 0 to 100 each, as `ADDRESS=WEIGHT`; a name stands for each of its addresses,
    /// and all others have 1. One with 0 gets no new requests and finishes its own. May change while serving. `cohort up`
    /// fills this in from `cluster.weights`.
    #[serde(deserialize_with = "strict::text_list::deserialize")]
    #[schemars(schema_with = "schema::weights")]
    pub weights: Vec<String>,
    /// Let groups register here, beside those of the list; they need the cluster's secret.
    #[serde(with = "strict::truth")]
    #[schemars(with = "bool")]
    pub registration: bool,
    /// How long a group that has registered is remembered without a word of it, in seconds; it says one every two.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = TIMEOUT_MIN_S, max = TIMEOUT_MAX_S))]
    pub registration_hold_s: Duration,
    /// How names in `router.workers` are asked for.
    pub dns: RouterDns,
    /// Bounds of what is let in.
    pub limits: RouterLimits,
    /// Bounds of what waits to be let in.
    pub queue: RouterQueue,
    /// Certificates of both listeners.
    pub tls: Tls,
    /// File of the API keys, as `cohort keys new` writes its lines; read again when it changes. Default: no key is asked
    /// for.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub keys_file: Option<PathBuf>,
    /// Tokens of an identity provider, taken beside or in place of API keys.
    pub jwt: RouterJwt,
    /// How long HTTP callers are waited for.
    pub http: RouterHttp,
    /// How old a gRPC caller's connection may become, in seconds: then its caller is told to open another one (GOAWAY), which
    /// may reach another router, while what is open on the old one is finished; 0 for any age.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = 0, max = TIMEOUT_MAX_S))]
    pub connection_age_max_s: Duration,
    /// How long a request that lost its group waits for a group that goes on with it, in seconds; 0 ends it at once.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = 0, max = TIMEOUT_MAX_S))]
    pub resume_grace_s: Duration,
    /// After the order to stop, how long requests are still taken while health says NOT_SERVING, in seconds: load
    /// balancers turn away before anybody is refused.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = 0, max = TIMEOUT_MAX_S))]
    pub withdraw_grace_s: Duration,
    /// Longest open requests may go on after the withdraw grace, in seconds.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = 0, max = TIMEOUT_MAX_S))]
    pub drain_grace_s: Duration,
}

/// `[router.dns]`: how names in `router.workers` are asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RouterDns {
    /// Time between two questions, in seconds.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = TIMEOUT_MIN_S, max = TIMEOUT_MAX_S))]
    pub interval_s: Duration,
    /// How long a group is kept after the last answer that had its address, in seconds: a name that flaps, or that nobody
    /// answers for, takes none away before.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = 0, max = TIMEOUT_MAX_S))]
    pub hold_s: Duration,
}

/// `[router.limits]`: bounds of what is let in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RouterLimits {
    /// Requests admitted at once; more wait (`router.queue`).
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = REQUESTS_MAX))]
    pub requests_max: u32,
    /// Bytes of one prompt's text.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = PROMPT_BYTES_MAX))]
    pub prompt_bytes_max: usize,
}

/// `[router.queue]`: bounds of what waits to be let in when `router.limits.requests_max` are; more are refused with
/// RESOURCE_EXHAUSTED. API keys take turns, each by the tokens its requests may cost, and priorities go first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RouterQueue {
    /// Requests that wait; 0 lets none wait.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 0, max = REQUESTS_MAX))]
    pub requests_max: u32,
    /// Tokens that all of them may cost together: their prompts, and all they may generate.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = QUEUE_TOKENS_MAX))]
    pub tokens_max: u64,
    /// Bytes of their prompts together.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = QUEUE_BYTES_MAX))]
    pub bytes_max: usize,
    /// Requests of one API key that wait.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = REQUESTS_MAX))]
    pub key_requests_max: u32,
    /// Longest wait, in seconds; then the request is refused.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = TIMEOUT_MIN_S, max = TIMEOUT_MAX_S))]
    pub wait_max_s: Duration,
}

/// `[router.tls]` and `[group.tls]`: certificates of listeners, in PEM files that are read again when they change.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// Certificate, and those that lead to an authority callers know. Default: no TLS.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub certificate: Option<PathBuf>,
    /// The certificate's private key. Default: none.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub key: Option<PathBuf>,
    /// Authorities that callers' certificates must be signed by; probes and metrics need none. Default: callers need no
    /// certificate.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub client_ca: Option<PathBuf>,
}

/// `[cluster.tls]`: how a router knows groups whose address is `https://`, and shows itself to them; PEM files that are
/// read again when they change.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterTls {
    /// Authorities that the groups' certificates must be signed by. Default: none.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub ca: Option<PathBuf>,
    /// The router's own certificate, for groups with `group.tls.client_ca`. Default: none.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub certificate: Option<PathBuf>,
    /// The private key of that certificate. Default: none.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub key: Option<PathBuf>,
}

/// `[router.http]`: how long HTTP callers are waited for before their connection is closed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RouterHttp {
    /// Longest wait for the head of a request, and so also between two requests of a connection, in seconds.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = TIMEOUT_MIN_S, max = TIMEOUT_MAX_S))]
    pub head_timeout_s: Duration,
    /// Longest wait for the body of a request, in seconds; it is answered with 408.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = TIMEOUT_MIN_S, max = TIMEOUT_MAX_S))]
    pub body_timeout_s: Duration,
    /// Longest wait for a caller that reads nothing of its answer, in seconds; its request is cancelled.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = TIMEOUT_MIN_S, max = TIMEOUT_MAX_S))]
    pub write_timeout_s: Duration,
    /// After this much silence a stream says a comment, so that proxies keep its connection, in seconds.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = TIMEOUT_MIN_S, max = TIMEOUT_MAX_S))]
    pub keep_alive_s: Duration,
}

/// `[group]`: each worker group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Group {
    /// Ranks that share attention, dense layers and vocabulary and see the same rows.
    #[serde(with = "strict::tp_size")]
    #[schemars(with = "u32", range(min = 1, max = RANKS_MAX))]
    pub tensor_parallel: TpSize,
    /// Sub-groups of so many ranks, each with sequences and a KV cache of its own; all ranks share the routed experts.
    /// More than one needs `experts = "expert"`.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = RANKS_MAX))]
    pub data_parallel: u32,
    /// How the routed experts are shared out: `tensor` (a part of each) or `expert` (some of them whole).
    #[serde(with = "strict::parsed")]
    #[schemars(schema_with = "schema::experts")]
    pub experts: ExpertSharding,
    /// How rows reach their experts: `replicated` (every rank has all rows), `all-to-all` (rows are sent to the ranks
    /// that hold their experts; needs `experts = "expert"`) or `auto` (replicated in one sub-group, all-to-all in
    /// several).
    #[serde(with = "strict::parsed")]
    #[schemars(schema_with = "schema::dispatch")]
    pub dispatch: DispatchChoice,
    /// File that says which experts each rank holds, as `cohort plan --expert-load` writes it; needs
    /// `experts = "expert"`. Default: the experts in order.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub expert_placement: Option<PathBuf>,
    /// CPU threads of each rank. Default: the machine's cores shared equally among the ranks.
    #[serde(deserialize_with = "strict::whole_option::deserialize")]
    #[schemars(with = "usize", range(min = 1, max = THREADS_MAX))]
    pub threads: Option<usize>,
    /// Tokens of context the KV cache holds over all sequences.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = TOKENS_MAX))]
    pub kv_tokens: u32,
    /// Tokens per KV block.
    #[serde(with = "strict::block_size")]
    #[schemars(with = "u32", range(min = 1, max = BLOCK_TOKENS_MAX))]
    pub block_size: BlockSize,
    /// Most tokens computed in one step; longer prompts are computed in chunks.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = CONTEXT_MAX))]
    pub step_tokens_max: u32,
    /// Most sequences in the running batch.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = REQUESTS_MAX))]
    pub running_max: u32,
    /// Most requests waiting for a place in the batch; more are refused.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = REQUESTS_MAX))]
    pub waiting_requests_max: u32,
    /// Most prompt tokens of all waiting requests together; more are refused.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = TOKENS_MAX))]
    pub waiting_tokens_max: u32,
    /// Hosts of a group that spans several, in order, as `host` or `host:port`; each runs equally many ranks, and rank 0
    /// meets the others at the first one's port (7070 without one); none is one host. For `cohort group`.
    #[serde(deserialize_with = "strict::text_list::deserialize")]
    pub hosts: Vec<String>,
    /// Routers at which the leader registers, as `http://host:port` or `https://host:port`; `dns+http://name:port` stands for
    /// every address of a name. They need `router.registration`.
    #[serde(deserialize_with = "strict::text_list::deserialize")]
    #[schemars(schema_with = "schema::workers")]
    pub routers: Vec<String>,
    /// Where those routers reach the leader, as `http://host:port` or `https://host:port`. Default: where it listens.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub advertise: Option<String>,
    /// Authorities that the certificates of `https://` routers must be signed by (PEM). Default: none.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub routers_ca: Option<PathBuf>,
    /// Longest wait for all ranks to come together, in seconds.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = TIMEOUT_MIN_S, max = TIMEOUT_MAX_S))]
    pub boot_timeout_s: Duration,
    /// Address where a group's leader serves metrics and probes over HTTP, or `off`. On one machine `cohort up` gives each
    /// group the next port.
    #[serde(with = "strict::parsed")]
    #[schemars(schema_with = "schema::address_or_off")]
    pub metrics_listen: HttpListen,
    /// Address where the ranks that follow serve theirs, or `off`: rank 1 there, each other rank one port further. On one
    /// machine `cohort up` gives each group the next ports.
    #[serde(with = "strict::parsed")]
    #[schemars(schema_with = "schema::address_or_off")]
    pub rank_metrics_listen: HttpListen,
    /// Certificates of the ranks' listeners.
    pub tls: Tls,
    /// Longest a step's collective may take before the missing rank is named and the group ends, in seconds.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = TIMEOUT_MIN_S, max = TIMEOUT_MAX_S))]
    pub step_timeout_s: Duration,
    /// Longest open requests may go on after the order to stop, in seconds.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = 0, max = TIMEOUT_MAX_S))]
    pub drain_grace_s: Duration,
    /// Directory where a leader writes the last 2,048 steps when its group fails; the newest 8 files are kept. Default: the
    /// system's directory for temporary files; stderr when that cannot be written.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub fault_dir: Option<PathBuf>,
}

/// `[cluster]`: what `cohort up` starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// Worker groups.
    #[serde(deserialize_with = "strict::whole::deserialize")]
    #[schemars(range(min = 1, max = GROUPS_MAX))]
    pub groups: u32,
    /// Shares of the requests that the groups get, in order, 0 to 100 each; those that are not named have 1. A group with 0
    /// gets no new requests and finishes its own. May change while serving.
    #[serde(deserialize_with = "strict::whole_list::deserialize")]
    #[schemars(schema_with = "schema::group_weights")]
    pub weights: Vec<u32>,
    /// File with the secret that routers show to groups; groups refuse calls without it. Read again when it changes; of two
    /// lines both are taken and the first is shown. The variable
    /// `COHORT_CLUSTER_SECRET` may hold it instead. Default: a random one in `cohort up`, else none.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub secret_file: Option<PathBuf>,
    /// How routers and groups know each other.
    pub tls: ClusterTls,
}

/// Where HTTP is served, if it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpListen {
    /// Nowhere.
    Off,
    /// At this address.
    At(SocketAddr),
}

impl HttpListen {
    /// The address, unless it is off.
    #[must_use]
    pub const fn address(self) -> Option<SocketAddr> {
        match self {
            Self::Off => None,
            Self::At(address) => Some(address),
        }
    }

    /// The address for the `index`th of several processes on one machine: its port counts on, unless any is taken.
    #[must_use]
    pub fn nth(self, index: u32) -> Self {
        match self {
            Self::At(address) if address.port() != 0 => {
                let port = u16::try_from(index).ok().and_then(|index| address.port().checked_add(index));
                // The configuration's check has seen to it that all of them fit.
                Self::At(SocketAddr::new(address.ip(), port.unwrap_or(u16::MAX)))
            }
            Self::At(_) | Self::Off => self,
        }
    }
}

impl fmt::Display for HttpListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::At(address) => address.fmt(f),
        }
    }
}

impl FromStr for HttpListen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        text.parse().map(Self::At).map_err(|_| "use an address such as 127.0.0.1:8080, or off".to_owned())
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            path: None,
            preset: None,
            load_format: LoadFormat::Checkpoint,
            layers: None,
            name: None,
            dtype: DType::F32,
            device: Device::Auto,
            check_numerics: false,
            window_keys: None,
        }
    }
}

impl Default for Router {
    fn default() -> Self {
        Self {
            grpc_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 50051)),
            http_listen: HttpListen::At(SocketAddr::from((Ipv4Addr::LOCALHOST, 8080))),
            workers: Vec::new(),
            weights: Vec::new(),
            registration: false,
            registration_hold_s: Duration::from_secs(10),
            dns: RouterDns::default(),
            limits: RouterLimits::default(),
            queue: RouterQueue::default(),
            tls: Tls::default(),
            keys_file: None,
            jwt: RouterJwt::default(),
            http: RouterHttp::default(),
            connection_age_max_s: Duration::from_secs(1800),
            resume_grace_s: Duration::from_secs(10),
            withdraw_grace_s: Duration::ZERO,
            drain_grace_s: Duration::from_secs(10),
        }
    }
}

impl Default for RouterDns {
    fn default() -> Self {
        let router::discovery::Names { interval, hold, .. } = router::discovery::Names::default();
        Self { interval_s: interval, hold_s: hold }
    }
}

impl Default for RouterLimits {
    fn default() -> Self {
        let router::Limits { requests_max, prompt_bytes_max, .. } = router::Limits::default();
        Self { requests_max, prompt_bytes_max }
    }
}

impl Default for RouterQueue {
    fn default() -> Self {
        let router::QueueLimits { requests_max, tokens_max, bytes_max, key_requests_max, wait_max } =
            router::QueueLimits::default();
        Self { requests_max, tokens_max, bytes_max, key_requests_max, wait_max_s: wait_max }
    }
}

impl Default for RouterHttp {
    fn default() -> Self {
        let router::HttpPatience { head, body, write, quiet } = router::HttpPatience::default();
        Self { head_timeout_s: head, body_timeout_s: body, write_timeout_s: write, keep_alive_s: quiet }
    }
}

impl Default for Group {
    fn default() -> Self {
        let Ok(block_size) = BlockSize::new(BLOCK_TOKENS) else {
            unreachable!("{BLOCK_TOKENS} tokens are a valid block");
        };
        Self {
            tensor_parallel: TpSize::ONE,
            data_parallel: 1,
            experts: ExpertSharding::Tensor,
            dispatch: DispatchChoice::Auto,
            expert_placement: None,
            threads: None,
            kv_tokens: 32_768,
            block_size,
            step_tokens_max: 512,
            running_max: 64,
            waiting_requests_max: 256,
            waiting_tokens_max: 262_144,
            hosts: Vec::new(),
            routers: Vec::new(),
            advertise: None,
            routers_ca: None,
            boot_timeout_s: Duration::from_secs(60),
            metrics_listen: HttpListen::Off,
            rank_metrics_listen: HttpListen::Off,
            tls: Tls::default(),
            step_timeout_s: Duration::from_secs(10),
            drain_grace_s: Duration::from_secs(10),
            fault_dir: None,
        }
    }
}

impl Default for Cluster {
    fn default() -> Self {
        Self { groups: 1, weights: Vec::new(), secret_file: None, tls: ClusterTls::default() }
    }
}
