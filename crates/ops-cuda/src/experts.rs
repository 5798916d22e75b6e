//! Routing and routed experts: few rows read each chosen expert for each row, many rows are grouped by expert.

use std::cell::OnceCell;

use ops::{Error, Routing, Scoring};
use types::DType;

use crate::arena::Piece;
use crate::backend::CudaBackend;
use crate::bulk::{BULK_ROWS, BulkProduct};
use crate::device::Grid;
use crate::kernels::{
    Address, ChooseParams, CombineParams, ExpertDownParams, ExpertDownTilesParams, ExpertUpParams,
    GemmParams, GroupParams, RouteParams, RouterParams,
};
use crate::loaded::Tiles;
use crate::tensor::{LeftChoice, Routed, Tensor, Weight, size};

/// Rows that the kernel of logits and choice takes.
const ROUTER_ROWS: usize = 8;
/// Rows so few that hardly an expert is chosen twice.
const SEPARATE_ROWS: usize = 2;
/// Pairs of an expert, on average, up to which they are found by each of its blocks; more are grouped beforehand. At
/// most as many rows have room there.
const FEW_PAIRS: usize = 8;
const FEW_ROWS: usize = 256;
/// Pairs of an expert, on average, from which tiles of 64 rows pay, and the warpgroup tiles.
const LARGE_PAIRS: usize = 24;
const BULK_PAIRS: usize = 64;
/// Pairs that are grouped by one block; of more, those of each of several.
const GROUP_ALONE: usize = 8192;
const GROUP_EACH: usize = 2048;
/// Choices of a row that the kernels have room for.
const CHOICES_MAX: usize = 64;
/// Neighbours that a thread of the weighted sum has.
const COMBINED: u32 = 8;
/// Warps of a block of the few-row kernels.
const WARPS: usize = 4;
const WORD: usize = 4;

/// For kernels that find the choice made.
const NO_ROUTE: RouteParams = RouteParams {
    experts: 0,
    weights: 0,
    logits: 0,
    rows: 0,
    count: 0,
    top_k: 0,
    softmax: 0,
    renormalize: 0,
    position: 0,
};

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

/// Pairs of rows and experts, sorted by expert.
struct Sorted {
    /// [tiles · tile]: the pair at each place; places behind an expert's last pair hold none.
    sorted: Piece,
    /// [tiles]: the expert of each tile.
    tile_expert: Piece,
    /// [1]: tiles that have pairs.
    used: Piece,
    /// Tiles there is room for.
    tiles: usize,
}

impl CudaBackend {
    pub(crate) fn choose(&self, logits: &Tensor, routing: Routing) -> Result<Routed, Error> {
        let top_k = routing.top_k;
        if top_k == 0 || top_k > logits.width().min(CHOICES_MAX) || logits.dtype() != self.storage() {
            let detail = format!(
                "top-{top_k} (at most {CHOICES_MAX}) of {} experts, logits in {}",
                logits.width(),
                logits.dtype()
            );
            return Err(Error::Shape { op: "route", detail });
        }
        let (routed, params) = self.routed(logits, (logits.rows(), logits.width()), routing)?;
        let grid = Grid::new(params.rows.div_ceil(WARPS as u32), 1, 128);
        self.device().launch_early(self.device().kernels.route, grid, &params)?;
        Ok(routed)
    }

    /// Room for the choices of `rows` rows among `count` experts, and what their kernel is told.
    fn routed(
        &self,
        logits: &Tensor,
        (rows, count): (usize, usize),
        Routing { top_k, scoring }: Routing,
    ) -> Result<(Routed, RouteParams), Error> {
        let routed = Routed {
            experts: Piece::new(self.device(), rows * top_k * WORD)?,
            weights: Piece::new(self.device(), rows * top_k * WORD)?,
            rows,
            top_k,
            left: None,
            on_host: OnceCell::new(),
        };
        let params = RouteParams {
            experts: routed.experts.address(),
            weights: routed.weights.address(),
            logits: logits.address(),
            rows: size("route", rows)?,
            count: size("route", count)?,
            top_k: size("route", top_k)?,
            softmax: u32::from(scoring == Scoring::Softmax),
            renormalize: u32::from(scoring != Scoring::Sigmoid { renormalize: false }),
            position: if self.step().is_padded() { self.step().positions() } else { 0 },
        };
        Ok((routed, params))
    }

