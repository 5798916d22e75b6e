//! Weights of seeded numbers in place of a checkpoint's, made where they live. An element depends on its tensor and its
//! place in the whole tensor alone, so every sharding of a model, on every device, holds the same model.

use std::collections::BTreeSet;

use half::bf16;
use types::DType;

use crate::HostTensor;

/// Elements of one [`DummyBand`] at most: large enough that sharing them out costs nothing.
const BAND_ELEMENTS: usize = 1 << 18;

/// A resident weight to be made: `centre + scale · u`, u uniform in -1..1, rounded to bf16 whatever it is kept in.
#[derive(Debug, Clone, PartialEq)]
pub struct Dummy {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Mean of the elements.
    pub centre: f32,
    /// Largest distance from it.
    pub scale: f32,
    /// From the first element on; elements after the last piece are zero (vocabulary padding).
    pub pieces: Vec<DummyPiece>,
}

/// A rectangle of a tensor of the whole model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DummyPiece {
    /// Which tensor: any number that tells tensors apart.
    pub tensor: u64,
    /// Its first element, counted in the whole tensor.
    pub first: u64,
    /// Elements of the whole tensor from one row to the next.
    pub stride: u64,
    /// Rows wanted.
    pub rows: usize,
    /// Columns wanted.
    pub cols: usize,
}

/// Some rows of a piece, and their place in the weight.
#[derive(Debug)]
pub struct DummyBand<'a> {
    piece: DummyPiece,
    centre: f32,
    scale: f32,
    out: &'a mut [bf16],
}

/// A number in -1..1 for element `index` of tensor `tensor`: 24 bits of SplitMix64's output function, exact in f32. The
/// same sums are in `crates/ops-cuda/kernels/dummy.cu`.
#[inline]
#[must_use]
pub fn dummy_unit(tensor: u64, index: u64) -> f32 {
    let mut z = tensor.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 40) as f32 * (1.0 / 8_388_608.0) - 1.0
}

/// The experts that rows of router logits [rows, experts] choose: the `top_k` largest of each (the lowest expert on a
/// tie), each once, ascending.
#[must_use]
pub fn chosen(logits: &[f32], experts: usize, top_k: usize) -> BTreeSet<usize> {
    let choices = |row: &[f32]| {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        order.truncate(top_k);
        order
    };
    logits.chunks(experts.max(1)).flat_map(choices).collect()
}

impl Dummy {
    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The parts of `out`, which holds all elements, to be filled one by one or in parallel.
    ///
    /// # Panics
    /// When `out` is smaller than the pieces.
    #[must_use]
    pub fn bands<'a>(&self, out: &'a mut [bf16]) -> Vec<DummyBand<'a>> {
        let (centre, scale) = (self.centre, self.scale);
        let mut rest = out;
        let mut bands = Vec::new();
        for piece in &self.pieces {
            let step = (BAND_ELEMENTS / piece.cols.max(1)).max(1);
            for start in (0..piece.rows).step_by(step) {
                let rows = step.min(piece.rows - start);
                let first = piece.first + start as u64 * piece.stride;
                let (now, later) = rest.split_at_mut(rows * piece.cols);
                bands.push(DummyBand {
                    piece: DummyPiece { first, rows, ..*piece },
                    centre,
                    scale,
                    out: now,
                });
                rest = later;
            }
        }
        bands
    }

    /// All of it in host memory, kept in `dtype`.
    #[must_use]
    pub fn host(&self, dtype: DType) -> HostTensor {
        let mut data = vec![bf16::ZERO; self.elements()];
        self.bands(&mut data).into_iter().for_each(DummyBand::fill);
        let shape = self.shape.clone();
        match dtype {
            DType::BF16 => HostTensor::BF16 { shape, data },
            DType::F32 => HostTensor::F32 { shape, data: data.into_iter().map(bf16::to_f32).collect() },
        }
    }
}

impl DummyBand<'_> {
    /// Writes its elements.
    #[inline]
    pub fn fill(self) {
        let Self { piece, centre, scale, out } = self;
        if piece.cols == 0 {
            return;
        }
        for (row, out) in out.chunks_exact_mut(piece.cols).enumerate() {
            let first = piece.first + row as u64 * piece.stride;
            for (index, out) in (first..).zip(out) {
                *out = bf16::from_f32(centre + scale * dummy_unit(piece.tensor, index));
            }
        }
    }
}
