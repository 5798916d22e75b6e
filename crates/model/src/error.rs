//! What can be wrong with a configuration, a checkpoint, a plan or a step: always with the file, field, tensor or
//! layer in it.

use std::fmt;
use std::io;

use safetensors::Dtype;
use types::{Bytes, TpRank};

/// Problems listed in one message; the rest is counted.
const LISTED_MAX: usize = 10;

/// Errors of configuration, checkpoint, sharding, loading and the forward pass.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that could not be opened or read.
    #[error("{file}: cannot {action}: {source}")]
    Io {
        /// The file, with its directory.
        file: String,
        /// What was tried.
        action: &'static str,
        /// The system's words.
        source: io::Error,
    },
    /// A file the model cannot do without.
    #[error("{file} does not exist")]
    Missing {
        /// The file, with its directory.
        file: String,
    },
    /// A small file (configuration, index, tokenizer) too large to be one.
    #[error("{file} holds {found}, more than the {max} such a file may have")]
    TooLarge {
        /// The file, with its directory.
        file: String,
        /// Its size.
        found: Bytes,
        /// The largest size accepted.
        max: Bytes,
    },
    /// A file that is not JSON, or is ambiguous JSON (a key twice).
    #[error("{file} is not a valid JSON object: {reason}")]
    Json {
        /// The file.
        file: String,
        /// What the parser found, with line and column.
        reason: String,
    },
    /// A configuration that is incomplete, contradicts itself or asks for what is not implemented.
    #[error("{file}: {}", listed(complaints))]
    Config {
        /// The file.
        file: String,
        /// Everything that is wrong with it.
        complaints: Vec<Complaint>,
    },
    /// A safetensors file whose header cannot be trusted.
    #[error("{file}: {fault}")]
    Header {
        /// The file.
        file: String,
        /// What is wrong.
        fault: HeaderFault,
    },
    /// An index that does not describe its shards.
    #[error("{file}: {}", listed(problems))]
    Index {
        /// The index.
        file: String,
        /// Everything that is wrong with it.
        problems: Vec<String>,
    },
    /// A checkpoint whose tensors are not the ones the configuration asks for.
    #[error("{place}: the tensors do not match config.json: {}", listed(problems))]
    Tensors {
        /// The checkpoint.
        place: String,
        /// Everything that does not match.
        problems: Vec<TensorProblem>,
    },
    /// A bias of a layer that has none and would be ignored, were it not for this element.
    #[error(
        "tensor {tensor} must be all zero, because this model has no biases: element {element} of {elements} is {value}"
    )]
    Bias {
        /// The bias.
        tensor: String,
        /// The first element that is not zero.
        element: usize,
        /// How many elements it has.
        elements: usize,
        /// The element's value.
        value: f32,
    },
    /// More layers, or fewer, than a model has.
    #[error("{wanted} layers were asked for, and this model has {found}; ask for 1 to {found}")]
    Layers {
        /// What was asked for.
        wanted: usize,
        /// What there is.
        found: usize,
    },
    /// A model that does not divide by this number of ranks.
    #[error("{rank} cannot hold its part of the model: {}; {}", listed(problems), sizes(works))]
    Split {
        /// The rank whose plan was asked for.
        rank: TpRank,
        /// Everything that does not divide.
        problems: Vec<String>,
        /// Tensor-parallel sizes this model does divide by.
        works: Vec<u32>,
    },
    /// Rows can be dispatched only to ranks that hold whole experts.
    #[error(
        "{rank} holds {held} of {experts} experts in part; all-to-all dispatch needs whole experts on each rank \
         (--experts expert)"
    )]
    Dispatch {
        /// Who reports it.
        rank: TpRank,
        /// Experts it holds a part of.
        held: usize,
        /// Experts of a layer.
        experts: usize,
    },
    /// A rank that sent something that is not whole rows.
    #[error("rank {from} sent {count} numbers for this rank's experts; a row has {width}")]
    DispatchCount {
        /// The rank to look at, among all ranks of the group.
        from: u32,
        /// What it sent.
        count: usize,
        /// Numbers of a row: its values, its experts and their weights.
        width: usize,
    },
    /// Sub-groups with rows of their own that the experts' ranks cannot be sent.
    #[error(
        "{rank} belongs to one of {subgroups} data-parallel sub-groups, whose rows differ; they need all-to-all dispatch \
         (--dispatch all-to-all)"
    )]
    Subgroups {
        /// Who reports it.
        rank: TpRank,
        /// Sub-groups of the group.
        subgroups: usize,
    },
    /// A step whose row counts contradict the batch or the plan.
    #[error(
        "{rank} was given {got} rows for the step, and row counts {rows:?} of the sub-groups; this is sub-group {subgroup} of {subgroups}"
    )]
    Rows {
        /// Who reports it.
        rank: TpRank,
        /// Its sub-group.
        subgroup: usize,
        /// Sub-groups of the group.
        subgroups: usize,
        /// Rows of its batch.
        got: usize,
        /// Rows of each sub-group, as it was told.
        rows: Vec<usize>,
    },
    /// A placement of experts that cannot be used.
    #[error("expert placement {}: {}", origin, listed(problems))]
    Placement {
        /// The file, or where else it comes from.
        origin: String,
        /// Everything that is wrong with it.
        problems: Vec<String>,
    },
    /// Counts of chosen experts that cannot be used.
    #[error("expert load {origin}: {reason}")]
    ExpertLoad {
        /// The file, or where else they come from.
        origin: String,
        /// What is wrong with them.
        reason: String,
    },
    /// A backend that did not take a weight.
    #[error("loading {weight}: {source}")]
    Place {
        /// Which weight.
        weight: String,
        /// The backend's words.
        source: ops::Error,
    },
    /// An op that failed.
    #[error(transparent)]
    Ops(#[from] ops::Error),
    /// A rank that is lost, late, or out of step.
    #[error(transparent)]
    Collective(#[from] collectives::Error),
    /// A failure inside one layer of the forward pass.
    #[error("layer {layer}: {source}")]
    Layer {
        /// The layer, from 0.
        layer: usize,
        /// What failed.
        source: Box<Error>,
    },
    /// A sparse layer in a configuration without experts; the parser never builds one.
    #[error("a sparse layer needs a configuration of its experts")]
    MissingMoe,
}

impl Error {
    /// Adds the layer it happened in.
    #[must_use]
    pub fn in_layer(self, layer: usize) -> Self {
        Self::Layer { layer, source: Box::new(self) }
    }
}

/// One refused field of a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// The field, with its path inside the file.
    pub field: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {}", self.field, self.reason)
    }
}