    /// Logits and choice in one launch, for few rows; `None` where that kernel does not fit. The choice is left to the
    /// experts where they make it on their way.
    pub(crate) fn route_few(
        &self,
        x: &Tensor,
        weight: &Weight,
        routing: Routing,
    ) -> Result<Option<Routed>, Error> {
        let (experts, hidden) = weight.dims2("router")?;
        let vectors = hidden.is_multiple_of(16 / self.storage().bytes());
        let Some(arrived) = self.device().counters(0, 1).filter(|_| vectors && x.rows() <= ROUTER_ROWS)
        else {
            return Ok(None);
        };
        x.expect("router", hidden, self.storage())?;
        if routing.top_k == 0 || routing.top_k > experts.min(CHOICES_MAX) {
            return Ok(None);
        }
        let logits = Tensor::new(self.device(), x.rows(), experts, DType::F32)?;
        let (mut routed, route) = self.routed(&logits, (x.rows(), experts), routing)?;
        let leaves = x.rows() <= SEPARATE_ROWS;
        let params = RouterParams {
            route,
            logits: logits.address(),
            x: x.address(),
            w: weight.address(),
            arrived: if leaves { 0 } else { arrived },
            hidden: size("router", hidden)?,
        };
        let grid = Grid::new(route.count.div_ceil(WARPS as u32), 1, 128);
        self.device().launch_early(self.device().kernels.router, grid, &params)?;
        routed.left = leaves.then_some(LeftChoice { logits, route });
        Ok(Some(routed))
    }

    /// Makes a choice that was left, for who reads it in any other way than [`CudaBackend::one_by_one`].
    pub(crate) fn settle(&self, routed: &Routed) -> Result<(), Error> {
        let Some(LeftChoice { logits, route }) = &routed.left else { return Ok(()) };
        let params = ChooseParams { route: *route, logits: logits.address() };
        let grid = Grid::new(route.rows.div_ceil(WARPS as u32), 1, 128);
        Ok(self.device().launch_early(self.device().kernels.route_left, grid, &params)?)
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
        match self.device().kernels.tiles {
            Some(tiles) if x.rows() > SEPARATE_ROWS && aligned => {
                self.settle(routed)?;
                let few = FEW_PAIRS * stack.local as usize;
                if x.rows() <= FEW_ROWS && routed.rows * routed.top_k <= few {
                    self.expert_by_expert(x, routed, &stack, tiles)
                } else {
                    self.grouped(x, routed, &stack, tiles)
                }
            }
            _ => self.one_by_one(x, routed, &stack),
        }
    }

