//! Routing and routed experts: few rows read each chosen expert for each row, many rows are grouped by expert.

use ops::{Error, Routing, Scoring};
use types::DType;

use crate::arena::Piece;
use crate::backend::{CudaBackend, SKINNY_ROWS};
use crate::device::{Function, Grid, gemm_shared};
use crate::kernels::{
    Address, CombineParams, ExpertDownParams, ExpertUpParams, GemmParams, GroupParams, RouteParams,
};
use crate::tensor::{Routed, Tensor, Weight, size};

/// Rows of a tile of the grouped product.
const TILE: usize = 64;
/// Choices of a row that the kernels have room for.
const CHOICES_MAX: usize = 64;
/// Warps of a block of the few-row kernels.
const WARPS: usize = 4;
const WORD: usize = 4;

/// Sizes of a stack of experts.
#[derive(Debug, Clone, Copy)]
struct Stack {
    gate_up: Address,
    down: Address,
    first: u32,
    local: u32,
    hidden: u32,
    inter: u32,
}

impl Stack {
    fn new(x: &Tensor, gate_up: &Weight, down: &Weight, first: usize, dtype: DType) -> Result<Self, Error> {
        const OP: &str = "routed_experts";
        let (experts, double, hidden) = gate_up.dims3(OP)?;
        let (down_experts, down_hidden, inter) = down.dims3(OP)?;
        x.expect(OP, hidden, dtype)?;
        if down_experts != experts || down_hidden != hidden || double != 2 * inter {
            let detail =
                format!("gate_up {:?} and down {:?} do not belong together", gate_up.dims(), down.dims());
            return Err(Error::Shape { op: OP, detail });
        }
        Ok(Self {
            gate_up: gate_up.address(),
            down: down.address(),
            first: size(OP, first)?,
            local: size(OP, experts)?,
            hidden: size(OP, hidden)?,
            inter: size(OP, inter)?,
        })
    }
}

impl CudaBackend {
    pub(crate) fn choose(&self, logits: &Tensor, routing: Routing) -> Result<Routed, Error> {
        let Routing { top_k, scoring } = routing;
        if top_k == 0 || top_k > logits.width().min(CHOICES_MAX) || logits.dtype() != self.storage() {
            let detail = format!(
                "top-{top_k} (at most {CHOICES_MAX}) of {} experts, logits in {}",
                logits.width(),
                logits.dtype()
            );
            return Err(Error::Shape { op: "route", detail });
        }
        let rows = logits.rows();
        let routed = Routed {
            experts: Piece::new(self.device(), rows * top_k * WORD)?,
            weights: Piece::new(self.device(), rows * top_k * WORD)?,
            rows,
            top_k,
        };
        let params = RouteParams {
            experts: routed.experts.address(),
            weights: routed.weights.address(),
            logits: logits.address(),
            rows: size("route", rows)?,
            count: size("route", logits.width())?,
            top_k: size("route", top_k)?,
            softmax: u32::from(scoring == Scoring::Softmax),
            renormalize: u32::from(scoring != Scoring::Sigmoid { renormalize: false }),
        };
        let grid = Grid::new(size("route", rows.div_ceil(WARPS))?, 1, 128);
        self.device().launch(self.device().kernels.route, grid, &params)?;
        Ok(routed)
    }

    pub(crate) fn run_experts(
        &self,
        x: &Tensor,
        routed: &Routed,
        (gate_up, down): (&Weight, &Weight),
        first_expert: usize,
    ) -> Result<Tensor, Error> {
        let stack = Stack::new(x, gate_up, down, first_expert, self.storage())?;
        if routed.rows != x.rows() {
            let detail = format!("{} rows routed, {} given", routed.rows, x.rows());
            return Err(Error::Shape { op: "routed_experts", detail });
        }
        let aligned = stack.hidden.is_multiple_of(8) && stack.inter.is_multiple_of(8);
        match self.device().kernels.gemm {
            Some([gemm, _]) if x.rows() > SKINNY_ROWS && aligned => self.grouped(x, routed, &stack, gemm),
            _ => self.one_by_one(x, routed, &stack),
        }
    }

