//! Rotary embedding, KV append and paged attention.

use ops::{Error, KvLayerSpec, Rope, Window};
use types::DType;

use crate::backend::CudaBackend;
use crate::bulk::{COPIED, TensorMap};
use crate::device::{Function, Grid, Module};
use crate::kernels::{Address, AppendParams, AttendParams, AttendTokenParams, AttendWideParams, Source};
use crate::memory::Resident;
use crate::step::TILE_ROWS;
use crate::tensor::{Tensor, size};

/// Query heads that one block handles at most: their sums stay in registers.
const GROUP_MAX: usize = 8;
/// Warps of a block of `attend` and of `attend_token`.
const WARPS: u32 = 4;
const TOKEN_WARPS: u32 = 4;
/// Keys that make a range of their own worth a block.
const RANGE_KEYS: u32 = 32;
const RANGES_MAX: u32 = 128;
/// Ranges of one token on the tensor cores: a lane of the merging warp has one each.
const TOKEN_RANGES_MAX: u32 = 32;
/// Rows from which a thread turns a pair of several heads.
const SHARED_ANGLE_ROWS: usize = 64;
/// The first counter that attention may use.
const FIRST_COUNTER: usize = 1;
/// Blocks per multiprocessor that keep memory busy.
const BLOCKS_EACH: u32 = 4;
/// Keys of a step of `attend_wide`, and stages on their way; a multiple of how many heads it takes together.
const WIDE_KEYS: u32 = 128;
const WIDE_STAGES: usize = 2;
const WIDE_HEADS: usize = 4;
/// Keys of one copy: a swizzled group of rows at least.
const WIDE_CHUNK_MIN: u32 = 8;
const WIDE_CHUNK_MAX: u32 = 64;
/// Numbers of a head that one lane holds at most, times the lanes of a warp.
const HEAD_DIM_MAX: usize = 512;

/// One layer's keys and values: two planes of [blocks, K, block tokens, D].
#[derive(Debug)]
pub struct KvLayer {
    spec: KvLayerSpec,
    planes: Resident,
}

impl KvLayer {
    /// Zeroed, so that a block's unwritten places hold numbers.
    pub(crate) fn new(backend: &CudaBackend, spec: &KvLayerSpec) -> Result<Self, Error> {
        if spec.kv_heads == 0 || !spec.query_heads.is_multiple_of(spec.kv_heads) || !fits(spec.head_dim) {
            let detail = format!(
                "{} query heads over {} key/value heads of {}: heads must divide, and a head be even and at most \
                 {HEAD_DIM_MAX}",
                spec.query_heads, spec.kv_heads, spec.head_dim
            );
            return Err(Error::Shape { op: "kv_layer", detail });
        }
        let bytes = 2 * plane_bytes(spec, backend.storage());
        let planes = backend.device().resident("a layer's keys and values", bytes)?;
        backend.device().zero(planes.address(), bytes)?;
        Ok(Self { spec: *spec, planes })
    }

    pub(crate) const fn planes(&self) -> &Resident {
        &self.planes
    }

    fn keys(&self) -> Address {
        self.planes.address()
    }

    fn values(&self) -> Address {
        self.planes.address() + self.planes.bytes() / 2
    }
}

/// Rotation needs pairs; 16-byte pieces or smaller ones must fill a head with a warp's lanes.
const fn fits(head_dim: usize) -> bool {
    head_dim > 0
        && head_dim.is_multiple_of(2)
        && (head_dim <= 64 || head_dim.is_multiple_of(8))
        && head_dim <= HEAD_DIM_MAX
}

fn plane_bytes(spec: &KvLayerSpec, dtype: DType) -> usize {
    spec.blocks * spec.kv_heads * spec.block_size.tokens() as usize * spec.head_dim * dtype.bytes()
}

/// The kernels for one shape of heads.
#[derive(Debug)]
pub(crate) struct AttentionKernels {
    append: Function,
    attend: Function,
    /// On the tensor cores, for heads they can take: single tokens, and prompts.
    tiles: Option<[Function; 2]>,
    /// Single tokens, with half as many heads together.
    half: Option<Function>,
    /// Prompts on Hopper's warpgroup tensor cores.
    wide: Option<Function>,
    merge: Function,
    _module: Module,
}

/// What a compiled attention is for: head dimension, query heads handled together.
pub(crate) type HeadShape = (usize, usize);

