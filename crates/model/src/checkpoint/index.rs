//! Which files hold the tensors: one `model.safetensors`, or shards named by `model.safetensors.index.json`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::files::{Blob, Files};
use super::header::{Header, TensorEntry};
use crate::error::Error;
use crate::strict_json;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const WEIGHT_MAP: &str = "weight_map";
/// Shards of one checkpoint: fifty times the most in use, and within the descriptors a process may open.
const SHARDS_MAX: usize = 1000;

/// The open files of a checkpoint, and which tensor is in which.
pub(super) struct Located {
    pub(super) shards: Vec<Blob>,
    /// By name: index into `shards`, and the tensor's entry there.
    pub(super) tensors: BTreeMap<String, (usize, TensorEntry)>,
}

/// Opens every weight file of a checkpoint and checks that they and the index agree.
pub(super) fn locate(files: &Files) -> Result<Located, Error> {
    if let Some(blob) = files.open(SINGLE)? {
        if files.open(INDEX)?.is_some() {
            tracing::warn!("{}: reading {SINGLE}, ignoring {INDEX} beside it", files.place());
        }
        let header = header(&blob)?;
        let tensors = header.tensors.into_iter().map(|entry| (entry.name.clone(), (0, entry))).collect();
        return Ok(Located { shards: vec![blob], tensors });
    }
    let Some(index) = files.read(INDEX)? else {
        return Err(Error::Missing { file: format!("{} (or {INDEX})", files.path(SINGLE)) });
    };
    let file = files.path(INDEX);
    let root = strict_json::object(&index).map_err(|reason| Error::Json { file: file.clone(), reason })?;
    let failed = |problems| Error::Index { file: file.clone(), problems };
    let map = weight_map(&root).map_err(failed)?;
    let shards: BTreeMap<&str, &str> = map.iter().map(|(tensor, shard)| (*shard, *tensor)).collect();
    if shards.len() > SHARDS_MAX {
        return Err(failed(vec![format!("names {} shards, more than {SHARDS_MAX}", shards.len())]));
    }
    let mut opened = Vec::with_capacity(shards.len());
    let mut missing = Vec::new();
    for (shard, tensor) in shards {
        match files.open(shard)? {
            Some(blob) => opened.push((shard, header(&blob)?, blob)),
            None => {
                missing.push(format!("shard {shard} does not exist, and tensor {tensor} should be in it"))
            }
        }
    }
    if !missing.is_empty() {
        return Err(failed(missing));
    }
    merge(&map, opened).map_err(failed)
}

fn header(blob: &Blob) -> Result<Header, Error> {
    Header::read(blob.name(), blob.len(), |out, offset| blob.read_exact_at(out, offset))
}

/// Tensor name to shard name.
fn weight_map(root: &Map<String, Value>) -> Result<BTreeMap<&str, &str>, Vec<String>> {
    let Some(Value::Object(map)) = root.get(WEIGHT_MAP) else {
        return Err(vec![format!("`{WEIGHT_MAP}` must be an object from tensor to file")]);
    };
    let mut places = BTreeMap::new();
    let mut problems = Vec::new();
    for (tensor, shard) in map {
        match shard.as_str() {
            // A shard is a file beside the index; a path could name any file of the machine.
            Some(name) if !name.is_empty() && !name.contains(['/', '\\', '\0']) && !name.starts_with('.') => {
                places.insert(tensor.as_str(), name);
            }
            _ => problems.push(format!(
                "tensor {tensor} is said to be in {}, which is not the name of a file beside the index",
                strict_json::kind(shard)
            )),
        }
    }
    if problems.is_empty() { Ok(places) } else { Err(problems) }
}

fn merge(map: &BTreeMap<&str, &str>, opened: Vec<(&str, Header, Blob)>) -> Result<Located, Vec<String>> {
    let mut located = Located { shards: Vec::with_capacity(opened.len()), tensors: BTreeMap::new() };
    let mut problems = Vec::new();
    for (at, (shard, header, blob)) in opened.into_iter().enumerate() {
        for entry in header.tensors {
            match map.get(entry.name.as_str()) {
                Some(place) if *place == shard => {
                    located.tensors.insert(entry.name.clone(), (at, entry));
                }
                Some(place) => {
                    problems.push(format!("tensor {} is in {shard}, and the index says {place}", entry.name));
                }
                None => problems.push(format!("tensor {} of {shard} is not in the index", entry.name)),
            }
        }
        located.shards.push(blob);
    }
    for (tensor, shard) in map {
        if !located.tensors.contains_key(*tensor) {
            problems.push(format!("tensor {tensor} is not in {shard}, where the index says it is"));
        }
    }
    if problems.is_empty() { Ok(located) } else { Err(problems) }
}