    /// A warp per element and choice.
    fn one_by_one(&self, x: &Tensor, routed: &Routed, stack: &Stack) -> Result<Tensor, Error> {
        let pairs = routed.rows * routed.top_k;
        let activated = self.tensor(pairs, stack.inter as usize)?;
        let out = Tensor::new(self.device(), x.rows(), x.width(), DType::F32)?;
        let top_k = size("routed_experts", routed.top_k)?;
        let &Stack { first, local, hidden, inter, .. } = stack;
        let up = ExpertUpParams {
            activated: activated.address(),
            x: x.address(),
            gate_up: stack.gate_up,
            experts: routed.experts.address(),
            top_k,
            first,
            local,
            hidden,
            inter,
        };
        let kernels = &self.device().kernels;
        let grid = Grid::new(inter.div_ceil(WARPS as u32), size("routed_experts", pairs)?, 128);
        self.device().launch(kernels.expert_up, grid, &up)?;
        let down = ExpertDownParams {
            out: out.address(),
            activated: activated.address(),
            down: stack.down,
            experts: routed.experts.address(),
            weights: routed.weights.address(),
            top_k,
            first,
            local,
            hidden,
            inter,
        };
        let grid = Grid::new(hidden.div_ceil(WARPS as u32), size("routed_experts", x.rows())?, 128);
        self.device().launch(kernels.expert_down, grid, &down)?;
        Ok(out)
    }

    /// Pairs sorted by expert, two grouped products, and the weighted sum of each row's choices.
    fn grouped(&self, x: &Tensor, routed: &Routed, stack: &Stack, gemm: Function) -> Result<Tensor, Error> {
        const OP: &str = "routed_experts";
        let pairs = routed.rows * routed.top_k;
        // Each expert fills its last tile at most by itself.
        let tiles = pairs / TILE + (stack.local as usize).min(pairs);
        let sorted = Piece::new(self.device(), tiles * TILE * WORD)?;
        let tile_expert = Piece::new(self.device(), tiles * WORD)?;
        let used = Piece::new(self.device(), WORD)?;
        let group = GroupParams {
            sorted: sorted.address(),
            tile_expert: tile_expert.address(),
            tiles: used.address(),
            experts: routed.experts.address(),
            pairs: size(OP, pairs)?,
            first: stack.first,
            local: stack.local,
            tile: TILE as u32,
        };
        let kernels = &self.device().kernels;
        let grid = Grid { blocks: (1, 1, 1), threads: 1024, shared: 2 * stack.local * WORD as u32 };
        self.device().launch(kernels.group_pairs, grid, &group)?;

        let gate_up = self.tensor(pairs, 2 * stack.inter as usize)?;
        let mut product = GemmParams {
            c: gate_up.address(),
            a: x.address(),
            w: stack.gate_up,
            sorted: sorted.address(),
            tile_expert: tile_expert.address(),
            tiles: used.address(),
            m: size(OP, pairs)?,
            n: 2 * stack.inter,
            k: stack.hidden,
            a_divisor: size(OP, routed.top_k)?,
            c_f32: 0,
        };
        let tiles = size(OP, tiles)?;
        let grid =
            |n: u32| Grid { blocks: (tiles, n.div_ceil(64), 1), threads: 128, shared: gemm_shared(64) };
        self.device().launch(gemm, grid(product.n), &product)?;
        // Rows of pairs that other ranks compute hold whatever was there; nothing reads what comes of them.
        let activated = self.gated(&gate_up)?;
        drop(gate_up);
        let y = Tensor::new(self.device(), pairs, stack.hidden as usize, DType::F32)?;
        product = GemmParams {
            c: y.address(),
            a: activated.address(),
            w: stack.down,
            n: stack.hidden,
            k: stack.inter,
            a_divisor: 1,
            c_f32: 1,
            ..product
        };
        self.device().launch(gemm, grid(product.n), &product)?;
        let out = Tensor::new(self.device(), x.rows(), x.width(), DType::F32)?;
        let combine = CombineParams {
            out: out.address(),
            y: y.address(),
            experts: routed.experts.address(),
            weights: routed.weights.address(),
            top_k: size(OP, routed.top_k)?,
            first: stack.first,
            local: stack.local,
            hidden: stack.hidden,
        };
        self.device().launch(kernels.combine, Grid::new(size(OP, x.rows())?, 1, 256), &combine)?;
        Ok(out)
    }
}