/// The largest number of query heads that share a key/value head and divide evenly into blocks.
pub(crate) fn head_shape(spec: &KvLayerSpec) -> HeadShape {
    heads_together(spec.head_dim, spec.query_heads, spec.kv_heads)
}

/// As [`head_shape`] of these counts.
pub(crate) fn heads_together(head_dim: usize, query_heads: usize, kv_heads: usize) -> HeadShape {
    let shared = query_heads / kv_heads.max(1);
    let group = (1..=GROUP_MAX).rev().find(|&group| shared.is_multiple_of(group)).unwrap_or(1);
    (head_dim, group)
}

impl AttentionKernels {
    pub(crate) fn load(backend: &CudaBackend, (head_dim, group): HeadShape) -> Result<Self, crate::Error> {
        let module = backend.device().module(&Source::attention(backend.storage(), head_dim, group))?;
        let tiles = if tiled(backend.storage(), head_dim) {
            let functions = [module.function("attend_token")?, module.function("attend_prompt")?];
            functions[1].allow_shared(prompt_shared(head_dim, group))?;
            Some(functions)
        } else {
            None
        };
        let halves = tiles.is_some() && group.is_multiple_of(2);
        Ok(Self {
            half: halves.then(|| module.function("attend_token_half")).transpose()?,
            wide: if tiles.is_some() && backend.device().is_hopper() && group.is_multiple_of(WIDE_HEADS) {
                let function = module.function("attend_wide")?;
                function.allow_shared(wide_shared(head_dim, group))?;
                Some(function)
            } else {
                None
            },
            append: module.function("append")?,
            attend: module.function("attend")?,
            tiles,
            merge: module.function("merge")?,
            _module: module,
        })
    }
}

/// Whether the kernel file has the tensor-core kernel for these heads.
fn tiled(dtype: DType, head_dim: usize) -> bool {
    dtype == DType::BF16 && head_dim.is_multiple_of(64) && head_dim <= 128
}

/// Bytes of shared memory of `attend_prompt`: a tile's queries, and two stages of keys and values.
fn prompt_shared(head_dim: usize, group: usize) -> u32 {
    let step_keys = if head_dim > 64 { 32 } else { 64 };
    ((TILE_ROWS * group + 2 * 2 * step_keys) * head_dim * 2) as u32
}

/// Bytes of shared memory of `attend_wide`: a tile's queries, and its stages of keys and values, aligned.
fn wide_shared(head_dim: usize, group: usize) -> u32 {
    ((TILE_ROWS * group + 2 * WIDE_STAGES * WIDE_KEYS as usize) * head_dim * 2 + 1024) as u32
}

/// Tokens of a block that one copy takes; `None` where the swizzle has no room for so few.
fn chunk(block_tokens: u32) -> Option<u32> {
    let whole = 1 << block_tokens.trailing_zeros();
    (whole >= WIDE_CHUNK_MIN).then(|| whole.min(WIDE_CHUNK_MAX))
}

/// Base of the frequencies (its bits) and head dimension.
pub(crate) type RopeKey = (u32, usize);

/// 1 / theta^(2i/D) for i in 0..D/2, as every backend computes it.
pub(crate) fn frequencies(rope: Rope, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 1.0 / rope.theta.powf((2 * i) as f32 / head_dim as f32)).collect()
}

