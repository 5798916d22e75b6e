//! The op set. Letters used in shapes: T rows of this step, H hidden size, Q query heads of this rank, K key/value
//! heads of this rank, D head dimension, E experts of this rank, I intermediate width of this rank, V vocabulary
//! rows of this rank.
//!
//! Rounding points are part of the contract: operands and results are stored in the compute dtype (bf16 or f32),
//! products are accumulated in fp32 and rounded once when the op returns. Results that are partial sums over ranks
//! stay in fp32 until they are reduced.

use std::ops::Range;

use types::{BlockSize, DType, TokenId};

use crate::on_host::joined;
use crate::sample::{Ask, Choice};
use crate::{Batch, Dummy, Error, HostTensor, KvGroup};

/// Rows whose logits are made at once unless a backend says otherwise: bounds the memory of a prompt's log-probabilities
/// (64 rows of a 262,144-entry vocabulary are 64 MiB) whatever the prompt's length.
const DRAWN_ROWS_MAX: usize = 64;

/// Which normalisation; both multiply by a weight and have no bias.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Norm {
    /// Root mean square (T5 style): fp32 statistics, rounded to the compute dtype, then times the weight.
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
    /// Mean-subtracting: statistics and weight in fp32, rounded once.
    Layer {
        /// Added to the variance.
        eps: f32,
    },
}

/// Interleaved rotary embedding over the whole head dimension: the pair (2i, 2i+1) turns by
/// `position · theta^(-2i/D)`; cos and sin are rounded to the compute dtype.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
}

/// Which keys a row may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// Every position up to its own.
    All,
    /// The last `n` positions including its own (`window_keys`).
    Keys(u32),
}

/// How router scores are made from the logits of the chosen experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Logistic function of each chosen logit.
    Sigmoid {
        /// Divide the k scores by their sum.
        renormalize: bool,
    },
    /// Softmax over the chosen logits only.
    Softmax,
}

/// Token-choice routing: the k largest logits (lowest expert on a tie), then [`Scoring`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// Score of a chosen expert.
    pub scoring: Scoring,
}

/// Shape of one layer's KV cache on this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayerSpec {
    /// Which group's block tables address it.
    pub group: KvGroup,
    /// Blocks in the pool.
    pub blocks: usize,
    /// Tokens per block.
    pub block_size: BlockSize,
    /// K.
    pub kv_heads: usize,
    /// Q; a multiple of K.
    pub query_heads: usize,
    /// D.
    pub head_dim: usize,
}

/// Which rank holds an expert: rank r holds `experts_each` of them, from `r · experts_each` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertOwners {
    /// Ranks that share the experts.
    pub ranks: usize,
    /// Experts each of them holds; at least 1.
    pub experts_each: usize,
}

impl ExpertOwners {
    /// The rank that holds `expert`.
    #[must_use]
    pub const fn owner(self, expert: usize) -> usize {
        expert / self.experts_each
    }
}

/// Where the copies of each expert are: in numbered slots, of which every rank holds equally many. Slots take the place
/// of expert numbers once [`Backend::place`] has chosen a copy for each row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertSlots {
    /// Expert e has copies `first[e]..first[e + 1]` of `slots`; one entry more than there are experts.
    first: Vec<u32>,
    slots: Vec<u32>,
}

impl ExpertSlots {
    /// Of `experts` experts, `held[s]` being the one in slot s.
    ///
    /// # Errors
    /// [`Error::Shape`] when a slot holds an unknown expert, or an expert is in no slot.
    pub fn new(experts: usize, held: &[u32]) -> Result<Self, Error> {
        let wrong = |detail| Err(Error::Shape { op: "expert slots", detail });
        let mut slots: Vec<u32> = (0u32..).take(held.len()).collect();
        slots.sort_by_key(|&slot| held[slot as usize]);
        let mut first = vec![0; experts + 1];
        for (slot, &expert) in held.iter().enumerate() {
            match first.get_mut(expert as usize + 1) {
                Some(copies) => *copies += 1,
                None => return wrong(format!("slot {slot} holds expert {expert} of {experts}")),
            }
        }
        if let Some(expert) = first[1..].iter().position(|copies| *copies == 0) {
            return wrong(format!("expert {expert} of {experts} is in no slot"));
        }
        (1..=experts).for_each(|expert| first[expert] += first[expert - 1]);
        Ok(Self { first, slots })
    }

