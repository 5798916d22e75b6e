//! Weights of seeded numbers, made on the card by a kernel that is compiled at the first of them.

use ops::{Dummy, DummyPiece, Error};

use crate::attention::KvLayer;
use crate::backend::CudaBackend;
use crate::device::{Function, Grid, Module};
use crate::kernels::{Address, DummyParams, Source};
use crate::tensor::{Weight, size};

/// Threads of a block, and blocks in a grid's second direction at most.
const THREADS: u32 = 256;
const GRID_ROWS_MAX: usize = 65_535;
/// A KV cache is filled in rows of this many numbers.
const KV_COLUMNS: usize = 1 << 12;
/// √3: numbers uniform in ± this have variance 1.
const UNIT_VARIANCE: f32 = 1.732_050_8;
const OP: &str = "dummy_weight";

/// The kernel, and what keeps it loaded.
#[derive(Debug)]
pub(crate) struct DummyKernel {
    fill: Function,
    _module: Module,
}

impl DummyKernel {
    fn load(backend: &CudaBackend) -> Result<Self, crate::Error> {
        let module = backend.device().module(&Source::dummy(backend.storage()))?;
        Ok(Self { fill: module.function("dummy")?, _module: module })
    }
}

impl CudaBackend {
    pub(crate) fn make_dummy(&mut self, dummy: &Dummy) -> Result<Weight, Error> {
        let weight = Weight::reserve(self.device(), &dummy.shape, self.storage())?;
        let made: usize = dummy.pieces.iter().map(|piece| piece.rows * piece.cols).sum();
        if made > dummy.elements() {
            let detail = format!("pieces of {made} elements for the shape {:?}", dummy.shape);
            return Err(Error::Shape { op: OP, detail });
        }
        let each = self.storage().bytes();
        let mut out = weight.address();
        for piece in &dummy.pieces {
            self.make_piece(out, piece, (dummy.centre, dummy.scale))?;
            out += (piece.rows * piece.cols * each) as u64;
        }
        // Vocabulary padding.
        let rest = dummy.elements() - made;
        if rest > 0 {
            self.device().zero(out, rest * each)?;
        }
        Ok(weight)
    }

    pub(crate) fn make_dummy_kv(&mut self, kv: &KvLayer, seed: u64) -> Result<(), Error> {
        let (address, bytes) = (kv.planes().address(), kv.planes().bytes());
        let elements = usize::try_from(bytes).unwrap_or(usize::MAX) / self.storage().bytes();
        let (rows, rest) = (elements / KV_COLUMNS, elements % KV_COLUMNS);
        let stride = KV_COLUMNS as u64;
        let whole = DummyPiece { tensor: seed, first: 0, stride, rows, cols: KV_COLUMNS };
        self.make_piece(address, &whole, (0.0, UNIT_VARIANCE))?;
        let done = rows * KV_COLUMNS;
        let last = DummyPiece { first: done as u64, rows: 1, cols: rest, ..whole };
        self.make_piece(address + (done * self.storage().bytes()) as u64, &last, (0.0, UNIT_VARIANCE))
    }

    fn make_piece(&mut self, out: Address, piece: &DummyPiece, around: (f32, f32)) -> Result<(), Error> {
        self.device().bind()?;
        if self.dummy.is_none() {
            self.dummy = Some(DummyKernel::load(self)?);
        }
        let Some(kernel) = &self.dummy else { unreachable!("the kernel was just loaded") };
        let params = DummyParams {
            out,
            tensor: piece.tensor,
            first: piece.first,
            stride: piece.stride,
            rows: piece.rows as u64,
            cols: size(OP, piece.cols)?,
            centre: around.0,
            scale: around.1,
        };
        let rows = size(OP, piece.rows.min(GRID_ROWS_MAX))?;
        let grid = Grid::new(params.cols.div_ceil(THREADS), rows, THREADS);
        self.device().launch(kernel.fill, grid, &params)?;
        // Weights are read before a kernel waits for the one before it.
        self.device().unchain();
        Ok(())
    }
}
