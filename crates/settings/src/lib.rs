//! The one typed configuration tree. Layers, later ones win: defaults, the cluster file (TOML or YAML), environment
//! variables (`COHORT__GROUP__KV_TOKENS=65536` sets `group.kv_tokens`), flags. Unknown keys and bad values stop the
//! start, and every mistake is listed at once with the file, variable or flag it came from.
#![forbid(unsafe_code)]

mod check;
mod convert;
mod error;
mod load;
mod strict;
mod tree;

pub use convert::RankPlace;
pub use error::{Complaint, Error};
pub use load::{FILE_BYTES_MAX, Flag, Sources};
pub use tree::{Cluster, Group, HttpListen, Model, Router, RouterLimits, Settings};
