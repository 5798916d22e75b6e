//! Flags shared by several subcommands. Each group of flags is one list (`flags`), from which both the configuration
//! layer of this process and the command line of its children are made, so the two cannot differ.

mod jwt;
mod telemetry;

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use model::Preset;
use settings::{Flag, HttpListen, Loaded, Settings, Sources};
use worker::{Device, LoadFormat};

pub use jwt::JwtFlags;
pub use telemetry::{LogFlags, TraceFlags};

/// The cluster file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct FileFlag {
    /// Cluster file (TOML or YAML), once or several times, later ones first; flags and COHORT__SECTION__KEY variables win
    /// over all
    #[arg(long, value_name = "FILE")]
    pub config: Vec<PathBuf>,
}

/// What is served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelFlags {
    /// Directory of the checkpoint [default: the embedded demo model]
    #[arg(long, value_name = "DIR")]
    pub model: Option<String>,
    /// A published model's shape, with --load-format dummy
    #[arg(long, value_name = "NAME", conflicts_with = "model", value_parser = Preset::ALL.map(Preset::name))]
    pub preset: Option<String>,
    /// What the weights are: checkpoint, or dummy (seeded random numbers; a config.json is enough) [default: checkpoint]
    #[arg(long, value_parser = ["checkpoint", "dummy"])]
    pub load_format: Option<String>,
    /// Layers to keep of a model with dummy weights [default: all]
    #[arg(long, value_name = "N")]
    pub layers: Option<u32>,
    /// Name the model is served under [default: the directory's or preset's name, or cohort-demo]
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
}

impl ModelFlags {
    /// For a command that needs no weights: a preset or a cut model needs no word about them.
    #[must_use]
    pub fn of_shape(&self) -> Self {
        let dummy =
            (self.preset.is_some() || self.layers.is_some()).then(|| LoadFormat::Dummy.name().to_owned());
        Self { load_format: self.load_format.clone().or(dummy), ..self.clone() }
    }
}

/// How it is computed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Model")]
pub struct ComputeFlags {
    /// Compute dtype [default: f32]
    #[arg(long, value_parser = ["f32", "bf16"])]
    pub dtype: Option<String>,
    /// Where the model runs [default: auto, a GPU when one is found]
    #[arg(long, value_parser = ["auto", "cpu", "cuda"])]
    pub device: Option<String>,
    /// Look at every layer's output, so that a request that fails on a value that is no number is told the layer; slow
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub check_numerics: Option<bool>,
    /// Keys a sliding layer sees [default: the checkpoint's sliding_window]
    #[arg(long, value_name = "N")]
    pub window_keys: Option<u32>,
}