    /// Experts that have slots.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.first.len() - 1
    }

    /// The slots with a copy of `expert`, ascending.
    #[must_use]
    pub fn copies(&self, expert: usize) -> &[u32] {
        &self.slots[self.first[expert] as usize..self.first[expert + 1] as usize]
    }

    /// The slot that works for a row of `token` at `position` that chose `expert`. It follows from the row alone, so it
    /// is the same on every rank and in every batch.
    #[must_use]
    pub fn of_row(&self, expert: usize, token: TokenId, position: u32) -> u32 {
        let copies = self.copies(expert);
        copies[token.0.wrapping_add(position) as usize % copies.len()]
    }
}

/// A device that runs the model. One value per rank; it owns the device's memory, and one thread uses it.
pub trait Backend {
    /// Activations on the device: [rows, width], compute dtype or (for partial sums) fp32.
    type Tensor;
    /// A resident weight matrix [out, in] or norm weight [H].
    type Weight;
    /// Resident expert matrices [E, out, in].
    type Experts;
    /// One layer's resident key/value cache.
    type KvLayer;
    /// The experts chosen for each row and their weights.
    type Routed;
    /// Tokens that are being drawn, or nothing but a place in the order of what the device does; see [`Backend::draw`].
    type Drawing;

    /// Compute dtype.
    fn dtype(&self) -> DType;

    /// The dtype in which a weight that a checkpoint stores as `stored` is kept. It must hold every stored value
    /// that the compute dtype holds: bf16 weights may stay bf16 under fp32 compute, which loses nothing and halves
    /// what decode reads.
    fn weight_dtype(&self, stored: DType) -> DType {
        let _ = stored;
        self.dtype()
    }

    /// Takes a weight [out, in] or [H] into device memory, in [`Backend::weight_dtype`].
    ///
    /// # Errors
    /// When memory runs out or the shape has no place here.
    fn weight(&mut self, host: HostTensor) -> Result<Self::Weight, Error>;

    /// Takes expert weights [E, out, in] into device memory, as [`Backend::weight`].
    ///
    /// # Errors
    /// As [`Backend::weight`].
    fn experts(&mut self, host: HostTensor) -> Result<Self::Experts, Error>;

    /// Makes a weight [out, in] or [H] of seeded numbers where it lives, kept as one that is stored as bf16: the same
    /// values on every backend.
    ///
    /// # Errors
    /// As [`Backend::weight`].
    fn dummy_weight(&mut self, dummy: &Dummy) -> Result<Self::Weight, Error> {
        self.weight(dummy.host(self.weight_dtype(DType::BF16)))
    }

    /// Makes expert weights [E, out, in] of seeded numbers, as [`Backend::dummy_weight`].
    ///
    /// # Errors
    /// As [`Backend::weight`].
    fn dummy_experts(&mut self, dummy: &Dummy) -> Result<Self::Experts, Error> {
        self.experts(dummy.host(self.weight_dtype(DType::BF16)))
    }

    /// Reserves one layer's KV cache.
    ///
    /// # Errors
    /// When memory runs out.
    fn kv_layer(&mut self, spec: &KvLayerSpec) -> Result<Self::KvLayer, Error>;

    /// Fills one layer's KV cache with seeded numbers of variance 1, for measuring at a context without its prompt. What
    /// they are is the backend's choice.
    ///
    /// # Errors
    /// [`Error::Device`] from a backend that is not measured.
    fn dummy_kv(&mut self, kv: &mut Self::KvLayer, seed: u64) -> Result<(), Error> {
        let _ = (kv, seed);
        Err(Error::Device { op: "dummy_kv", reason: "this backend makes no keys and values".into() })
    }

    /// Starts a step: whatever the ops need of the batch is staged on the device, behind all that was queued before. The
    /// tokens of [`Batch::fed`] rows are those that the step before left with [`Backend::draw`] and [`Backend::feed`].
    ///
    /// # Errors
    /// When the batch contradicts itself.
    fn begin_step(&mut self, batch: &Batch) -> Result<(), Error>;

    /// Starts a step whose ops up to [`Backend::keep`] depend on nothing but the batch: a backend that kept what was
    /// queued for an earlier step of the same form queues it again and returns its result. With `None` the caller
    /// runs the ops and hands their result to [`Backend::keep`]. The result may have more rows than the batch; the
    /// others mean nothing.
    ///
    /// # Errors
    /// As [`Backend::begin_step`].
    fn begin_or_repeat(&mut self, batch: &Batch) -> Result<Option<Self::Tensor>, Error> {
        self.begin_step(batch)?;
        Ok(None)
    }

