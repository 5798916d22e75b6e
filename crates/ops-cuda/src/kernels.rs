//! The kernel files, their constants, and what each launch is told. The parameter structs repeat those of the `.cu`
//! files field by field; addresses are device addresses.

use types::DType;

use crate::bulk::TensorMap;

/// A kernel file with its constants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    file: &'static str,
    body: &'static str,
    after: &'static [&'static str],
    defines: Vec<String>,
}

const COMMON: &str = include_str!("../kernels/common.cuh");
const HOPPER: &str = include_str!("../kernels/hopper.cuh");
/// The most ranks whose cards sum through each other's memory: those of a host.
pub(crate) const PEERS_MAX: usize = 8;

impl Source {
    /// The files every model of `dtype` needs, in the order rows, skinny, experts, sample and (in bf16) gemm.
    #[must_use]
    pub fn common(dtype: DType) -> Vec<Self> {
        let mut sources =
            vec![Self::rows(dtype), Self::skinny(dtype), Self::experts(dtype), Self::sample(dtype)];
        if dtype == DType::BF16 {
            sources.push(Self::gemm());
        }
        sources
    }

    /// Embedding, sums, gates, norms.
    #[must_use]
    pub fn rows(dtype: DType) -> Self {
        let body = concat!(include_str!("../kernels/norm.cuh"), include_str!("../kernels/rows.cu"));
        Self::new("rows.cu", body, dtype)
    }

    /// Sums over ranks whose cards see each other's memory.
    #[must_use]
    pub fn peer(dtype: DType) -> Self {
        let body = concat!(include_str!("../kernels/norm.cuh"), include_str!("../kernels/peer.cu"));
        Self::new("peer.cu", body, dtype)
    }

    /// Matrix products of few rows.
    #[must_use]
    pub fn skinny(dtype: DType) -> Self {
        Self::new("skinny.cu", include_str!("../kernels/skinny.cu"), dtype)
    }

    /// Routing and experts.
    #[must_use]
    pub fn experts(dtype: DType) -> Self {
        let body = concat!(include_str!("../kernels/routing.cuh"), include_str!("../kernels/experts.cu"));
        Self::new("experts.cu", body, dtype)
    }

    /// Tokens drawn from logits.
    #[must_use]
    pub fn sample(dtype: DType) -> Self {
        let mut source = Self::new("sample.cu", include_str!("../kernels/sample.cu"), dtype);
        source.after = &[include_str!("../kernels/sample_cut.cu")];
        source
    }

    /// Matrix products of many rows, bf16 only.
    #[must_use]
    pub fn gemm() -> Self {
        let mut source = Self::new("gemm.cu", include_str!("../kernels/gemm.cu"), DType::BF16);
        source.after = &[HOPPER, include_str!("../kernels/gemm_bulk.cu")];
        source
    }

    /// Attention for one head dimension and `group` query heads at a time.
    #[must_use]
    pub fn attention(dtype: DType, head_dim: usize, group: usize) -> Self {
        let mut source = Self::new("attention.cu", include_str!("../kernels/attention.cu"), dtype);
        source.defines.extend([format!("D={head_dim}"), format!("GROUP={group}")]);
        const TILES: &str = include_str!("../kernels/attention_tiles.cu");
        source.after = &[TILES, HOPPER, include_str!("../kernels/attention_wide.cu")];
        source
    }

    /// Weights of seeded numbers.
    #[must_use]
    pub fn dummy(dtype: DType) -> Self {
        Self::new("dummy.cu", include_str!("../kernels/dummy.cu"), dtype)
    }

    fn new(file: &'static str, body: &'static str, dtype: DType) -> Self {
        Self { file, body, after: &[], defines: vec![format!("BF16={}", u8::from(dtype == DType::BF16))] }
    }

    /// File name, for messages.
    #[must_use]
    pub const fn file(&self) -> &'static str {
        self.file
    }

    /// `NAME=value` constants.
    #[must_use]
    pub fn defines(&self) -> &[String] {
        &self.defines
    }

    /// What the compiler reads.
    #[must_use]
    pub fn text(&self) -> String {
        [&[COMMON, self.body], self.after].concat().concat()
    }
}

/// An address in device memory.
pub(crate) type Address = u64;

/// A struct that a kernel takes by value.
///
/// # Safety
/// The type is `repr(C)`, holds only integers and floats (or such a type), and repeats the kernel's struct field by field.
pub(crate) unsafe trait Params: Copy {}

macro_rules! params {
    ($($name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        #[repr(C)]
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $name { $(pub(crate) $field: $kind),* }
        // SAFETY: `repr(C)` over integers and floats or such structs, in the order of the `.cu` file.
        unsafe impl Params for $name {}
    )*};
}