/// Each worker group.
#[derive(Debug, Clone, Default, PartialEq, Args)]
#[command(next_help_heading = "Worker group")]
pub struct GroupFlags {
    /// Ranks that share attention, dense layers and vocabulary and see the same rows [default: 1]
    #[arg(long, value_name = "N")]
    pub tensor_parallel: Option<u32>,
    /// Sub-groups of so many ranks, each with sequences and a KV cache of its own; all ranks share the routed experts.
    /// More than one needs --experts expert [default: 1]
    #[arg(long, value_name = "N")]
    pub data_parallel: Option<u32>,
    /// How the routed experts are shared out: tensor (a part of each) or expert (some of them whole) [default: tensor]
    #[arg(long, value_parser = ["tensor", "expert"])]
    pub experts: Option<String>,
    /// How rows reach their experts: replicated (every rank has all rows), all-to-all (rows are sent to the ranks that
    /// hold their experts; needs --experts expert) or auto [default: auto: replicated in one sub-group, all-to-all in
    /// several]
    #[arg(long, value_parser = ["auto", "replicated", "all-to-all"])]
    pub dispatch: Option<String>,
    /// File that says which experts each rank holds, as `cohort plan --expert-load` writes it [default: in order]
    #[arg(long, value_name = "FILE")]
    pub expert_placement: Option<String>,
    /// CPU threads of each rank [default: the machine's cores shared among the ranks]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Tokens of context the KV cache holds over all sequences [default: 32768]
    #[arg(long, value_name = "N")]
    pub kv_tokens: Option<u32>,
    /// Tokens per KV block [default: 16]
    #[arg(long, value_name = "N")]
    pub block_size: Option<u32>,
    /// Most tokens computed in one step [default: 512]
    #[arg(long, value_name = "N")]
    pub step_tokens_max: Option<u32>,
    /// Most sequences in the running batch [default: 64]
    #[arg(long, value_name = "N")]
    pub running_max: Option<u32>,
    /// Most requests waiting for a place in the batch [default: 256]
    #[arg(long, value_name = "N")]
    pub waiting_requests_max: Option<u32>,
    /// Most prompt tokens of all waiting requests together [default: 262144]
    #[arg(long, value_name = "N")]
    pub waiting_tokens_max: Option<u32>,
    /// Address where the leader serves metrics and probes over HTTP, or off [default: off]
    #[arg(long, value_name = "ADDR")]
    pub metrics_listen: Option<HttpListen>,
    /// Address where the other ranks serve theirs, each one port further than the one before, or off [default: off]
    #[arg(long, value_name = "ADDR")]
    pub rank_metrics_listen: Option<HttpListen>,
    /// Certificate of the leader's listeners (PEM); read again when it changes [default: no TLS]
    #[arg(long, value_name = "FILE")]
    pub group_tls_certificate: Option<String>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE")]
    pub group_tls_key: Option<String>,
    /// Authorities that routers' certificates must be signed by (PEM) [default: routers need none]
    #[arg(long, value_name = "FILE")]
    pub group_tls_client_ca: Option<String>,
    /// Routers at which the leader registers, as http://host:port or dns+http://name:port; separate several with commas
    #[arg(long, value_name = "URL,…")]
    pub routers: Option<String>,
    /// Where those routers reach the leader, as http://host:port [default: where it listens]
    #[arg(long, value_name = "URL")]
    pub advertise: Option<String>,
    /// Authorities that the certificates of https:// routers must be signed by (PEM)
    #[arg(long, value_name = "FILE")]
    pub routers_ca: Option<String>,
    /// Longest wait for all ranks to come together, in seconds [default: 60]
    #[arg(long = "boot-timeout", value_name = "SECONDS")]
    pub boot_timeout_s: Option<f64>,
    /// Longest a step may wait for a rank before the group ends, in seconds [default: 10]
    #[arg(long = "step-timeout", value_name = "SECONDS")]
    pub step_timeout_s: Option<f64>,
    /// Longest open requests may go on after the order to stop, in seconds [default: 10]
    #[arg(long = "drain-grace", value_name = "SECONDS")]
    pub drain_grace_s: Option<f64>,
    /// Directory for the last steps of a group that fails [default: the system's for temporary files]
    #[arg(long, value_name = "DIR")]
    pub fault_dir: Option<String>,
}