    /// Ends what [`Backend::begin_or_repeat`] began: `x` is the result of the ops since then.
    ///
    /// # Errors
    /// On a device failure.
    fn keep(&mut self, x: Self::Tensor) -> Result<Self::Tensor, Error> {
        Ok(x)
    }

    /// From here on two branches of ops that read the same inputs and nothing of each other: first one, then after
    /// [`Backend::other_branch`] the other, until [`Backend::join`]. A backend may run them at the same time.
    ///
    /// # Errors
    /// On a device failure.
    fn fork(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// The second branch begins; nothing without a fork.
    ///
    /// # Errors
    /// On a device failure.
    fn other_branch(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// What follows reads the results of both branches; nothing without a fork.
    ///
    /// # Errors
    /// On a device failure.
    fn join(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Rows of `table` [V, H] for the tokens of the step: T × H fp32. A token outside
    /// `first_token..first_token + V` gives a zero row (a partial sum over vocabulary-parallel ranks).
    ///
    /// # Errors
    /// On a device failure.
    fn embed(&mut self, table: &Self::Weight, first_token: TokenId) -> Result<Self::Tensor, Error>;

    /// Rounds a reduced sum to the compute dtype.
    ///
    /// # Errors
    /// On a device failure.
    fn round(&mut self, x: Self::Tensor) -> Result<Self::Tensor, Error>;

    /// Normalises each row of `x` [T, H].
    ///
    /// # Errors
    /// On a device failure.
    fn norm(&mut self, x: &Self::Tensor, weight: &Self::Weight, norm: Norm) -> Result<Self::Tensor, Error>;

    /// `x` [T, in] times `weight` [out, in] transposed: [T, out], rounded to the compute dtype.
    ///
    /// # Errors
    /// When widths differ, or on a device failure.
    fn linear(&mut self, x: &Self::Tensor, weight: &Self::Weight) -> Result<Self::Tensor, Error>;

    /// As [`Backend::linear`] but kept in fp32: this rank's part of a row-parallel product.
    ///
    /// # Errors
    /// As [`Backend::linear`].
    fn linear_partial(&mut self, x: &Self::Tensor, weight: &Self::Weight) -> Result<Self::Tensor, Error>;

    /// Splits `qkv` [T, (Q + 2K)·D] into q, k, v, turns q and k by `rope` when given, writes k and v to the cache,
    /// attends with scale D^-0.5 and fp32 softmax to the keys `window` allows: [T, Q·D].
    ///
    /// # Errors
    /// When a block table does not cover a position, or on a device failure.
    fn attention(
        &mut self,
        qkv: &Self::Tensor,
        kv: &mut Self::KvLayer,
        rope: Option<Rope>,
        window: Window,
    ) -> Result<Self::Tensor, Error>;

    /// `gate_up` [T, 2I] (gate first) to silu(gate) · up: [T, I].
    ///
    /// # Errors
    /// On a device failure.
    fn swiglu(&mut self, gate_up: &Self::Tensor) -> Result<Self::Tensor, Error>;

    /// Chooses experts from `logits` [T, experts], rounded to the compute dtype beforehand.
    ///
    /// # Errors
    /// On a device failure.
    fn route(&mut self, logits: &Self::Tensor, routing: Routing) -> Result<Self::Routed, Error>;

    /// As [`Backend::route`] on the logits `x` [T, H] times `weight` [experts, H] transposed.
    ///
    /// # Errors
    /// As [`Backend::linear`].
    fn router(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        routing: Routing,
    ) -> Result<Self::Routed, Error> {
        let logits = self.linear(x, weight)?;
        self.route(&logits, routing)
    }

    /// Routed experts on every row of `x` [T, H]: gate_up [E, 2I, H], SiLU·up, down [E, H, I], times the routing
    /// weight, summed over the chosen: T × H fp32, a partial sum over ranks. Expert e here is expert
    /// `first_expert + e` of the model; choices outside are other ranks'.
    ///
    /// # Errors
    /// On a device failure.
    fn routed_experts(
        &mut self,
        x: &Self::Tensor,
        routed: &Self::Routed,
        gate_up: &Self::Experts,
        down: &Self::Experts,
        first_expert: usize,
    ) -> Result<Self::Tensor, Error>;

    /// Replaces each chosen expert by the slot of the copy that works for the row ([`ExpertSlots::of_row`]); the first
    /// row of `routed` is row `first_row` of the step.
    ///
    /// # Errors
    /// When `routed` reaches beyond the step or chose an expert without slots, or on a device failure.
    fn place(
        &mut self,
        routed: Self::Routed,
        slots: &ExpertSlots,
        first_row: usize,
    ) -> Result<Self::Routed, Error>;

    /// Adds the number of rows that chose each expert to `counts`; `false` when this backend leaves the choices on its
    /// device and counts nothing.
    ///
    /// # Errors
    /// When an expert is beyond `counts`, or on a device failure.
    fn count_choices(&mut self, routed: &Self::Routed, counts: &mut [u64]) -> Result<bool, Error>;

    /// Rows `rows` of `x` [T, H], which may be none: [rows, H].
    ///
    /// # Errors
    /// When `rows` is out of range, or on a device failure.
    fn slice_rows(&mut self, x: &Self::Tensor, rows: Range<usize>) -> Result<Self::Tensor, Error>;

    /// Lays the rows of `x` [T, H] out for the ranks that hold their experts: for each rank in order the rows, in
    /// ascending order, that chose at least one of its experts, each once and with all its choices. `counts` becomes the
    /// rows for each rank; the result is [sum of `counts`, H + 2k]: the values of a row, its k experts, its k weights.
    ///
    /// # Errors
    /// When `routed` has other rows than `x`, or on a device failure.
    fn pack(
        &mut self,
        x: &Self::Tensor,
        routed: &Self::Routed,
        owners: ExpertOwners,
        counts: &mut Vec<usize>,
    ) -> Result<Self::Tensor, Error>;

    /// Takes received rows [R, H + 2k] apart: their values [R, H] and their choices.
    ///
    /// # Errors
    /// When `hidden` (H) leaves no pairs of expert and weight, or on a device failure.
    fn unpack(&mut self, packed: &Self::Tensor, hidden: usize)
    -> Result<(Self::Tensor, Self::Routed), Error>;

    /// Adds up what came back [sum of counts, H] for the rows that [`Backend::pack`] laid out, in rank order: T × H
    /// fp32.
    ///
    /// # Errors
    /// When as many rows did not come back, or on a device failure.
    fn combine(
        &mut self,
        returned: &Self::Tensor,
        routed: &Self::Routed,
        owners: ExpertOwners,
    ) -> Result<Self::Tensor, Error>;

    /// As [`Backend::add_scaled`] for the rows of `a` from `first_row` on: as many as `b` has, which may be none.
    ///
    /// # Errors
    /// When `b` reaches beyond `a` or widths differ.
    fn add_rows(
        &mut self,
        a: Self::Tensor,
        first_row: usize,
        b: &Self::Tensor,
        scale: f32,
    ) -> Result<Self::Tensor, Error>;

    /// `a + scale · b` in fp32, for partial sums of the same layer.
    ///
    /// # Errors
    /// When shapes differ.
    fn add_scaled(&mut self, a: Self::Tensor, b: &Self::Tensor, scale: f32) -> Result<Self::Tensor, Error>;

    /// The residual stream: `x + sum`, rounded to the compute dtype.
    ///
    /// # Errors
    /// When shapes differ.
    fn residual_add(&mut self, x: Self::Tensor, sum: &Self::Tensor) -> Result<Self::Tensor, Error>;

    /// The residual stream and its norm: [`Backend::residual_add`] of `sum` + scale · `more`, then [`Backend::norm`].
    /// Where the line to the other ranks has left the sum over them open, `sum` + scale · `more` is this rank's part, and
    /// the parts of all ranks are added up first.
    ///
    /// # Errors
    /// When shapes differ.
    fn residual_norm(
        &mut self,
        x: Self::Tensor,
        (sum, more): (Self::Tensor, Option<(&Self::Tensor, f32)>),
        (weight, norm): (&Self::Weight, Norm),
    ) -> Result<(Self::Tensor, Self::Tensor), Error> {
        let sum = match more {
            Some((more, scale)) => self.add_scaled(sum, more, scale)?,
            None => sum,
        };
        let x = self.residual_add(x, &sum)?;
        let n = self.norm(&x, weight, norm)?;
        Ok((x, n))
    }

    /// Some of the rows of `x` that the batch wants logits for, `which` counting in [`Batch::logit_rows`]:
    /// [which, H].
    ///
    /// # Errors
    /// When `which` is out of range, or on a device failure.
    fn logit_rows(&mut self, x: &Self::Tensor, which: Range<usize>) -> Result<Self::Tensor, Error>;

    /// Room for [rows, width] fp32 that a collective is about to fill.
    ///
    /// # Errors
    /// When memory runs out.
    fn buffer(&mut self, rows: usize, width: usize) -> Result<Self::Tensor, Error>;

    /// Room for [rows, width] of `like`'s dtype that a collective is about to fill.
    ///
    /// # Errors
    /// When memory runs out.
    fn buffer_like(&mut self, like: &Self::Tensor, rows: usize, width: usize) -> Result<Self::Tensor, Error> {
        let _ = like;
        self.buffer(rows, width)
    }

    /// Parts of rows that came from ranks one after the other, [ranks · rows, V], to whole rows: [rows, `width`], the last
    /// ranks' padding left out.
    ///
    /// # Errors
    /// When `parts` do not make so many rows, or on a device failure.
    fn join_ranks(
        &mut self,
        parts: Self::Tensor,
        (rows, each, width): (usize, usize, usize),
    ) -> Result<Self::Tensor, Error> {
        let parts = self.read(&parts)?;
        self.upload(width, &joined(&parts, (rows, each, width)))
    }

    /// Puts rows of `width` values on the device as they are, fp32.
    ///
    /// # Errors
    /// When `values` are not whole rows, or memory runs out.
    fn upload(&mut self, width: usize, values: &[f32]) -> Result<Self::Tensor, Error>;

    /// Rows that [`Backend::draw`] takes at once at most.
    fn drawn_rows_max(&self) -> usize {
        DRAWN_ROWS_MAX
    }

    /// Which of `asks` of rows of `width` logits hold more than the device takes in one step, ascending: [`Backend::draw`]
    /// leaves them, and [`crate::sample::answer`] makes them of logits that are read.
    fn left_to_host(&self, asks: &[Ask<'_>], width: usize) -> Vec<usize> {
        let _ = (asks, width);
        Vec::new()
    }

    /// Begins to make what `asks`, as long as there are rows, want of each row of `logits` [rows, width] times scale;
    /// from the same logits what the reference sampler makes ([`crate::sample`]). They are logit rows
    /// `first`… of the step, and their tokens stay on the device for the next step ([`Batch::fed`]). This need not wait for
    /// the device: [`Backend::collect`] does.
    ///
    /// # Errors
    /// On a device failure.
    fn draw(
        &mut self,
        logits: &Self::Tensor,
        width_and_scale: (usize, f32),
        first_and_asks: (usize, &[Ask<'_>]),
    ) -> Result<Self::Drawing, Error>;

    /// A drawing of no rows, which is done when all that was queued so far is.
    ///
    /// # Errors
    /// On a device failure.
    fn mark(&mut self) -> Result<Self::Drawing, Error>;

    /// Leaves tokens that were not drawn here as if they had been drawn for logit rows `first`….
    ///
    /// # Errors
    /// On a device failure.
    fn feed(&mut self, first: usize, tokens: &[TokenId]) -> Result<(), Error>;

    /// The tokens of logit rows `rows` as they lie on the device, [1, rows] in the bits of fp32 numbers: for a collective that
    /// copies them.
    ///
    /// # Errors
    /// On a device failure.
    fn tokens_drawn(&mut self, rows: Range<usize>) -> Result<Self::Tensor, Error>;

    /// As [`Backend::feed`], with what another rank's [`Backend::tokens_drawn`] gave.
    ///
    /// # Errors
    /// When `tokens` are not one row, or on a device failure.
    fn feed_tensor(&mut self, first: usize, tokens: &Self::Tensor) -> Result<(), Error>;

    /// Whether [`Backend::collect`] would not wait.
    ///
    /// # Errors
    /// On a device failure, also of what was queued before the drawing.
    fn is_drawn(&mut self, drawing: &Self::Drawing) -> Result<bool, Error>;

    /// What became of each row of a drawing. Drawings are collected in the order in which they were begun; what was queued
    /// behind them goes on.
    ///
    /// # Errors
    /// As [`Backend::is_drawn`].
    fn collect(&mut self, drawing: Self::Drawing) -> Result<Vec<Choice>, Error>;

    /// As [`Backend::read`] of some rows of `x`.
    ///
    /// # Errors
    /// When `rows` is out of range, or on a device failure.
    fn read_rows(&mut self, x: &Self::Tensor, rows: Range<usize>) -> Result<Vec<f32>, Error> {
        let rows = self.slice_rows(x, rows)?;
        self.read(&rows)
    }

    /// Copies a tensor to the host as fp32, row-major.
    ///
    /// # Errors
    /// On a device failure.
    fn read(&mut self, x: &Self::Tensor) -> Result<Vec<f32>, Error>;
}