params! {
    EmbedParams { out: Address, table: Address, tokens: Address, drawn: Address, first: u32, rows: u32, width: u32 }
    JoinParams { out: Address, parts: Address, rows: u32, each: u32, width: u32 }
    SumParams { out: Address, a: Address, b: Address, count: u64, scale: f32, out_f32: u32, a_f32: u32, b_f32: u32 }
    NoteParams { at: Address, value: u32 }
    RoundParams { out: Address, x: Address, count: u64 }
    SwigluParams { out: Address, gate_up: Address, rows: u64, width: u32 }
    GatherParams { out: Address, x: Address, which: Address, width: u32, is_f32: u32 }
    NormParams { out: Address, x: Address, weight: Address, width: u32, x_f32: u32, eps: f32, layer: u32 }
    PackParams {
        out: Address, x: Address, experts: Address, weights: Address, source: Address,
        width: u32, top_k: u32, x_f32: u32,
    }
    UnpackParams { x: Address, experts: Address, weights: Address, rows: Address, width: u32, top_k: u32 }
    CombineRowsParams { out: Address, returned: Address, first: Address, place: Address, width: u32 }
    FillParams { out: Address, count: u64, seed: u64, scale: f32 }
    DummyParams {
        out: Address, tensor: u64, first: u64, stride: u64, rows: u64,
        cols: u32, centre: f32, scale: f32,
    }
    SkinnyParams { y: Address, x: Address, w: Address, rows: u32, outs: u32, inner: u32, y_f32: u32 }
    GemmParams {
        c: Address, a: Address, w: Address, sorted: Address, tile_expert: Address, tiles: Address,
        m: u32, n: u32, k: u32, a_divisor: u32, c_f32: u32,
    }
    GemmBulkParams { gemm: GemmParams, c_by_place: u32, w: TensorMap, a: TensorMap }
    SharesParams { c: Address, parts: Address, count: u32, shares: u32, c_f32: u32 }
    RouteParams {
        experts: Address, weights: Address, logits: Address,
        rows: u32, count: u32, top_k: u32, softmax: u32, renormalize: u32, position: Address,
    }
    RouterParams { route: RouteParams, logits: Address, x: Address, w: Address, arrived: Address, hidden: u32 }
    ChooseParams { route: RouteParams, logits: Address }
    ResidualNormParams {
        x: Address, out: Address, sum: Address, more: Address, weight: Address,
        width: u32, scale: f32, eps: f32, layer: u32,
    }
    PeersParams {
        slots: [Address; PEERS_MAX], state: Address, host: Address, rank: u32, ranks: u32, places: u32, number: u32,
    }
    AllReduceParams { peers: PeersParams, data: Address, pairs: u32 }
    AllReduceNormParams {
        peers: PeersParams, x: Address, out: Address, sum: Address, more: Address, weight: Address,
        width: u32, scale: f32, eps: f32, layer: u32,
    }
    SampleParams {
        jobs: Address, adjusts: Address, words: Address, states: Address, bins: Address, lists: Address,
        tokens: Address, found: Address, tops: Address, width: u32, segment: u32,
    }
    ExpertUpParams {
        activated: Address, x: Address, gate_up: Address, experts: Address,
        top_k: u32, first: u32, local: u32, hidden: u32, inter: u32, pairs: u32,
        route: RouteParams, logits: Address,
    }
    ExpertDownTilesParams {
        y: Address, activated: Address, down: Address, experts: Address,
        pairs: u32, first: u32, hidden: u32, inter: u32,
    }
    ExpertDownParams {
        out: Address, activated: Address, down: Address, experts: Address, weights: Address,
        top_k: u32, first: u32, local: u32, hidden: u32, inter: u32,
    }
    GroupParams {
        sorted: Address, tile_expert: Address, tiles: Address, experts: Address,
        pairs: u32, first: u32, local: u32, tile: u32, starts: Address, arrived: Address,
    }
    CombineParams {
        out: Address, y: Address, experts: Address, weights: Address,
        top_k: u32, first: u32, local: u32, hidden: u32, y_f32: u32,
    }
    AppendParams {
        q: Address, keys: Address, values: Address, qkv: Address, position: Address, sequence: Address,
        tables: Address, turns: Address,
        qkv_f32: u32, query_heads: u32, kv_heads: u32, block_tokens: u32, rope: u32,
    }
    AttendParams {
        out: Address, parts: Address, q: Address, keys: Address, values: Address, position: Address,
        sequence: Address, tables: Address,
        query_heads: u32, kv_heads: u32, block_tokens: u32, window: u32, ranges: u32, rows: u32,
        singles: Address, tiles: Address, arrived: Address,
    }
    AttendTokenParams { attend: AttendParams, qkv: Address, turns: Address, rope: u32 }
    AttendWideParams { attend: AttendParams, chunk: u32, q: TensorMap, keys: TensorMap, values: TensorMap }
}