/// The front door.
#[derive(Debug, Clone, Default, PartialEq, Args)]
#[command(next_help_heading = "Router")]
pub struct RouterFlags {
    /// Address of the gRPC API; port 0 takes any free one [default: 127.0.0.1:50051]
    #[arg(long, value_name = "ADDR")]
    pub grpc_listen: Option<SocketAddr>,
    /// Address of the HTTP endpoints, or off [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    pub http_listen: Option<HttpListen>,
    /// Certificate of the router's listeners (PEM); read again when it changes [default: no TLS]
    #[arg(long, value_name = "FILE")]
    pub tls_certificate: Option<String>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<String>,
    /// Authorities that callers' certificates must be signed by (PEM) [default: callers need none]
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca: Option<String>,
    /// File of the API keys, as `cohort keys new` writes its lines; read again when it changes [default: no key is asked
    /// for]
    #[arg(long, value_name = "FILE")]
    pub keys_file: Option<String>,
    /// Tokens of identity providers.
    #[command(flatten)]
    pub jwt: JwtFlags,
    /// File with the secret that routers show to groups [default: COHORT_CLUSTER_SECRET, else a random one in `cohort up`]
    #[arg(long, value_name = "FILE")]
    pub cluster_secret_file: Option<String>,
    /// Authorities that the certificates of https:// groups must be signed by (PEM)
    #[arg(long, value_name = "FILE")]
    pub cluster_tls_ca: Option<String>,
    /// The router's own certificate for groups that want one (PEM)
    #[arg(long, value_name = "FILE")]
    pub cluster_tls_certificate: Option<String>,
    /// The private key of that certificate (PEM)
    #[arg(long, value_name = "FILE")]
    pub cluster_tls_key: Option<String>,
    /// Let groups register here; they need the cluster's secret
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub registration: Option<bool>,
    /// How long a group that has registered is remembered without a word of it, in seconds [default: 10]
    #[arg(long = "registration-hold", value_name = "SECONDS")]
    pub registration_hold_s: Option<f64>,
    /// Time between two questions for the addresses of dns+http:// workers, in seconds [default: 5]
    #[arg(long = "dns-interval", value_name = "SECONDS")]
    pub dns_interval_s: Option<f64>,
    /// How long such a worker is kept after the last answer that had its address, in seconds [default: 60]
    #[arg(long = "dns-hold", value_name = "SECONDS")]
    pub dns_hold_s: Option<f64>,
    /// Requests admitted at once [default: 512]
    #[arg(long, value_name = "N")]
    pub requests_max: Option<u32>,
    /// Bytes of one prompt's text [default: 4194304]
    #[arg(long, value_name = "N")]
    pub prompt_bytes_max: Option<usize>,
    /// Requests that wait to be admitted; 0 lets none wait [default: 512]
    #[arg(long, value_name = "N")]
    pub queue_requests_max: Option<u32>,
    /// Tokens that those may cost together: their prompts, and all they may generate [default: 4194304]
    #[arg(long, value_name = "N")]
    pub queue_tokens_max: Option<u64>,
    /// Bytes of their prompts together [default: 67108864]
    #[arg(long, value_name = "N")]
    pub queue_bytes_max: Option<usize>,
    /// Requests of one API key that wait [default: 128]
    #[arg(long, value_name = "N")]
    pub queue_key_requests_max: Option<u32>,
    /// Longest wait to be admitted, in seconds [default: 30]
    #[arg(long = "queue-wait-max", value_name = "SECONDS")]
    pub queue_wait_max_s: Option<f64>,
    /// Longest wait for the head of an HTTP request, and between two on a connection, in seconds [default: 30]
    #[arg(long = "http-head-timeout", value_name = "SECONDS")]
    pub http_head_timeout_s: Option<f64>,
    /// Longest wait for the body of an HTTP request, in seconds [default: 30]
    #[arg(long = "http-body-timeout", value_name = "SECONDS")]
    pub http_body_timeout_s: Option<f64>,
    /// Longest wait for an HTTP caller that reads nothing of its answer, in seconds [default: 30]
    #[arg(long = "http-write-timeout", value_name = "SECONDS")]
    pub http_write_timeout_s: Option<f64>,
    /// Silence after which an HTTP stream says a comment that keeps its connection, in seconds [default: 10]
    #[arg(long = "http-keep-alive", value_name = "SECONDS")]
    pub http_keep_alive_s: Option<f64>,
    /// How old a gRPC caller's connection may become before it is told to open another one, in seconds; 0 for any age
    /// [default: 1800]
    #[arg(long = "connection-age-max", value_name = "SECONDS")]
    pub connection_age_max_s: Option<f64>,
    /// How long a request that lost its group waits for one that goes on with it, in seconds; 0 ends it at once
    /// [default: 10]
    #[arg(long = "resume-grace", value_name = "SECONDS")]
    pub resume_grace_s: Option<f64>,
    /// After the order to stop, how long requests are still taken while health says NOT_SERVING, in seconds [default: 0]
    #[arg(long = "withdraw-grace", value_name = "SECONDS")]
    pub withdraw_grace_s: Option<f64>,
    /// After that, how long the router lets open requests go on, in seconds [default: 10]
    #[arg(long = "router-drain-grace", value_name = "SECONDS")]
    pub router_drain_grace_s: Option<f64>,
}

/// A group of flags that sets keys of the configuration.
pub trait ConfigFlags {
    /// The flags that were given, with their keys.
    fn flags(&self) -> Vec<Flag>;

    /// These flags as a child's arguments.
    fn to_argv(&self) -> Vec<String> {
        self.flags().into_iter().map(|given| format!("{}={}", given.flag, given.value)).collect()
    }
}