impl CudaBackend {
    pub(crate) fn attend(
        &mut self,
        qkv: &Tensor,
        kv: &KvLayer,
        rope: Option<Rope>,
        window: Window,
    ) -> Result<Tensor, Error> {
        let spec = kv.spec;
        let (rows, d) = (self.step().rows(), spec.head_dim);
        qkv.expect("attention", (spec.query_heads + 2 * spec.kv_heads) * d, self.storage())?;
        if qkv.rows() != rows {
            let detail = format!("{} rows in a step of {rows}", qkv.rows());
            return Err(Error::Shape { op: "attention", detail });
        }
        self.step().check_tables(&spec, window)?;
        self.note((spec, window));
        let turns = rope.map(|rope| self.turns(rope, d)).transpose()?;
        let shape = head_shape(&spec);
        let queries = self.tensor(rows, spec.query_heads * d)?;
        let heads = size("attention", spec.query_heads + 2 * spec.kv_heads)?;
        let kernels = self.attention_kernels(shape)?;
        let append = AppendParams {
            q: queries.address(),
            keys: kv.keys(),
            values: kv.values(),
            qkv: qkv.address(),
            position: self.step().positions(),
            sequence: self.step().sequence_of_row(),
            tables: self.step().tables(spec.group),
            turns: turns.unwrap_or(0),
            qkv_f32: qkv.is_f32(),
            query_heads: size("attention", spec.query_heads)?,
            kv_heads: size("attention", spec.kv_heads)?,
            block_tokens: spec.block_size.tokens(),
            rope: u32::from(turns.is_some()),
        };
        let threads = size("attention", (d / 2).next_multiple_of(32).min(128))?;
        if !self.appends_on_the_way(kernels) {
            // Many rows fill the card by themselves, and an angle then serves several heads.
            let shares = if rows < SHARED_ANGLE_ROWS { heads } else { heads.min(2) };
            let grid = Grid::new(size("attention", rows)?, shares, threads);
            self.device().launch_early(kernels.append, grid, &append)?;
        }
        self.device().mark_branch()?;
        self.attend_ranges(kernels, &queries, &append, (shape, window, kv))
    }

    /// Whether all rows are turned and appended by the launch that attends: where each is alone in its sequence.
    fn appends_on_the_way(&self, kernels: &AttentionKernels) -> bool {
        kernels.tiles.is_some() && self.step().tiles().1 == 0
    }

    /// Single tokens and prompts by kernels of their own where the tensor cores can take the heads; else a launch over
    /// rows and ranges of keys, and one that merges the ranges.
    fn attend_ranges(
        &self,
        kernels: &AttentionKernels,
        queries: &Tensor,
        append: &AppendParams,
        ((d, group), window, kv): (HeadShape, Window, &KvLayer),
    ) -> Result<Tensor, Error> {
        let rows = size("attention", queries.rows())?;
        let groups = append.query_heads / size("attention", group)?;
        let out = self.tensor(queries.rows(), queries.width())?;
        let params = AttendParams {
            out: out.address(),
            parts: 0,
            q: queries.address(),
            keys: append.keys,
            values: append.values,
            position: append.position,
            sequence: append.sequence,
            tables: append.tables,
            query_heads: append.query_heads,
            kv_heads: append.kv_heads,
            block_tokens: append.block_tokens,
            window: match window {
                Window::All => 0,
                Window::Keys(keys) => keys,
            },
            ranges: 1,
            rows,
            singles: 0,
            tiles: 0,
            arrived: 0,
        };
        match kernels.tiles {
            Some([token, prompt]) => {
                let qkv = if self.appends_on_the_way(kernels) { append.qkv } else { 0 };
                let params =
                    AttendTokenParams { attend: params, qkv, turns: append.turns, rope: append.rope };
                self.attend_tokens((token, kernels.half), params, (d, groups))?;
                let params = params.attend;
                self.attend_prompts(kernels, prompt, params, (((d, group), groups), kv))?;
            }
            None => {
                let ranges = self.ranges(rows * groups, RANGE_KEYS, params.window);
                let parts = self.parts(&params, ranges, d)?;
                let params = AttendParams { parts: address_of(parts.as_ref()), ranges, ..params };
                let grid = Grid { blocks: (rows, groups, ranges), threads: WARPS * 32, shared: 0 };
                self.device().launch(kernels.attend, grid, &params)?;
                if ranges > 1 {
                    let grid = Grid::new(rows, params.query_heads, 256);
                    self.device().launch(kernels.merge, grid, &params)?;
                }
            }
        }
        Ok(out)
    }

    /// Ranges of keys that give every multiprocessor several blocks; in a recorded step whatever the contexts are.
    fn ranges(&self, blocks: u32, keys_each: u32, window: u32) -> u32 {
        let wanted = (BLOCKS_EACH * self.device().multiprocessors).div_ceil(blocks.max(1)).min(RANGES_MAX);
        if self.step().is_padded() {
            return wanted;
        }
        let keys = match window {
            0 => self.step().longest(),
            keys => self.step().longest().min(keys),
        };
        wanted.min(keys.div_ceil(keys_each)).max(1)
    }

    /// Room for what each range sums.
    fn parts(&self, params: &AttendParams, ranges: u32, d: usize) -> Result<Option<Tensor>, Error> {
        if ranges == 1 {
            return Ok(None);
        }
        let each = params.query_heads as usize * ranges as usize * (d + 2);
        Ok(Some(Tensor::new(self.device(), params.rows as usize, each, DType::F32)?))
    }

