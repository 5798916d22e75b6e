//! What a resident weight is made of: blocks of the checkpoint's tensors, one below the other.

use std::mem::take;
use std::ops::Range;

use half::bf16;
use ops::{HostMemory, HostPart, HostTensor};
use rayon::prelude::*;
use safetensors::Dtype;
use types::{Bytes, DType};

use crate::catalogue::{Catalogue, HEAD};
use crate::checkpoint::{Block, Checkpoint, Element, stored_bytes};
use crate::config::ModelConfig;
use crate::error::Error;
use crate::layout::{self, Slot};
use crate::load::Meter;
use crate::shard::ShardPlan;

/// Elements read by one task: large enough to keep a disk busy, small enough to share out one matrix.
const BAND_ELEMENTS: usize = 1 << 20;

/// A resident weight and where its rows come from.
pub(crate) struct Assembly {
    pub(crate) slot: Slot,
    /// What it is kept in on the device.
    dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// From the first row down; rows after the last piece are zero (vocabulary padding).
    pub(crate) pieces: Vec<Piece>,
}

pub(crate) struct Piece {
    pub(crate) tensor: String,
    pub(crate) block: Block,
    /// Bytes of one element on disk.
    stored: usize,
}

/// One task: a few rows of a piece and their place in the weight.
struct Band<'a> {
    piece: &'a Piece,
    block: Block,
    /// Number of its first element within the weight.
    first: usize,
}

/// Consecutive elements of a weight that are handed over at once: some bands, or padding.
pub(crate) struct Part<'a> {
    first: usize,
    elements: usize,
    bands: Vec<Band<'a>>,
}

impl Assembly {
    /// Bytes this rank reads for it.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| (piece.block.elements() * piece.stored) as u64).sum()
    }

    /// Bytes of it on the device.
    pub(crate) fn bytes(&self) -> Bytes {
        Bytes((self.elements() * self.dtype.bytes()) as u64)
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Reads it whole, in parallel.
    pub(crate) fn read(&self, checkpoint: &Checkpoint, meter: &Meter<'_>) -> Result<HostTensor, Error> {
        let mut host = HostTensor::zeros(self.dtype, &self.shape);
        match &mut host {
            HostTensor::F32 { data, .. } => fill(checkpoint, &self.bands(BAND_ELEMENTS), data, meter)?,
            HostTensor::BF16 { data, .. } => fill(checkpoint, &self.bands(BAND_ELEMENTS), data, meter)?,
        }
        Ok(host)
    }

    /// The parts it is read in when none may be larger than `bytes_max`; together they are all of it.
    pub(crate) fn parts(&self, bytes_max: usize) -> Vec<Part<'_>> {
        let most = (bytes_max / self.dtype.bytes()).max(1);
        let mut parts: Vec<Part<'_>> = Vec::new();
        let mut end = 0;
        for band in self.bands(BAND_ELEMENTS.min(most)) {
            let elements = band.block.elements();
            assert!(elements <= most, "a row is smaller than what a device takes at once");
            end = band.first + elements;
            match parts.last_mut() {
                Some(part) if part.elements + elements <= most => {
                    part.elements += elements;
                    part.bands.push(band);
                }
                _ => parts.push(Part { first: band.first, elements, bands: vec![band] }),
            }
        }
        let whole = self.elements();
        let padding = (end..whole).step_by(most);
        parts.extend(padding.map(|first| Part {
            first,
            elements: most.min(whole - first),
            bands: Vec::new(),
        }));
        parts
    }

    /// Reads one part, in parallel, into memory of the device's.
    pub(crate) fn read_part(
        &self,
        part: &Part<'_>,
        memory: &dyn HostMemory,
        (checkpoint, meter): (&Checkpoint, &Meter<'_>),
    ) -> Result<HostPart, Error> {
        let bytes = part.elements * self.dtype.bytes();
        let mut lent = memory.take();
        let out = &mut lent.as_mut_slice()[..bytes];
        match (part.bands.is_empty(), self.dtype) {
            // The vocabulary's; what was in the memory is another part.
            (true, _) => out.fill(0),
            (false, DType::F32) => {
                fill::<f32>(checkpoint, &part.bands, bytemuck::cast_slice_mut(out), meter)?;
            }
            (false, DType::BF16) => {
                fill::<bf16>(checkpoint, &part.bands, bytemuck::cast_slice_mut(out), meter)?;
            }
        }
        Ok(HostPart { first: part.first, bytes, memory: lent })
    }

    /// Bands of so many elements or one row each.
    fn bands(&self, elements: usize) -> Vec<Band<'_>> {
        let mut first = 0;
        let mut bands = Vec::new();
        for piece in &self.pieces {
            let Block { matrix, rows, cols } = &piece.block;
            let step = (elements / cols.len().max(1)).max(1);
            for start in rows.clone().step_by(step) {
                let block =
                    Block { matrix: *matrix, rows: start..(start + step).min(rows.end), cols: cols.clone() };
                let elements = block.elements();
                bands.push(Band { piece, block, first });
                first += elements;
            }
        }
        bands
    }
}

