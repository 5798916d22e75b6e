//! What the weights of a model without a checkpoint are made of: the slices a rank would read, as places in tensors of
//! seeded numbers.

use std::collections::BTreeMap;

use ops::{Dummy, DummyPiece};
use safetensors::Dtype;
use types::DType;

use crate::assemble::{Assembler, Piece};
use crate::catalogue::Catalogue;
use crate::config::ModelConfig;
use crate::layout::{Part, Slot, slots};
use crate::shard::ShardPlan;

/// How far a norm's weights are from 1.
const NORM_SPREAD: f32 = 0.1;

type Shapes = BTreeMap<String, Vec<usize>>;

/// All weights of the plan's rank, in the order of the layout.
pub(crate) fn weights(config: &ModelConfig, plan: &ShardPlan) -> Vec<(Slot, Dummy)> {
    let catalogue = Catalogue::published(config);
    let shapes = catalogue.names().expected(config);
    let (stored, kept) = (|_: &str| Some(Dtype::BF16), |_| DType::BF16);
    let assembler = Assembler { stored: &stored, catalogue: &catalogue, config, plan, kept: &kept };
    let make = |slot: Slot| {
        let assembly = assembler.assembly(slot);
        let (centre, scale) = distribution(slot, &assembly.pieces, &shapes);
        let pieces = assembly.pieces.iter().map(|piece| place(piece, &shapes)).collect();
        (slot, Dummy { shape: assembly.shape, centre, scale, pieces })
    };
    slots(config).into_iter().map(make).collect()
}

/// Norms scatter around 1; a matrix keeps the size of its input: uniform with variance 1 / inputs. The inputs are those
/// of the whole tensor, so a rank's slice holds the values of the whole.
fn distribution(slot: Slot, pieces: &[Piece], shapes: &Shapes) -> (f32, f32) {
    match slot {
        Slot::FinalNorm | Slot::Layer(_, Part::Norm) => (1.0, NORM_SPREAD),
        Slot::Embed | Slot::Head | Slot::Layer(..) => {
            let inputs = pieces.first().map_or(1, |piece| columns(piece, shapes)).max(1);
            (0.0, (3.0 / inputs as f32).sqrt())
        }
    }
}

fn shape<'a>(piece: &Piece, shapes: &'a Shapes) -> &'a [usize] {
    shapes.get(&piece.tensor).expect("a published name is one the configuration asks for")
}

fn columns(piece: &Piece, shapes: &Shapes) -> usize {
    shape(piece, shapes).last().copied().unwrap_or(1)
}

fn place(piece: &Piece, shapes: &Shapes) -> DummyPiece {
    let cols = columns(piece, shapes);
    let block = &piece.block;
    DummyPiece {
        tensor: number(&piece.tensor),
        first: (block.rows.start * cols + block.cols.start) as u64,
        stride: cols as u64,
        rows: block.rows.len(),
        cols: block.cols.len(),
    }
}

/// FNV-1a of the tensor's name.
fn number(tensor: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    tensor.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}