    /// Rows that are alone in their sequence; the last block of each merges its ranges.
    fn attend_tokens(
        &self,
        (whole, half): (Function, Option<Function>),
        token: AttendTokenParams,
        (d, groups): (usize, u32),
    ) -> Result<(), Error> {
        let (singles, count) = self.step().singles();
        if count == 0 {
            return Ok(());
        }
        // So few blocks that half of the card would stay empty.
        let rows = size("attention", count)?;
        let half = half.filter(|_| 2 * rows * groups * TOKEN_RANGES_MAX <= self.device().multiprocessors);
        let groups = if half.is_some() { 2 * groups } else { groups };
        let function = half.unwrap_or(whole);
        let blocks = rows * groups;
        let counters = self.device().counters(FIRST_COUNTER, blocks as usize);
        let target = if blocks * TOKEN_RANGES_MAX <= self.device().multiprocessors { 1 } else { 2 };
        let wanted = (target * self.device().multiprocessors).div_ceil(blocks).min(TOKEN_RANGES_MAX);
        let ranges = if counters.is_some() { wanted } else { 1 };
        let params = AttendParams { rows, ..token.attend };
        let parts = self.parts(&params, ranges, d)?;
        let params = AttendParams {
            parts: address_of(parts.as_ref()),
            ranges,
            singles,
            arrived: counters.unwrap_or(0),
            ..params
        };
        let params = AttendTokenParams { attend: params, ..token };
        let grid = Grid { blocks: (ranges, groups, rows), threads: TOKEN_WARPS * 32, shared: 0 };
        Ok(self.device().launch_early(function, grid, &params)?)
    }

    /// Rows of longer runs, in tiles of one sequence each.
    fn attend_prompts(
        &self,
        kernels: &AttentionKernels,
        function: Function,
        params: AttendParams,
        (((d, group), groups), kv): ((HeadShape, u32), &KvLayer),
    ) -> Result<(), Error> {
        let (tiles, count) = self.step().tiles();
        let count = size("attention", count)?;
        if count == 0 {
            return Ok(());
        }
        // One or two blocks fit on a multiprocessor; a range has a few steps of keys at least.
        let wanted = (self.device().multiprocessors * 2).div_ceil((count * groups).max(1));
        let ranges = wanted.min(self.ranges(1, 4 * RANGE_KEYS, params.window));
        let params = AttendParams { rows: count * TILE_ROWS as u32, ..params };
        let parts = self.parts(&params, ranges, d)?;
        let params = AttendParams { parts: address_of(parts.as_ref()), ranges, tiles, ..params };
        match kernels.wide.zip(chunk(params.block_tokens)) {
            Some((wide, chunk)) => {
                let heads = size("attention", group)?;
                let rows = kv.spec.blocks * kv.spec.kv_heads * params.block_tokens as usize;
                let plane = |address| TensorMap::new(address, [d, rows], [COPIED, chunk]);
                let queries = [d, params.query_heads as usize, self.step().rows()];
                let wide_params = AttendWideParams {
                    attend: params,
                    chunk,
                    q: TensorMap::new(params.q, queries, [COPIED, heads, TILE_ROWS as u32])?,
                    keys: plane(params.keys)?,
                    values: plane(params.values)?,
                };
                // As many blocks as the card holds at once; each takes one tile after the other.
                let blocks = self.device().multiprocessors.min(count * groups * ranges);
                let threads = (TILE_ROWS as u32 * heads / 64 + 1) * 128;
                let grid = Grid { blocks: (blocks, 1, 1), threads, shared: wide_shared(d, group) };
                self.device().launch_early(wide, grid, &wide_params)?;
            }
            None => {
                let threads = size("attention", if group % 2 == 0 { group / 2 } else { group })? * 32;
                let grid = Grid { blocks: (count, groups, ranges), threads, shared: prompt_shared(d, group) };
                self.device().launch(function, grid, &params)?;
            }
        }
        if ranges > 1 {
            let grid = Grid::new(params.rows, params.query_heads, 256);
            self.device().launch(kernels.merge, grid, &params)?;
        }
        Ok(())
    }
}

fn address_of(parts: Option<&Tensor>) -> Address {
    parts.map_or(0, Tensor::address)
}
