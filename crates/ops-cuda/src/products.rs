//! Products with dense weights, and what follows them: gates, sums, the residual stream with its norm in one launch.

use ops::{Error, Norm};
use types::DType;

use crate::backend::CudaBackend;
use crate::bulk::{BULK_OUTS, BULK_ROWS, BulkProduct};
use crate::device::Grid;
use crate::kernels::{GemmParams, ResidualNormParams, SharesParams, SkinnyParams, SumParams, SwigluParams};
use crate::loaded::{TILE_OUTS, Tiles, tiles_shared};
use crate::tensor::{Tensor, Weight, size};

/// Rows up to which the tensor cores read weights past shared memory.
const FEW_ROWS: usize = 64;
/// Rows up to which they do so also for a weight of very many rows, such as the head.
const FEW_ROWS_OF_MANY: usize = 16;
/// What "very many" is.
const MANY_OUTS: u32 = 16_384;
/// Blocks of each multiprocessor that a product's tiles are cut into along K, K's pieces of 64 that make a block worth
/// it, and blocks of one tile at most.
const SHARED_BLOCKS_EACH: u32 = 2;
const SHARE_PIECES: u32 = 8;
const SHARES_MAX: u32 = 4;
/// Vectors of a row that a thread keeps at most (KEPT) times threads of a block, in the kernels of norms.
const NORM_VECTORS_MAX: usize = 4 * 256;

impl CudaBackend {
    pub(crate) fn product(&self, x: &Tensor, weight: &Weight, out: DType) -> Result<Tensor, Error> {
        let (outs, inner) = weight.dims2("linear")?;
        x.expect("linear", inner, self.storage())?;
        let y = Tensor::new(self.device(), x.rows(), outs, out)?;
        let params = SkinnyParams {
            y: y.address(),
            x: x.address(),
            w: weight.address(),
            rows: size("linear", x.rows())?,
            outs: size("linear", outs)?,
            inner: size("linear", inner)?,
            y_f32: y.is_f32(),
        };
        match self.device().kernels.tiles {
            Some(tiles) if x.rows() > 1 && inner.is_multiple_of(8) => self.tiled(tiles, &params)?,
            _ => self.skinny(&params)?,
        }
        Ok(y)
    }

    /// Without the tensor cores.
    fn skinny(&self, params: &SkinnyParams) -> Result<(), Error> {
        let kernels = &self.device().kernels;
        let &SkinnyParams { rows, outs, inner, .. } = params;
        let vector = 16 / self.storage().bytes() as u32;
        let (function, each, outs_each) = match rows {
            _ if !inner.is_multiple_of(vector) => (kernels.skinny_unaligned, 1, 1),
            0..=1 => (kernels.skinny[0], 1, 1),
            2 => (kernels.skinny[1], 2, 2),
            3..=4 => (kernels.skinny[2], 4, 2),
            _ => (kernels.skinny[3], 8, 2),
        };
        let grid = Grid::new(outs.div_ceil(4 * outs_each), rows.div_ceil(each), 128);
        Ok(self.device().launch_early(function, grid, params)?)
    }

    fn tiled(&self, tiles: Tiles, params: &SkinnyParams) -> Result<(), Error> {
        let &SkinnyParams { rows, outs, inner, .. } = params;
        let few = if outs >= MANY_OUTS { FEW_ROWS_OF_MANY } else { FEW_ROWS };
        if rows as usize <= few {
            let (which, outs_each, rows_each) = match rows {
                0..=8 => (0, 16, 8),
                9..=16 => (1, 16, 16),
                17..=32 => (2, 32, 32),
                _ => (3, 32, 64),
            };
            let grid = Grid {
                blocks: (outs.div_ceil(outs_each), rows.div_ceil(rows_each), 1),
                threads: 256,
                shared: tiles_shared(outs_each, rows_each),
            };
            return Ok(self.device().launch_early(tiles.skinny[which], grid, params)?);
        }
        let gemm = GemmParams {
            c: params.y,
            a: params.x,
            w: params.w,
            sorted: 0,
            tile_expert: 0,
            tiles: 0,
            m: rows,
            n: outs,
            k: inner,
            a_divisor: 1,
            c_f32: params.y_f32,
        };
        // The warpgroup tiles pay where they occupy most of the card.
        let row_tiles = rows.div_ceil(BULK_ROWS);
        let occupied = 4 * row_tiles * outs.div_ceil(BULK_OUTS) >= 3 * self.device().multiprocessors;
        match tiles.bulk.filter(|_| occupied && rows > 64 && outs.is_multiple_of(8)) {
            Some(bulk) => {
                let product = BulkProduct {
                    gemm,
                    gated: false,
                    row_tiles,
                    a_rows: rows as usize,
                    w_rows: outs as usize,
                    c_by_place: false,
                };
                Ok(bulk.launch(self.device(), &product)?)
            }
            None => self.shared_tiles(tiles, gemm),
        }
    }

