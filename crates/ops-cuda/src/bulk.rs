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
/// Rows of a, and rows of w, of a tile.
pub(crate) const BULK_ROWS: u32 = 128;
pub(crate) const BULK_OUTS: u32 = 256;
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
    pub(crate) fn load(module: &Module) -> Result<Self, Error> {
        let functions = [module.function("gemm_bulk_plain")?, module.function("gemm_bulk_gated")?];
        functions.into_iter().try_for_each(|function| function.allow_shared(SHARED))?;
        Ok(Self { functions })
    }

    pub(crate) fn launch(self, device: &Device, product: &BulkProduct) -> Result<(), Error> {
        let &BulkProduct { gemm, gated, row_tiles, a_rows, w_rows, c_by_place } = product;
        let k = gemm.k as usize;
        let params = GemmBulkParams {
            gemm,
            c_by_place: u32::from(c_by_place),
            // Half a tile's rows of w in a copy: those of the gates, then those of the ups, where there are both.
            w: TensorMap::new(gemm.w, [k, w_rows], [COPIED, BULK_OUTS / 2])?,
            a: TensorMap::new(gemm.a, [k, a_rows], [COPIED, BULK_ROWS])?,
        };
        // As many as the card holds at once; each takes one tile after the other.
        let blocks = device.multiprocessors.min(row_tiles * gemm.n.div_ceil(BULK_OUTS));
        let grid = Grid { blocks: (blocks, 1, 1), threads: THREADS, shared: SHARED };
        device.launch_early(self.functions[usize::from(gated)], grid, &params)
    }
}
