//! Fingerprints: of what a model computes, which all groups of a cluster share, and of what else the ranks of one group must
//! agree on.

use sha2::{Digest, Sha256};
use types::{DType, TpSize};

use crate::checkpoint::Checkpoint;
use crate::config::{CONFIG_FILE, GENERATION_FILE, ModelConfig};
use crate::error::Error;

/// Hashes what decides which tokens a request gets: the configuration files, the checkpoint's tensors (names, shapes, types;
/// not their elements), the compute dtype, and whatever the caller has changed of it. How many ranks compute it, and
/// what they have room for, is left out: a request may go on at a group with another plan.
///
/// # Errors
/// When a configuration file cannot be read.
pub fn config_hash(checkpoint: &Checkpoint, dtype: DType, changed: &[u8]) -> Result<[u8; 32], Error> {
    let mut hash = Sha256::new();
    for file in [CONFIG_FILE, GENERATION_FILE] {
        match checkpoint.files().read(file)? {
            Some(content) => field(&mut hash, &content),
            None => hash.update([0]),
        }
    }
    let entries: Vec<_> = checkpoint.names().filter_map(|name| checkpoint.entry(name)).collect();
    hash.update((entries.len() as u64).to_le_bytes());
    for entry in entries {
        field(&mut hash, entry.name.as_bytes());
        field(&mut hash, entry.dtype.to_string().as_bytes());
        hash.update((entry.shape.len() as u64).to_le_bytes());
        for size in &entry.shape {
            hash.update((*size as u64).to_le_bytes());
        }
    }
    field(&mut hash, dtype.name().as_bytes());
    field(&mut hash, changed);
    Ok(hash.finalize().into())
}

/// As [`config_hash`] for a model of dummy weights, which has no checkpoint: its configuration stands for it.
#[must_use]
pub fn dummy_hash(config: &ModelConfig, dtype: DType) -> [u8; 32] {
    let mut hash = Sha256::new();
    field(&mut hash, b"dummy weights");
    field(&mut hash, format!("{config:?}").as_bytes());
    field(&mut hash, dtype.name().as_bytes());
    hash.finalize().into()
}

/// What the ranks of one group must agree on: what they compute, the number of them, and whatever else the caller says.
/// Ranks whose hashes differ must not compute together.
#[must_use]
pub fn group_hash(config_hash: [u8; 32], size: TpSize, extra: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    field(&mut hash, &config_hash);
    hash.update(size.get().to_le_bytes());
    field(&mut hash, extra);
    hash.finalize().into()
}

/// With its length in front, so that no two lists of fields run together to the same bytes; the 1 tells an empty
/// field from none.
fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update([1]);
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}
