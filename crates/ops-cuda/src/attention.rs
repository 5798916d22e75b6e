//! Rotary embedding, KV append and paged attention.

use ops::{Error, KvLayerSpec, Rope, Window};
use types::DType;

use crate::backend::CudaBackend;
use crate::device::{Function, Grid, Module};
use crate::kernels::{Address, AppendParams, AttendParams, Source};
use crate::memory::DeviceBuffer;
use crate::tensor::{Tensor, size};

/// Query heads that one block handles at most: their sums stay in registers.
const GROUP_MAX: usize = 8;
/// (row, head) pairs of one tile of the tensor cores, and warps of a block.
const TILE_PAIRS: u32 = 16;
const WARPS: u32 = 4;
/// Keys that make a range of their own worth a block.
const RANGE_KEYS: u32 = 32;
const RANGES_MAX: u32 = 128;
/// Blocks per multiprocessor that keep memory busy.
const BLOCKS_EACH: u32 = 4;
/// Numbers of a head that one lane holds at most, times the lanes of a warp.
const HEAD_DIM_MAX: usize = 512;

/// One layer's keys and values: two planes of [blocks, K, block tokens, D].
#[derive(Debug)]
pub struct KvLayer {
    spec: KvLayerSpec,
    planes: DeviceBuffer,
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
        let planes = DeviceBuffer::new("a layer's keys and values", bytes)?;
        backend.device().zero(planes.address(), bytes)?;
        Ok(Self { spec: *spec, planes })
    }

    pub(crate) const fn planes(&self) -> &DeviceBuffer {
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
    /// On the tensor cores, for heads they can take.
    tiles: Option<Function>,
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
        Ok(Self {
            append: module.function("append")?,
            attend: module.function("attend")?,
            tiles: tiled(backend.storage(), head_dim).then(|| module.function("attend_tiles")).transpose()?,
            merge: module.function("merge")?,
            _module: module,
        })
    }
}

/// Whether the kernel file has the tensor-core kernel for these heads.
fn tiled(dtype: DType, head_dim: usize) -> bool {
    dtype == DType::BF16 && head_dim.is_multiple_of(64) && head_dim <= 128
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
            position: self.step().positions()?,
            sequence: self.step().sequence_of_row()?,
            tables: self.step().tables(spec.group)?,
            turns: turns.unwrap_or(0),
            qkv_f32: qkv.is_f32(),
            query_heads: size("attention", spec.query_heads)?,
            kv_heads: size("attention", spec.kv_heads)?,
            block_tokens: spec.block_size.tokens(),
            rope: u32::from(turns.is_some()),
        };
        let threads = size("attention", (d / 2).next_multiple_of(32).min(128))?;
        let grid = Grid::new(size("attention", rows)?, heads, threads);
        self.device().launch(kernels.append, grid, &append)?;
        self.attend_ranges(kernels, &queries, &append, (shape, window))
    }

    /// One launch, or a launch over ranges of keys and one that merges them.
    fn attend_ranges(
        &self,
        kernels: &AttentionKernels,
        queries: &Tensor,
        append: &AppendParams,
        ((d, group), window): (HeadShape, Window),
    ) -> Result<Tensor, Error> {
        let rows = size("attention", queries.rows())?;
        let groups = append.query_heads / size("attention", group)?;
        let (window, keys) = match window {
            Window::All => (0, self.step().longest()),
            Window::Keys(keys) => (keys, self.step().longest().min(keys)),
        };
        // A tile holds several rows of one sequence; single tokens have one each.
        let tokens = if self.step().single_tokens() { 1 } else { TILE_PAIRS / size("attention", group)? };
        let (pieces, tokens) =
            if kernels.tiles.is_some() { (rows.div_ceil(tokens), tokens) } else { (rows, 1) };
        let wanted = (BLOCKS_EACH * self.device().multiprocessors).div_ceil((pieces * groups).max(1));
        let ranges = wanted.min(keys.div_ceil(RANGE_KEYS)).clamp(1, RANGES_MAX);
        let out = self.tensor(queries.rows(), queries.width())?;
        let parts = match ranges {
            1 => None,
            _ => {
                let each = append.query_heads as usize * ranges as usize * (d + 2);
                Some(Tensor::new(self.device(), queries.rows(), each, DType::F32)?)
            }
        };
        let params = AttendParams {
            out: out.address(),
            parts: parts.as_ref().map_or(0, Tensor::address),
            q: queries.address(),
            keys: append.keys,
            values: append.values,
            position: append.position,
            sequence: append.sequence,
            tables: append.tables,
            query_heads: append.query_heads,
            kv_heads: append.kv_heads,
            block_tokens: append.block_tokens,
            window,
            ranges,
            rows,
            tokens,
        };
        let (function, blocks) = match kernels.tiles {
            Some(tiles) => (tiles, ((pieces * ranges).div_ceil(WARPS), groups, 1)),
            None => (kernels.attend, (rows, groups, ranges)),
        };
        self.device().launch(function, Grid { blocks, threads: WARPS * 32, shared: 0 }, &params)?;
        if parts.is_some() {
            self.device().launch(kernels.merge, Grid::new(rows, append.query_heads, 256), &params)?;
        }
        Ok(out)
    }
}
