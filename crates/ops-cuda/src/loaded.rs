//! The functions of the loaded kernels, and how much shared memory they take.

use types::DType;

use crate::Error;
use crate::bulk::BulkTiles;
use crate::cache::KernelCache;
use crate::check::in_parallel;
use crate::device::{Device, Function, Grid, HOPPER, Module};
use crate::kernels::{GemmParams, Source};
use crate::nvrtc::Compiled;
use crate::sampling::Sampling;

/// Bytes of shared memory of the few-row tiles: what eight warps summed of `outs` times `rows` numbers.
pub(crate) const fn tiles_shared(outs: u32, rows: u32) -> u32 {
    8 * outs * rows * 4
}

/// Rows of w in a tensor-core tile.
pub(crate) const TILE_OUTS: u32 = 128;

/// Bytes of shared memory of the tensor-core tiles: three stages of (rows + columns) × 64 bf16.
const fn gemm_shared(rows: u32) -> u32 {
    3 * (rows + TILE_OUTS) * 64 * 2
}

/// The kernels that every model needs.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) embed: Function,
    pub(crate) sum: Function,
    pub(crate) round: Function,
    pub(crate) swiglu: Function,
    pub(crate) gather: Function,
    pub(crate) norm: Function,
    pub(crate) fill: Function,
    pub(crate) pack: Function,
    pub(crate) unpack: Function,
    pub(crate) combine_rows: Function,
    /// For 1, 2, 4 and 8 rows.
    pub(crate) skinny: [Function; 4],
    pub(crate) skinny_unaligned: Function,
    pub(crate) note: Function,
    pub(crate) residual_norm: Function,
    pub(crate) join_ranks: Function,
    pub(crate) route: Function,
    pub(crate) router: Function,
    pub(crate) route_left: Function,
    pub(crate) expert_up: Function,
    pub(crate) expert_down: Function,
    pub(crate) group_pairs: Function,
    /// As much in two launches.
    pub(crate) group_many: [Function; 2],
    pub(crate) combine: Function,
    pub(crate) sampling: Sampling,
    /// bf16 alone has them.
    pub(crate) tiles: Option<Tiles>,
    _modules: Vec<Module>,
}

/// A product whose tiles go through shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedTiles {
    function: Function,
    pub(crate) rows: u32,
}

impl SharedTiles {
    fn load(module: &Module, name: &str, rows: u32) -> Result<Self, Error> {
        let function = module.function(name)?;
        function.allow_shared(gemm_shared(rows))?;
        Ok(Self { function, rows })
    }

    /// Queues `shares` blocks for each of `tiles` tiles of rows and each tile of `outs`.
    pub(crate) fn launch(
        self,
        device: &Device,
        (tiles, outs, shares): (u32, u32, u32),
        params: &GemmParams,
    ) -> Result<(), Error> {
        let blocks = (tiles, outs.div_ceil(TILE_OUTS), shares);
        let grid = Grid { blocks, threads: 128, shared: gemm_shared(self.rows) };
        device.launch_early(self.function, grid, params)
    }
}

/// Products on the tensor cores.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiles {
    /// Dense, in tiles of 128 rows.
    pub(crate) gemm: SharedTiles,
    /// Adds up what blocks that shared K made.
    pub(crate) add_shares: Function,
    /// By expert, plain and gated, in tiles of 32 and of 64 rows.
    pub(crate) grouped: [[SharedTiles; 2]; 2],
    /// Dense or by expert, for very many rows; Hopper alone has them.
    pub(crate) bulk: Option<BulkTiles>,
    /// For 8, 16, 32 and 64 rows.
    pub(crate) skinny: [Function; 4],
    pub(crate) expert_up: Function,
    pub(crate) expert_down: Function,
}

impl Tiles {
    fn load(gemm: &Module, skinny: &Module, experts: &Module, arch: &str) -> Result<Self, Error> {
        let bulk = if arch == HOPPER { Some(BulkTiles::load(gemm)?) } else { None };
        let load = |name, rows| SharedTiles::load(gemm, name, rows);
        let grouped = [
            [load("gemm32", 32)?, load("gemm32_gated", 32)?],
            [load("gemm64", 64)?, load("gemm64_gated", 64)?],
        ];
        let (gemm, add_shares) = (load("gemm128", 128)?, gemm.function("add_shares")?);
        let skinny = [
            skinny.function("tiles8")?,
            skinny.function("tiles16")?,
            skinny.function("tiles32")?,
            skinny.function("tiles64")?,
        ];
        skinny[3].allow_shared(tiles_shared(32, 64))?;
        let (expert_up, expert_down) =
            (experts.function("expert_up_tiles")?, experts.function("expert_down_tiles")?);
        Ok(Self { gemm, add_shares, grouped, bulk, skinny, expert_up, expert_down })
    }
}

impl Kernels {
    /// Compiles what every model needs, and `more` beside it.
    pub(crate) fn load(
        (dtype, more): (DType, Vec<Source>),
        arch: &str,
        cache: &KernelCache,
    ) -> Result<(Self, Vec<(Source, Compiled)>), Error> {
        let common = Source::common(dtype);
        let count = common.len();
        let all = [common, more].concat();
        // Compiling takes seconds for each file when nothing is kept yet.
        let mut compiled = in_parallel(&all, |source| cache.get(source, arch))?;
        let early = all.into_iter().skip(count).zip(compiled.split_off(count)).collect();
        Ok((Self::of(&compiled, arch)?, early))
    }

    fn of(compiled: &[Compiled], arch: &str) -> Result<Self, Error> {
        let mut modules = compiled.iter().map(Module::of);
        let mut next = || modules.next().unwrap_or_else(|| unreachable!("every model has these files"));
        let (rows, skinny, experts, sample) = (next()?, next()?, next()?, next()?);
        let tiles = modules.next().transpose()?;
        let functions = match &tiles {
            Some(gemm) => Some(Tiles::load(gemm, &skinny, &experts, arch)?),
            None => None,
        };
        Ok(Self {
            embed: rows.function("embed")?,
            sum: rows.function("sum")?,
            round: rows.function("round_to_storage")?,
            swiglu: rows.function("swiglu")?,
            gather: rows.function("gather")?,
            norm: rows.function("norm_rows")?,
            fill: rows.function("fill")?,
            pack: rows.function("pack_rows")?,
            unpack: rows.function("unpack_rows")?,
            combine_rows: rows.function("combine_rows")?,
            note: rows.function("note")?,
            residual_norm: rows.function("residual_norm")?,
            join_ranks: rows.function("join_ranks")?,
            skinny: [
                skinny.function("skinny1")?,
                skinny.function("skinny2")?,
                skinny.function("skinny4")?,
                skinny.function("skinny8")?,
            ],
            skinny_unaligned: skinny.function("skinny_unaligned")?,
            route: experts.function("route")?,
            router: experts.function("router")?,
            route_left: experts.function("route_left")?,
            expert_up: experts.function("expert_up")?,
            expert_down: experts.function("expert_down")?,
            group_pairs: experts.function("group_pairs")?,
            group_many: [experts.function("count_pairs")?, experts.function("place_pairs")?],
            combine: experts.function("combine")?,
            sampling: Sampling::of(&sample)?,
            tiles: functions,
            _modules: [rows, skinny, experts, sample].into_iter().chain(tiles).collect(),
        })
    }
}