fn given<T: Display>(flag: &'static str, key: &'static str, value: Option<&T>) -> Option<Flag> {
    value.map(|value| Flag { flag, key, value: value.to_string() })
}

impl ConfigFlags for ModelFlags {
    fn flags(&self) -> Vec<Flag> {
        [
            given("--model", "model.path", self.model.as_ref()),
            given("--preset", "model.preset", self.preset.as_ref()),
            given("--load-format", "model.load_format", self.load_format.as_ref()),
            given("--layers", "model.layers", self.layers.as_ref()),
            given("--model-name", "model.name", self.model_name.as_ref()),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

impl ConfigFlags for ComputeFlags {
    fn flags(&self) -> Vec<Flag> {
        [
            given("--dtype", "model.dtype", self.dtype.as_ref()),
            given("--device", "model.device", self.device.as_ref()),
            given("--check-numerics", "model.check_numerics", self.check_numerics.as_ref()),
            given("--window-keys", "model.window_keys", self.window_keys.as_ref()),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

impl ConfigFlags for GroupFlags {
    fn flags(&self) -> Vec<Flag> {
        [
            given("--tensor-parallel", "group.tensor_parallel", self.tensor_parallel.as_ref()),
            given("--data-parallel", "group.data_parallel", self.data_parallel.as_ref()),
            given("--experts", "group.experts", self.experts.as_ref()),
            given("--dispatch", "group.dispatch", self.dispatch.as_ref()),
            given("--expert-placement", "group.expert_placement", self.expert_placement.as_ref()),
            given("--threads", "group.threads", self.threads.as_ref()),
            given("--kv-tokens", "group.kv_tokens", self.kv_tokens.as_ref()),
            given("--block-size", "group.block_size", self.block_size.as_ref()),
            given("--step-tokens-max", "group.step_tokens_max", self.step_tokens_max.as_ref()),
            given("--running-max", "group.running_max", self.running_max.as_ref()),
            given("--waiting-requests-max", "group.waiting_requests_max", self.waiting_requests_max.as_ref()),
            given("--waiting-tokens-max", "group.waiting_tokens_max", self.waiting_tokens_max.as_ref()),
            given("--metrics-listen", "group.metrics_listen", self.metrics_listen.as_ref()),
            given("--rank-metrics-listen", "group.rank_metrics_listen", self.rank_metrics_listen.as_ref()),
            given("--group-tls-certificate", "group.tls.certificate", self.group_tls_certificate.as_ref()),
            given("--group-tls-key", "group.tls.key", self.group_tls_key.as_ref()),
            given("--group-tls-client-ca", "group.tls.client_ca", self.group_tls_client_ca.as_ref()),
            given("--routers", "group.routers", self.routers.as_ref()),
            given("--advertise", "group.advertise", self.advertise.as_ref()),
            given("--routers-ca", "group.routers_ca", self.routers_ca.as_ref()),
            given("--boot-timeout", "group.boot_timeout_s", self.boot_timeout_s.as_ref()),
            given("--step-timeout", "group.step_timeout_s", self.step_timeout_s.as_ref()),
            given("--drain-grace", "group.drain_grace_s", self.drain_grace_s.as_ref()),
            given("--fault-dir", "group.fault_dir", self.fault_dir.as_ref()),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

impl ConfigFlags for RouterFlags {
    fn flags(&self) -> Vec<Flag> {
        [
            given("--grpc-listen", "router.grpc_listen", self.grpc_listen.as_ref()),
            given("--http-listen", "router.http_listen", self.http_listen.as_ref()),
            given("--tls-certificate", "router.tls.certificate", self.tls_certificate.as_ref()),
            given("--tls-key", "router.tls.key", self.tls_key.as_ref()),
            given("--tls-client-ca", "router.tls.client_ca", self.tls_client_ca.as_ref()),
            given("--keys-file", "router.keys_file", self.keys_file.as_ref()),
            given("--cluster-secret-file", "cluster.secret_file", self.cluster_secret_file.as_ref()),
            given("--cluster-tls-ca", "cluster.tls.ca", self.cluster_tls_ca.as_ref()),
            given(
                "--cluster-tls-certificate",
                "cluster.tls.certificate",
                self.cluster_tls_certificate.as_ref(),
            ),
            given("--cluster-tls-key", "cluster.tls.key", self.cluster_tls_key.as_ref()),
            given("--registration", "router.registration", self.registration.as_ref()),
            given("--registration-hold", "router.registration_hold_s", self.registration_hold_s.as_ref()),
            given("--dns-interval", "router.dns.interval_s", self.dns_interval_s.as_ref()),
            given("--dns-hold", "router.dns.hold_s", self.dns_hold_s.as_ref()),
            given("--requests-max", "router.limits.requests_max", self.requests_max.as_ref()),
            given("--prompt-bytes-max", "router.limits.prompt_bytes_max", self.prompt_bytes_max.as_ref()),
            given("--queue-requests-max", "router.queue.requests_max", self.queue_requests_max.as_ref()),
            given("--queue-tokens-max", "router.queue.tokens_max", self.queue_tokens_max.as_ref()),
            given("--queue-bytes-max", "router.queue.bytes_max", self.queue_bytes_max.as_ref()),
            given(
                "--queue-key-requests-max",
                "router.queue.key_requests_max",
                self.queue_key_requests_max.as_ref(),
            ),
            given("--queue-wait-max", "router.queue.wait_max_s", self.queue_wait_max_s.as_ref()),
            given("--http-head-timeout", "router.http.head_timeout_s", self.http_head_timeout_s.as_ref()),
            given("--http-body-timeout", "router.http.body_timeout_s", self.http_body_timeout_s.as_ref()),
            given("--http-write-timeout", "router.http.write_timeout_s", self.http_write_timeout_s.as_ref()),
            given("--http-keep-alive", "router.http.keep_alive_s", self.http_keep_alive_s.as_ref()),
            given("--connection-age-max", "router.connection_age_max_s", self.connection_age_max_s.as_ref()),
            given("--resume-grace", "router.resume_grace_s", self.resume_grace_s.as_ref()),
            given("--withdraw-grace", "router.withdraw_grace_s", self.withdraw_grace_s.as_ref()),
            given("--router-drain-grace", "router.drain_grace_s", self.router_drain_grace_s.as_ref()),
        ]
        .into_iter()
        .flatten()
        .chain(self.jwt.flags())
        .collect()
    }
}

fn shown(path: Option<&Path>) -> Option<String> {
    path.map(|path| path.display().to_string())
}

impl From<&Settings> for ModelFlags {
    fn from(settings: &Settings) -> Self {
        let model = &settings.model;
        Self {
            model: shown(model.path.as_deref()),
            preset: model.preset.map(|preset| preset.name().to_owned()),
            load_format: Some(model.load_format.name().to_owned()),
            layers: model.layers,
            model_name: model.name.clone(),
        }
    }
}

impl From<&Settings> for ComputeFlags {
    fn from(settings: &Settings) -> Self {
        let model = &settings.model;
        let device = match model.device {
            Device::Auto => "auto",
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        };
        Self {
            dtype: Some(model.dtype.to_string()),
            device: Some(device.into()),
            check_numerics: Some(model.check_numerics),
            window_keys: model.window_keys,
        }
    }
}

impl From<&Settings> for GroupFlags {
    fn from(settings: &Settings) -> Self {
        let group = &settings.group;
        Self {
            tensor_parallel: Some(group.tensor_parallel.get()),
            data_parallel: Some(group.data_parallel),
            experts: Some(group.experts.name().to_owned()),
            dispatch: Some(group.dispatch.name().to_owned()),
            expert_placement: shown(group.expert_placement.as_deref()),
            threads: group.threads,
            kv_tokens: Some(group.kv_tokens),
            block_size: Some(group.block_size.tokens()),
            step_tokens_max: Some(group.step_tokens_max),
            running_max: Some(group.running_max),
            waiting_requests_max: Some(group.waiting_requests_max),
            waiting_tokens_max: Some(group.waiting_tokens_max),
            metrics_listen: Some(group.metrics_listen),
            rank_metrics_listen: Some(group.rank_metrics_listen),
            group_tls_certificate: shown(group.tls.certificate.as_deref()),
            group_tls_key: shown(group.tls.key.as_deref()),
            group_tls_client_ca: shown(group.tls.client_ca.as_deref()),
            routers: (!group.routers.is_empty()).then(|| group.routers.join(",")),
            advertise: group.advertise.clone(),
            routers_ca: shown(group.routers_ca.as_deref()),
            boot_timeout_s: Some(group.boot_timeout_s.as_secs_f64()),
            step_timeout_s: Some(group.step_timeout_s.as_secs_f64()),
            drain_grace_s: Some(group.drain_grace_s.as_secs_f64()),
            fault_dir: group.fault_dir.as_ref().map(|directory| directory.display().to_string()),
        }
    }
}

impl From<&Settings> for RouterFlags {
    fn from(settings: &Settings) -> Self {
        let (router, cluster) = (&settings.router, &settings.cluster.tls);
        Self {
            grpc_listen: Some(router.grpc_listen),
            http_listen: Some(router.http_listen),
            tls_certificate: shown(router.tls.certificate.as_deref()),
            tls_key: shown(router.tls.key.as_deref()),
            tls_client_ca: shown(router.tls.client_ca.as_deref()),
            keys_file: shown(router.keys_file.as_deref()),
            jwt: JwtFlags::from(settings),
            cluster_secret_file: shown(settings.cluster.secret_file.as_deref()),
            cluster_tls_ca: shown(cluster.ca.as_deref()),
            cluster_tls_certificate: shown(cluster.certificate.as_deref()),
            cluster_tls_key: shown(cluster.key.as_deref()),
            registration: Some(router.registration),
            registration_hold_s: Some(router.registration_hold_s.as_secs_f64()),
            dns_interval_s: Some(router.dns.interval_s.as_secs_f64()),
            dns_hold_s: Some(router.dns.hold_s.as_secs_f64()),
            requests_max: Some(router.limits.requests_max),
            prompt_bytes_max: Some(router.limits.prompt_bytes_max),
            queue_requests_max: Some(router.queue.requests_max),
            queue_tokens_max: Some(router.queue.tokens_max),
            queue_bytes_max: Some(router.queue.bytes_max),
            queue_key_requests_max: Some(router.queue.key_requests_max),
            queue_wait_max_s: Some(router.queue.wait_max_s.as_secs_f64()),
            http_head_timeout_s: Some(router.http.head_timeout_s.as_secs_f64()),
            http_body_timeout_s: Some(router.http.body_timeout_s.as_secs_f64()),
            http_write_timeout_s: Some(router.http.write_timeout_s.as_secs_f64()),
            http_keep_alive_s: Some(router.http.keep_alive_s.as_secs_f64()),
            connection_age_max_s: Some(router.connection_age_max_s.as_secs_f64()),
            resume_grace_s: Some(router.resume_grace_s.as_secs_f64()),
            withdraw_grace_s: Some(router.withdraw_grace_s.as_secs_f64()),
            router_drain_grace_s: Some(router.drain_grace_s.as_secs_f64()),
        }
    }
}

/// Who chose a process's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartedBy {
    /// A person or a service manager: variables count.
    User,
    /// A supervisor, which has read the variables itself and passes what it made of them as flags.
    Supervisor,
}

impl StartedBy {
    /// From the hidden flag of supervised processes.
    #[must_use]
    pub const fn supervised(supervised: bool) -> Self {
        if supervised { Self::Supervisor } else { Self::User }
    }
}

/// All layers of a subcommand's configuration: its file, this process's variables, its flags.
///
/// # Errors
/// Everything that is wrong with them, at once.
pub fn load(by: StartedBy, file: &FileFlag, flags: &[&dyn ConfigFlags]) -> Result<Settings, settings::Error> {
    Ok(load_traced(by, file, flags)?.settings)
}

/// As [`load`], with the origin of every value.
///
/// # Errors
/// As [`load`].
pub fn load_traced(
    by: StartedBy,
    file: &FileFlag,
    flags: &[&dyn ConfigFlags],
) -> Result<Loaded, settings::Error> {
    let mut sources = Sources { files: file.config.clone(), ..Sources::default() };
    sources.flags = flags.iter().flat_map(|group| group.flags()).collect();
    if by == StartedBy::User {
        sources.environment = environment();
    }
    Settings::load_traced(&sources)
}

/// The variables of this process that are text; no other can be one of ours.
fn environment() -> Vec<(String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}