    /// A warp per element and choice. Makes choices that were left.
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
            pairs: size("routed_experts", pairs)?,
            route: routed.left.as_ref().map_or(NO_ROUTE, |left| left.route),
            logits: routed.left.as_ref().map_or(0, |left| left.logits.address()),
        };
        let kernels = &self.device().kernels;
        let blocks = inter.div_ceil(WARPS as u32) + u32::from(routed.left.is_some());
        let grid = Grid::new(blocks, size("routed_experts", pairs)?, 128);
        // Its blocks fill the card. Those of attention are few and large, and find no room once these are there.
        self.device().follow_branch()?;
        self.device().launch_early(kernels.expert_up, grid, &up)?;
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
        self.device().launch_early(kernels.expert_down, grid, &down)?;
        Ok(out)
    }

    /// A block for every expert and some of its weights, which are read once for all rows.
    fn expert_by_expert(
        &self,
        x: &Tensor,
        routed: &Routed,
        stack: &Stack,
        tiles: Tiles,
    ) -> Result<Tensor, Error> {
        const OP: &str = "routed_experts";
        let pairs = routed.rows * routed.top_k;
        let &Stack { first, local, hidden, inter, .. } = stack;
        let activated = self.tensor(pairs, inter as usize)?;
        let up = ExpertUpParams {
            activated: activated.address(),
            x: x.address(),
            gate_up: stack.gate_up,
            experts: routed.experts.address(),
            top_k: size(OP, routed.top_k)?,
            first,
            local,
            hidden,
            inter,
            pairs: size(OP, pairs)?,
            route: NO_ROUTE,
            logits: 0,
        };
        // A warp has 8 gate rows and their up rows, or 16 rows of down.
        let grid = Grid::new(inter.div_ceil(8 * WARPS as u32), local, 128);
        self.device().launch_early(tiles.expert_up, grid, &up)?;
        let y = Tensor::new(self.device(), pairs, hidden as usize, DType::F32)?;
        let down = ExpertDownTilesParams {
            y: y.address(),
            activated: activated.address(),
            down: stack.down,
            experts: routed.experts.address(),
            pairs: size(OP, pairs)?,
            first,
            hidden,
            inter,
        };
        let grid = Grid::new(hidden.div_ceil(16 * WARPS as u32), local, 128);
        self.device().launch_early(tiles.expert_down, grid, &down)?;
        self.add_up(&y, routed, stack)
    }

    /// The weighted sum of each row's choices.
    fn add_up(&self, y: &Tensor, routed: &Routed, stack: &Stack) -> Result<Tensor, Error> {
        let out = Tensor::new(self.device(), routed.rows, stack.hidden as usize, DType::F32)?;
        let combine = CombineParams {
            out: out.address(),
            y: y.address(),
            experts: routed.experts.address(),
            weights: routed.weights.address(),
            top_k: size("routed_experts", routed.top_k)?,
            first: stack.first,
            local: stack.local,
            hidden: stack.hidden,
            y_f32: y.is_f32(),
        };
        let blocks = stack.hidden.div_ceil(COMBINED * 256);
        let grid = Grid::new(size("routed_experts", routed.rows)?, blocks, 256);
        self.device().launch_early(self.device().kernels.combine, grid, &combine)?;
        Ok(out)
    }

    /// The pairs of rows and experts in tiles of one expert each, `tile` pairs of them.
    fn sort_pairs(&self, routed: &Routed, stack: &Stack, tile: usize) -> Result<Sorted, Error> {
        const OP: &str = "routed_experts";
        let pairs = routed.rows * routed.top_k;
        // Each expert fills its last tile at most by itself.
        let tiles = pairs / tile + (stack.local as usize).min(pairs);
        let sorted = Piece::new(self.device(), tiles * tile * WORD)?;
        let tile_expert = Piece::new(self.device(), tiles * WORD)?;
        let used = Piece::new(self.device(), WORD)?;
        let blocks = pairs.div_ceil(GROUP_EACH);
        let arrived = self.device().counters(0, 1).filter(|_| pairs > GROUP_ALONE);
        let starts =
            arrived.map(|_| Piece::new(self.device(), blocks * stack.local as usize * WORD)).transpose()?;
        let group = GroupParams {
            sorted: sorted.address(),
            tile_expert: tile_expert.address(),
            tiles: used.address(),
            experts: routed.experts.address(),
            pairs: size(OP, pairs)?,
            first: stack.first,
            local: stack.local,
            tile: size(OP, tile)?,
            starts: starts.as_ref().map_or(0, Piece::address),
            arrived: arrived.unwrap_or(0),
        };
        let grid = Grid { blocks: (1, 1, 1), threads: 1024, shared: 2 * stack.local * WORD as u32 };
        if starts.is_some() {
            let grid = Grid { blocks: (size(OP, blocks)?, 1, 1), ..grid };
            let [count, place] = self.device().kernels.group_many;
            self.device().launch_early(count, grid, &group)?;
            self.device().launch_early(place, grid, &group)?;
        } else {
            self.device().launch_early(self.device().kernels.group_pairs, grid, &group)?;
        }
        Ok(Sorted { sorted, tile_expert, used, tiles })
    }

    /// Pairs sorted by expert, two grouped products, and the weighted sum of each row's choices.
    fn grouped(&self, x: &Tensor, routed: &Routed, stack: &Stack, kernels: Tiles) -> Result<Tensor, Error> {
        const OP: &str = "routed_experts";
        let pairs = routed.rows * routed.top_k;
        let bulk = kernels.bulk.filter(|_| pairs >= BULK_PAIRS * stack.local as usize);
        let [plain, gated] = kernels.grouped[usize::from(pairs >= LARGE_PAIRS * stack.local as usize)];
        let tile = if bulk.is_some() { BULK_ROWS } else { plain.rows } as usize;
        let Sorted { sorted, tile_expert, used, tiles } = self.sort_pairs(routed, stack, tile)?;
        let product = GemmParams {
            c: 0,
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
        let (places, tiles) = (tiles * tile, size(OP, tiles)?);
        let local = stack.local as usize;
        // Rows of pairs that other ranks compute, and places of nobody, hold whatever was there; nothing reads what
        // comes of them.
        let activated = self.tensor(if bulk.is_some() { places } else { pairs }, stack.inter as usize)?;
        let product = GemmParams { c: activated.address(), ..product };
        match bulk {
            Some(bulk) => {
                let product = BulkProduct {
                    gemm: product,
                    gated: true,
                    row_tiles: tiles,
                    a_rows: x.rows(),
                    w_rows: local * product.n as usize,
                    c_by_place: true,
                };
                bulk.launch(self.device(), &product)?;
            }
            None => gated.launch(self.device(), (tiles, product.n, 1), &product)?,
        }
        // Of very many rows each product is rounded to storage before it is weighted, as the reference's grouped products
        // are; that is half of what goes to memory and back.
        let kept = if bulk.is_some() { self.storage() } else { DType::F32 };
        let y = Tensor::new(self.device(), pairs, stack.hidden as usize, kept)?;
        let product = GemmParams {
            c: y.address(),
            a: activated.address(),
            w: stack.down,
            n: stack.hidden,
            k: stack.inter,
            a_divisor: 1,
            c_f32: y.is_f32(),
            ..product
        };
        match bulk {
            Some(bulk) => {
                let product = BulkProduct {
                    gemm: product,
                    gated: false,
                    row_tiles: tiles,
                    a_rows: places,
                    w_rows: local * product.n as usize,
                    c_by_place: false,
                };
                bulk.launch(self.device(), &product)?;
            }
            None => plain.launch(self.device(), (tiles, product.n, 1), &product)?,
        }
        self.add_up(&y, routed, stack)
    }
}
