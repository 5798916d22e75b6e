//! What a router needs to know to start. Plain data: `settings` and the command line fill it in.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use security::{ClientTls, JwtRules, ServerTls, SharedSecret};

use crate::discovery::Names;
use crate::fair::Bounds;
use crate::{Error, Tracing};

/// A router's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where gRPC is served; port 0 takes any free one, which is reported.
    pub grpc_listen: SocketAddr,
    /// Where HTTP is served, if at all; port 0 as above.
    pub http_listen: Option<SocketAddr>,
    /// The leaders of the worker groups, each `http://host:port`, and names of which every address is a leader, each
    /// `dns+http://name:port`; at least one, unless groups register.
    pub workers: Vec<String>,
    /// Shares of the requests, by address or by name as in `workers`; 1 for all others. A group of weight 0 gets no new
    /// requests and finishes its own.
    pub weights: BTreeMap<String, u32>,
    /// How names are asked for.
    pub names: Names,
    /// How long a group that registers is remembered without hearing of it; `None` takes no registrations.
    pub registration_hold: Option<Duration>,
    /// Name the model is served under; `None` takes the name the groups report.
    pub model_name: Option<String>,
    /// Bounds on what is taken in.
    pub limits: Limits,
    /// How old a gRPC caller's connection may become before it is told to open another one; zero for any age.
    pub connection_age_max: Duration,
    /// How long a request that lost its group waits for a group that goes on with it; zero ends it at once.
    pub resume_grace: Duration,
    /// How long HTTP callers are waited for.
    pub http_patience: HttpPatience,
    /// After the order to stop: how long requests are still taken while health says NOT_SERVING, so that load
    /// balancers turn away before anybody is refused.
    pub withdraw_grace: Duration,
    /// After that: how long open requests may go on before they are ended with UNAVAILABLE.
    pub drain_grace: Duration,
    /// Who may call, and as whom the groups are called.
    pub access: Access,
    /// Which requests are traced.
    pub tracing: Tracing,
}

/// Who may call a router, and as whom it calls the groups. The default: everybody, and as nobody.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Files for TLS on both listeners; plain text without.
    pub tls: Option<ServerTls>,
    /// The file of API keys; without it no key is asked for.
    pub keys: Option<PathBuf>,
    /// Whose tokens are believed beside the keys; without it none are.
    pub jwt: Option<JwtRules>,
    /// Files for TLS to groups whose address is `https://`.
    pub group_tls: Option<ClientTls>,
    /// The cluster's secret, shown to every group.
    pub secret: Option<SharedSecret>,
}

/// Bounds on what a router takes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most requests admitted at once; above it they wait.
    pub requests_max: u32,
    /// Most bytes of a prompt: its text, or all messages of a chat together.
    pub prompt_bytes_max: usize,
    /// Of those that wait to be admitted; above it they are refused with RESOURCE_EXHAUSTED.
    pub queue: QueueLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self { requests_max: 512, prompt_bytes_max: 4 << 20, queue: QueueLimits::default() }
    }
}

/// Bounds on the requests that wait to be admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Most requests that wait; 0 refuses what cannot be admitted at once.
    pub requests_max: u32,
    /// Most tokens they may cost together: their prompts and all they may generate.
    pub tokens_max: u64,
    /// Most bytes of their prompts.
    pub bytes_max: usize,
    /// Most requests of one API key that wait.
    pub key_requests_max: u32,
    /// Longest wait.
    pub wait_max: Duration,
}

impl QueueLimits {
    /// Nobody waits.
    pub const NONE: Self =
        Self { requests_max: 0, tokens_max: 0, bytes_max: 0, key_requests_max: 0, wait_max: Duration::ZERO };

    pub(crate) const fn bounds(&self) -> Bounds {
        let Self { requests_max, tokens_max, bytes_max, key_requests_max, .. } = *self;
        Bounds {
            requests: requests_max,
            tokens: tokens_max,
            bytes: bytes_max,
            key_requests: key_requests_max,
        }
    }
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self {
            requests_max: 512,
            tokens_max: 4 << 20,
            bytes_max: 64 << 20,
            key_requests_max: 128,
            wait_max: Duration::from_secs(30),
        }
    }
}

/// How long HTTP callers are waited for before their connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpPatience {
    /// For the whole head of a request, and so also between two requests.
    pub head: Duration,
    /// For the whole body of a request.
    pub body: Duration,
    /// For a caller that reads nothing of what is sent to it. Its request is cancelled then.
    pub write: Duration,
    /// After this much silence a stream says a comment, so that proxies keep its connection.
    pub quiet: Duration,
}

impl Default for HttpPatience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { head: seconds(30), body: seconds(30), write: seconds(30), quiet: seconds(10) }
    }
}

/// The files of a checkpoint that turn text into tokens. All of them may be missing: then only token ids are served.
#[derive(Debug, Clone, Default)]
pub struct ModelFiles {
    /// `tokenizer.json`.
    pub tokenizer_json: Option<Vec<u8>>,
    /// `tokenizer_config.json`.
    pub tokenizer_config_json: Option<Vec<u8>>,
    /// `chat_template.jinja`.
    pub chat_template: Option<String>,
}

impl ModelFiles {
    /// Reads what there is in the checkpoint directory `dir`.
    ///
    /// # Errors
    /// [`Error::Read`] when `dir` is not a directory or a file is there and cannot be read; [`Error::File`] when the
    /// template is not UTF-8.
    pub fn read_dir(dir: &Path) -> Result<Self, Error> {
        std::fs::read_dir(dir).map_err(|source| Error::Read { path: dir.to_owned(), source })?;
        let chat_template = read(&dir.join("chat_template.jinja"))?.map(|bytes| {
            String::from_utf8(bytes)
                .map_err(|error| Error::File { file: "chat_template.jinja", reason: error.to_string() })
        });
        Ok(Self {
            tokenizer_json: read(&dir.join("tokenizer.json"))?,
            tokenizer_config_json: read(&dir.join("tokenizer_config.json"))?,
            chat_template: chat_template.transpose()?,
        })
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path: path.to_owned(), source }),
    }
}