/// What is wrong with a safetensors header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderFault {
    /// Not even room for the header's length.
    #[error(
        "the file has {file_bytes} bytes, and the length of a safetensors header alone takes 8: it is truncated"
    )]
    NoLength {
        /// Size of the file.
        file_bytes: u64,
    },
    /// The header claims more than the file holds.
    #[error(
        "the header claims {claimed} bytes, and the file has {available} after the length: it is truncated or not safetensors"
    )]
    BeyondFile {
        /// Bytes the length prefix asks for.
        claimed: u64,
        /// Bytes after the prefix.
        available: u64,
    },
    /// The header claims more than any header needs.
    #[error("the header claims {claimed} bytes, more than the {max} a header may have")]
    TooLong {
        /// Bytes the length prefix asks for.
        claimed: u64,
        /// The largest header accepted.
        max: u64,
    },
    /// The header is not a JSON object.
    #[error("the header is not a valid JSON object: {reason}")]
    Json {
        /// What the parser found.
        reason: String,
    },
    /// One tensor's entry is wrong.
    #[error("tensor {tensor}: {reason}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Bytes that belong to no tensor.
    #[error("bytes {start} to {end} of the data belong to no tensor")]
    Uncovered {
        /// First byte, counted from the end of the header.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
}

/// One tensor that is not what the configuration asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorProblem {
    /// Not in the checkpoint.
    #[error("{name} {shape:?} is missing")]
    Missing {
        /// The tensor.
        name: String,
        /// The shape it should have.
        shape: Vec<usize>,
    },
    /// In the checkpoint, and no part of this model.
    #[error("{name} {shape:?} is no part of this model")]
    Unknown {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Another shape than the configuration asks for.
    #[error("{name} has shape {found:?}, and config.json asks for {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// The shape the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// An element type that is not read.
    #[error("{name} is stored as {found}, and only F32, BF16 and F16 are read")]
    Dtype {
        /// The tensor.
        name: String,
        /// The element type in the file.
        found: Dtype,
    },
    /// The checkpoint holds the language model under both prefixes.
    #[error("{first} and {second} are both present, and a checkpoint holds one language model")]
    TwoPrefixes {
        /// The embedding under the first prefix.
        first: String,
        /// The embedding under the second.
        second: String,
    },
}

fn listed<T: fmt::Display>(problems: &[T]) -> String {
    let mut text: Vec<String> = problems.iter().take(LISTED_MAX).map(ToString::to_string).collect();
    if problems.len() > LISTED_MAX {
        text.push(format!("and {} more", problems.len() - LISTED_MAX));
    }
    text.join("; ")
}

fn sizes(works: &[u32]) -> String {
    let list: Vec<String> = works.iter().map(ToString::to_string).collect();
    format!("sizes that work: {}", list.join(", "))
}
