//! The one typed configuration tree. Layers, later ones win: defaults, the cluster files (TOML or YAML), environment
//! variables (`COHORT__GROUP__KV_TOKENS=65536` sets `group.kv_tokens`), flags. Unknown keys and bad values stop the
//! start, and every mistake is listed at once with the file and line, variable or flag it came from.
#![forbid(unsafe_code)]

mod check;
mod convert;
mod describe;
mod error;
mod layers;
mod lines;
mod load;
mod reload;
mod schema;
mod strict;
mod telemetry;
mod tree;
mod weights;

pub use convert::RankPlace;
pub use describe::{Key, Section};
pub use error::{Complaint, Error, Origin};
pub use layers::{FILE_BYTES_MAX, Flag, Sources};
pub use load::Loaded;
pub use reload::{Changed, Role};
pub use telemetry::{LogFormat, Telemetry};
pub use tree::{
    Cluster, ClusterTls, Group, HttpListen, Model, Router, RouterDns, RouterHttp, RouterJwt, RouterLimits,
    RouterQueue, Settings, Tls,
};
