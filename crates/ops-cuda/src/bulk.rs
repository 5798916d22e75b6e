//! Hopper's copy engine: how matrices are described to it, and the products whose tiles it brings.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};

use crate::Error;
use crate::device::{Device, Function, Grid, Module};
use crate::kernels::{Address, GemmBulkParams, GemmParams};

/// Numbers of bf16 in the 128 bytes that one copy takes of a row.
pub(crate) const COPIED: u32 = 64;
/// Rows of a that one copy takes.
const COPIED_ROWS: u32 = 128;
/// Threads of a block: one warpgroup brings, two multiply.
const THREADS: u32 = 384;
/// Bytes of shared memory: four stages of (128 + 256) × 64 bf16, and room to align them.
const SHARED: u32 = 4 * (128 + 256) * 64 * 2 + 1024;

/// How a tensor lies in memory and what one copy takes of it, in the driver's form.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorMap([u64; 16]);

impl TensorMap {
    /// A tensor of bf16 at `address` without gaps: `dims` numbers, innermost first, of which one copy takes `copied`.
    /// Past the end of a dimension a copy has zeros.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver refuses: the address is not a multiple of 16, rows are not whole 16 bytes.
    pub(crate) fn new<const RANK: usize>(
        address: Address,
        dims: [usize; RANK],
        copied: [u32; RANK],
    ) -> Result<Self, Error> {
        let dims = dims.map(|numbers| numbers as u64);
        let mut stride = 2;
        // Of every dimension but the innermost, which follows without a gap.
        let strides = dims.map(|numbers| {
            stride *= numbers;
            stride
        });
        let mut map = MaybeUninit::<CUtensorMap>::uninit();
        // SAFETY: every pointer is to RANK elements that outlive the call, which only computes; `map` is written
        // whenever it succeeds.
        let map = unsafe {
            cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                RANK as u32,
                address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                copied.as_ptr(),
                [1; RANK].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .map_err(Error::driver("cuTensorMapEncodeTiled"))?;
            map.assume_init()
        };
        Ok(Self(map.opaque))
    }
}

/// A product whose tiles the copy engine brings, plain and gated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BulkTiles {
    functions: [Function; 2],
    /// Rows of a that a block, or a pair of blocks, takes.
    pub(crate) rows: u32,
    /// Rows of w.
    outs: u32,
    /// Blocks that share a tile of w.
    blocks: u32,
}

/// What a product is of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BulkProduct {
    /// Sizes and addresses.
    pub(crate) gemm: GemmParams,
    /// c = silu(a · gateᵀ) · (a · upᵀ), for rows of `a` that are looked up.
    pub(crate) gated: bool,
    /// Tiles of rows.
    pub(crate) row_tiles: u32,
    /// Rows that `a` has, and rows of all matrices `w`.
    pub(crate) a_rows: usize,
    pub(crate) w_rows: usize,
    /// A result's row is its place among the sorted rows.
    pub(crate) c_by_place: bool,
}

impl BulkTiles {
    /// Blocks of 128 rows and 256 outs.
    pub(crate) fn single(module: &Module) -> Result<Self, Error> {
        Self::load(module, ["gemm_bulk_plain", "gemm_bulk_gated"], (128, 256, 1))
    }

    /// Pairs of blocks of as much, which share weights.
    pub(crate) fn pair(module: &Module) -> Result<Self, Error> {
        Self::load(module, ["gemm_pair_plain", "gemm_pair_gated"], (256, 256, 2))
    }

    fn load(module: &Module, names: [&str; 2], (rows, outs, blocks): (u32, u32, u32)) -> Result<Self, Error> {
        let functions = [module.function(names[0])?, module.function(names[1])?];
        functions.into_iter().try_for_each(|function| function.allow_shared(SHARED))?;
        Ok(Self { functions, rows, outs, blocks })
    }

    /// Tiles of `rows` rows and `outs` outs, in blocks.
    pub(crate) const fn blocks(&self, rows: u32, outs: u32) -> u32 {
        rows.div_ceil(self.rows) * outs.div_ceil(self.outs) * self.blocks
    }

    pub(crate) fn launch(&self, device: &Device, product: &BulkProduct) -> Result<(), Error> {
        let &BulkProduct { gemm, gated, row_tiles, a_rows, w_rows, c_by_place } = product;
        let k = gemm.k as usize;
        let params = GemmBulkParams {
            gemm,
            c_by_place: u32::from(c_by_place),
            w: TensorMap::new(gemm.w, [k, w_rows], [COPIED, self.outs / 2])?,
            a: TensorMap::new(gemm.a, [k, a_rows], [COPIED, COPIED_ROWS])?,
        };
        // As many as the card holds at once; each takes one tile after the other.
        let room = device.multiprocessors / self.blocks;
        let blocks = room.min(row_tiles * gemm.n.div_ceil(self.outs)) * self.blocks;
        let grid = Grid { blocks: (blocks, 1, 1), threads: THREADS, shared: SHARED };
        device.launch_early(self.functions[usize::from(gated)], grid, &params)
    }
}