    /// Through shared memory; several blocks share a tile's K where its tiles alone leave much of the card empty.
    fn shared_tiles(&self, tiles: Tiles, params: GemmParams) -> Result<(), Error> {
        let device = self.device();
        let (row_tiles, out_tiles) = (params.m.div_ceil(tiles.gemm.rows), params.n.div_ceil(TILE_OUTS));
        let fit = SHARED_BLOCKS_EACH * device.multiprocessors / (row_tiles * out_tiles);
        let shares = fit.min(params.k / (64 * SHARE_PIECES)).clamp(1, SHARES_MAX);
        if shares == 1 || !params.n.is_multiple_of(4) {
            return Ok(tiles.gemm.launch(device, (row_tiles, params.n, 1), &params)?);
        }
        let count = params.m * params.n;
        let parts = Tensor::new(device, shares as usize, count as usize, DType::F32)?;
        let product = GemmParams { c: parts.address(), c_f32: 1, ..params };
        tiles.gemm.launch(device, (row_tiles, params.n, shares), &product)?;
        let sum = SharesParams { c: params.c, parts: parts.address(), count, shares, c_f32: params.c_f32 };
        Ok(device.launch_early(tiles.add_shares, Grid::over(count as usize / 4), &sum)?)
    }

    /// x += sum + scale · more, in place, and its norm; `None` for rows or types that the kernel does not take. A sum over
    /// ranks that was left open is ended on the way.
    pub(crate) fn residual_norm_at_once(
        &self,
        x: &Tensor,
        (sum, more): (&Tensor, Option<(&Tensor, f32)>),
        (weight, norm): (&Weight, Norm),
    ) -> Result<Option<Tensor>, Error> {
        let width = weight.dims1("residual_norm")?;
        if let Some(open) = self.device().take_open(sum.address()) {
            let like = |t: &Tensor, dtype| (t.rows(), t.width(), t.dtype()) == (sum.rows(), width, dtype);
            let parts = like(sum, DType::F32) && more.is_none_or(|(more, _)| like(more, DType::F32));
            if !parts || !like(x, self.storage()) {
                let detail = format!("{x:?}, {sum:?} and a weight of {width} do not go together");
                return Err(Error::Shape { op: "residual_norm", detail });
            }
            let out = self.tensor(x.rows(), width)?;
            open.end((x, &out), (sum, more), (weight, norm))?;
            return Ok(Some(out));
        }
        let vector = 16 / self.storage().bytes();
        let fits = width.is_multiple_of(vector) && width / vector <= NORM_VECTORS_MAX;
        let alike = |t: &Tensor| (t.rows(), t.width(), t.dtype()) == (x.rows(), x.width(), DType::F32);
        let summands = alike(sum) && more.is_none_or(|(more, _)| alike(more));
        if !fits || !summands || (x.width(), x.dtype()) != (width, self.storage()) {
            return Ok(None);
        }
        let out = self.tensor(x.rows(), width)?;
        let (eps, layer) = match norm {
            Norm::Rms { eps } => (eps, 0),
            Norm::Layer { eps } => (eps, 1),
        };
        let params = ResidualNormParams {
            x: x.address(),
            out: out.address(),
            sum: sum.address(),
            more: more.map_or(0, |(more, _)| more.address()),
            weight: weight.address(),
            width: size("residual_norm", width)?,
            scale: more.map_or(0.0, |(_, scale)| scale),
            eps,
            layer,
        };
        let grid = Grid::new(size("residual_norm", x.rows())?, 1, 256);
        self.device().launch_early(self.device().kernels.residual_norm, grid, &params)?;
        Ok(Some(out))
    }

    pub(crate) fn gated(&self, gate_up: &Tensor) -> Result<Tensor, Error> {
        if !gate_up.width().is_multiple_of(2) || gate_up.dtype() != self.storage() {
            let detail = format!("rows of {} {} are not gate and up", gate_up.width(), gate_up.dtype());
            return Err(Error::Shape { op: "swiglu", detail });
        }
        let width = gate_up.width() / 2;
        let out = self.tensor(gate_up.rows(), width)?;
        let params = SwigluParams {
            out: out.address(),
            gate_up: gate_up.address(),
            rows: gate_up.rows() as u64,
            width: size("swiglu", width)?,
        };
        self.device().launch(self.device().kernels.swiglu, Grid::over(out.elements()), &params)?;
        Ok(out)
    }

    /// out = a + scale · b, into `out`, which may be `a`.
    pub(crate) fn sum(&self, out: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<(), Error> {
        let params = SumParams {
            out: out.address(),
            a: a.address(),
            b: b.address(),
            count: a.elements() as u64,
            scale,
            out_f32: out.is_f32(),
            a_f32: a.is_f32(),
            b_f32: b.is_f32(),
        };
        Ok(self.device().launch(self.device().kernels.sum, Grid::over(a.elements()), &params)?)
    }
}