/// Reads bands that follow each other into `out`, which begins where the first does.
fn fill<T: Element>(
    checkpoint: &Checkpoint,
    bands: &[Band<'_>],
    out: &mut [T],
    meter: &Meter<'_>,
) -> Result<(), Error> {
    let mut rest = out;
    let mut tasks = Vec::with_capacity(bands.len());
    for band in bands {
        let (now, later) = take(&mut rest).split_at_mut(band.block.elements());
        tasks.push((band, now));
        rest = later;
    }
    tasks.into_par_iter().try_for_each(|(band, out)| {
        checkpoint.read(&band.piece.tensor, &band.block, out)?;
        meter.advance(Bytes((band.block.elements() * band.piece.stored) as u64));
        Ok(())
    })
}

/// Builds the assemblies of one rank.
pub(crate) struct Assembler<'a> {
    /// Element type of a tensor of the checkpoint.
    pub(crate) stored: &'a dyn Fn(&str) -> Option<Dtype>,
    pub(crate) catalogue: &'a Catalogue,
    pub(crate) config: &'a ModelConfig,
    pub(crate) plan: &'a ShardPlan,
    /// The dtype a weight stored as this is kept in.
    pub(crate) kept: &'a dyn Fn(DType) -> DType,
}

impl Assembler<'_> {
    /// What `slot` is made of on this rank.
    pub(crate) fn assembly(&self, slot: Slot) -> Assembly {
        let names = self.catalogue.names();
        let pieces = match slot {
            Slot::Embed => vec![self.rows(names.embed(), self.plan.vocab.clone())],
            Slot::Head => vec![self.rows(HEAD.to_owned(), self.plan.vocab.clone())],
            Slot::FinalNorm => vec![self.rows(names.final_norm(), 0..1)],
            Slot::Layer(layer, part) => self.part(layer, part),
        };
        let stored_bf16 = |piece: &Piece| (self.stored)(&piece.tensor) == Some(Dtype::BF16);
        // A rank with nothing but padding reads no piece of its own; the tensor is named all the same.
        let stored = if pieces.iter().all(stored_bf16) { DType::BF16 } else { DType::F32 };
        Assembly { slot, dtype: (self.kept)(stored), shape: slot.shape(self.config, self.plan), pieces }
    }

    fn part(&self, layer: usize, part: layout::Part) -> Vec<Piece> {
        let plan = self.plan;
        let rows = |module: &str, rows: &Range<usize>| {
            self.rows(self.catalogue.names().layer(layer, module), rows.clone())
        };
        let heads =
            |heads: &Range<usize>| heads.start * self.config.head_dim..heads.end * self.config.head_dim;
        let down = |module: &str, cols: Range<usize>| {
            let tensor = self.catalogue.names().layer(layer, module);
            vec![self.piece(tensor, 0, 0..self.config.hidden_size, cols)]
        };
        let gate_up = |module: &str, width: &Range<usize>| {
            ["gate", "up"].map(|matrix| rows(&format!("{module}.{matrix}_proj"), width)).into()
        };
        let present = "a plan has the parts its layers need";
        match part {
            layout::Part::Norm => vec![rows("input_layernorm", &(0..1))],
            layout::Part::Qkv => vec![
                rows("self_attn.q_proj", &heads(&plan.query_heads)),
                rows("self_attn.k_proj", &heads(&plan.kv_heads)),
                rows("self_attn.v_proj", &heads(&plan.kv_heads)),
            ],
            layout::Part::O => down("self_attn.o_proj", heads(&plan.query_heads)),
            layout::Part::DenseGateUp => gate_up("mlp", plan.dense.as_ref().expect(present)),
            layout::Part::DenseDown => down("mlp.down_proj", plan.dense.clone().expect(present)),
            layout::Part::Router => vec![rows("mlp.gate", &(0..self.config.moe.expect(present).experts))],
            layout::Part::ExpertsGateUp => self.experts_gate_up(layer),
            layout::Part::ExpertsDown => self.experts_down(layer),
            layout::Part::SharedGateUp => gate_up("mlp.shared_experts", plan.shared.as_ref().expect(present)),
            layout::Part::SharedDown => {
                down("mlp.shared_experts.down_proj", plan.shared.clone().expect(present))
            }
        }
    }

    fn experts_gate_up(&self, layer: usize) -> Vec<Piece> {
        let (Some(shard), Some(moe)) = (&self.plan.experts, &self.config.moe) else { return Vec::new() };
        let names = self.catalogue.names();
        let fused = names.form(layer).gate_up_fused;
        let hidden = self.config.hidden_size;
        let piece = |(expert, (at, matrix)): (usize, (usize, &str))| {
            if !fused {
                return self.rows(names.expert(layer, expert, matrix), shard.width.clone());
            }
            let first = at * moe.intermediate_size;
            let rows = first + shard.width.start..first + shard.width.end;
            self.piece(names.fused_gate_up(layer), expert, rows, 0..hidden)
        };
        let both = |expert| [(expert, (0, "gate")), (expert, (1, "up"))];
        self.plan.held(layer).flat_map(both).map(piece).collect()
    }

    fn experts_down(&self, layer: usize) -> Vec<Piece> {
        let Some(shard) = &self.plan.experts else { return Vec::new() };
        let names = self.catalogue.names();
        let fused = names.form(layer).down_fused;
        let piece = |expert: usize| {
            let (tensor, matrix) = if fused {
                (names.fused_down(layer), expert)
            } else {
                (names.expert(layer, expert, "down"), 0)
            };
            self.piece(tensor, matrix, 0..self.config.hidden_size, shard.width.clone())
        };
        self.plan.held(layer).map(piece).collect()
    }

    /// Whole rows, all as wide as the residual stream.
    fn rows(&self, tensor: String, rows: Range<usize>) -> Piece {
        self.piece(tensor, 0, rows, 0..self.config.hidden_size)
    }

    fn piece(&self, tensor: String, matrix: usize, rows: Range<usize>, cols: Range<usize>) -> Piece {
        let dtype = (self.stored)(&tensor).and_then(stored_bytes);
        let stored = dtype.expect("the catalogue holds only tensors that can be read");
        Piece { tensor, block: Block { matrix, rows, cols }, stored }
    }
}
