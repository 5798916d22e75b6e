//! The backend: every op checks shapes, runs its kernel, and rounds where the contract says so.

use std::ops::Range;

use half::bf16;
use ops::sample::{Ask, Choice};
use ops::{
    Backend, Batch, BatchSequence, Dummy, DummyBand, Error, ExpertOwners, ExpertSlots, Fed, HostTensor,
    KvLayerSpec, Norm, Rope, Routing, Window, draw_rows,
};
use rayon::prelude::*;
use types::{DType, TokenId};

use crate::attention::{Step, attention};
use crate::dispatch;
use crate::element::round_all_bf16;
use crate::experts::{Stack, routed_experts};
use crate::kv::KvLayer;
use crate::lanes::{Kernel, Lanes, dispatch, widen_into};
use crate::math::silu;
use crate::matmul::matmul;
use crate::norm::norm;
use crate::rope::RopeTable;
use crate::route::{Routed, route};
use crate::tensor::Tensor;
use crate::threads::Threads;
use crate::weight::Weight;

/// The CPU op set for one rank.
pub struct CpuBackend {
    dtype: DType,
    threads: Threads,
    tokens: Vec<TokenId>,
    sequences: Vec<BatchSequence>,
    sequence_of_row: Vec<usize>,
    positions: Vec<u32>,
    logit_rows: Vec<u32>,
    /// Of the last step, by logit row; see [`Backend::draw`].
    drawn: Vec<TokenId>,
    turns: RopeTable,
}

impl CpuBackend {
    /// A backend that computes in `dtype` with `threads` threads, the calling one included.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn new(dtype: DType, threads: usize) -> Result<Self, Error> {
        Ok(Self {
            dtype,
            threads: Threads::new(threads)?,
            tokens: Vec::new(),
            sequences: Vec::new(),
            sequence_of_row: Vec::new(),
            positions: Vec::new(),
            logit_rows: Vec::new(),
            drawn: Vec::new(),
            turns: RopeTable::default(),
        })
    }

    fn rounds(&self) -> bool {
        self.dtype == DType::BF16
    }

    fn rounded(&self, mut tensor: Tensor) -> Tensor {
        if self.rounds() {
            round_all_bf16(tensor.as_mut_slice());
        }
        tensor
    }
}

impl Backend for CpuBackend {
    type Tensor = Tensor;
    type Weight = Weight;
    type Experts = Weight;
    type KvLayer = KvLayer;
    type Routed = Routed;
    /// What became of each row: the host has nothing to wait for.
    type Drawing = Vec<Choice>;

    fn dtype(&self) -> DType {
        self.dtype
    }

    /// bf16 weights stay bf16 under fp32 compute: widening is exact and costs less than reading twice the bytes.
    fn weight_dtype(&self, stored: DType) -> DType {
        match (stored, self.dtype) {
            (DType::BF16, _) | (_, DType::BF16) => DType::BF16,
            (DType::F32, DType::F32) => DType::F32,
        }
    }

    fn weight(&mut self, host: HostTensor) -> Result<Weight, Error> {
        Weight::new(host, self.dtype)
    }

    fn experts(&mut self, host: HostTensor) -> Result<Weight, Error> {
        let weight = Weight::new(host, self.dtype)?;
        weight.dims3("experts")?;
        Ok(weight)
    }

    fn dummy_weight(&mut self, dummy: &Dummy) -> Result<Weight, Error> {
        Weight::new(made(dummy), self.dtype)
    }

    fn dummy_experts(&mut self, dummy: &Dummy) -> Result<Weight, Error> {
        self.experts(made(dummy))
    }

    fn kv_layer(&mut self, spec: &KvLayerSpec) -> Result<KvLayer, Error> {
        KvLayer::new(spec, self.dtype)
    }

    fn dummy_kv(&mut self, kv: &mut KvLayer, seed: u64) -> Result<(), Error> {
        kv.fill(seed);
        Ok(())
    }

    fn begin_step(&mut self, batch: &Batch) -> Result<(), Error> {
        let rows = batch.tokens.len();
        let mut next = 0;
        for sequence in &batch.sequences {
            if sequence.rows.start != next || sequence.rows.is_empty() {
                let detail = format!("rows {:?} of a sequence do not follow row {next}", sequence.rows);
                return Err(Error::Shape { op: "begin_step", detail });
            }
            next = sequence.rows.end;
        }
        let last_logit = batch.logit_rows.last().map_or(0, |&row| row as usize + 1);
        if next != rows || last_logit > rows {
            let detail = format!("{rows} tokens, sequences over {next} rows, logits up to row {last_logit}");
            return Err(Error::Shape { op: "begin_step", detail });
        }
        self.tokens.clone_from(&batch.tokens);
        for &Fed { row, from } in &batch.fed {
            match (self.tokens.get_mut(row as usize), self.drawn.get(from as usize)) {
                (Some(token), Some(drawn)) => *token = *drawn,
                _ => {
                    let drawn = self.drawn.len();
                    let detail = format!(
                        "row {row} of {rows} has the token of logit row {from}, of {drawn} before it"
                    );
                    return Err(Error::Shape { op: "begin_step", detail });
                }
            }
        }
        self.sequences.clone_from(&batch.sequences);
        self.logit_rows.clone_from(&batch.logit_rows);
        self.positions.clear();
        self.positions.extend(batch.positions());
        self.sequence_of_row.clear();
        let indexed = batch.sequences.iter().enumerate();
        self.sequence_of_row.extend(indexed.flat_map(|(i, s)| std::iter::repeat_n(i, s.rows.len())));
        self.turns.clear();
        Ok(())
    }

    fn embed(&mut self, table: &Weight, first_token: TokenId) -> Result<Tensor, Error> {
        let (rows, hidden) = table.dims2("embed")?;
        let mut out = Tensor::zeros(self.tokens.len(), hidden);
        table.with("embed", |elements| {
            for (token, out) in self.tokens.iter().zip(out.as_mut_slice().chunks_exact_mut(hidden)) {
                let local = token.0.checked_sub(first_token.0).map(|l| l as usize).filter(|&l| l < rows);
                if let Some(local) = local {
                    widen_into(elements.slice(local * hidden, hidden), out);
                }
            }
        })?;
        Ok(out)
    }

    fn round(&mut self, x: Tensor) -> Result<Tensor, Error> {
        Ok(self.rounded(x))
    }

    fn norm(&mut self, x: &Tensor, weight: &Weight, kind: Norm) -> Result<Tensor, Error> {
        let &[width] = weight.dims() else {
            let detail = format!("the weight has the shape {:?}", weight.dims());
            return Err(Error::Shape { op: "norm", detail });
        };
        x.expect_width("norm", width)?;
        let mut out = Tensor::zeros(x.rows(), width);
        let rounds = self.rounds();
        weight.with("norm", |w| norm(x.as_slice(), w, kind, rounds, out.as_mut_slice()))?;
        Ok(self.rounded(out))
    }

    fn linear(&mut self, x: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
        let out = self.linear_partial(x, weight)?;
        Ok(self.rounded(out))
    }

    fn linear_partial(&mut self, x: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
        let (outs, inner) = weight.dims2("linear")?;
        x.expect_width("linear", inner)?;
        let mut out = Tensor::zeros(x.rows(), outs);
        weight.with("linear", |w| matmul(&self.threads, x.as_slice(), w, out.as_mut_slice(), inner))?;
        Ok(out)
    }

    fn attention(
        &mut self,
        qkv: &Tensor,
        kv: &mut KvLayer,
        rope: Option<Rope>,
        window: Window,
    ) -> Result<Tensor, Error> {
        if qkv.rows() != self.tokens.len() {
            let detail = format!("{} rows in a step of {}", qkv.rows(), self.tokens.len());
            return Err(Error::Shape { op: "attention", detail });
        }
        if let Some(rope) = rope {
            self.turns.prepare(rope, kv.spec().head_dim, &self.positions, self.dtype == DType::BF16);
        }
        let step = Step {
            threads: &self.threads,
            sequences: &self.sequences,
            sequence_of_row: &self.sequence_of_row,
            positions: &self.positions,
            turns: &self.turns,
            rounds: self.rounds(),
        };
        attention(&step, qkv, kv, rope, window)
    }

    fn swiglu(&mut self, gate_up: &Tensor) -> Result<Tensor, Error> {
        if !gate_up.width().is_multiple_of(2) {
            let detail = format!("rows of {} are not gate and up", gate_up.width());
            return Err(Error::Shape { op: "swiglu", detail });
        }
        let width = gate_up.width() / 2;
        let mut out = Tensor::zeros(gate_up.rows(), width);
        swiglu_rows(gate_up.as_slice(), width, self.dtype, out.as_mut_slice());
        Ok(out)
    }

    fn route(&mut self, logits: &Tensor, routing: Routing) -> Result<Routed, Error> {
        route(logits, routing)
    }

    fn routed_experts(
        &mut self,
        x: &Tensor,
        routed: &Routed,
        gate_up: &Weight,
        down: &Weight,
        first_expert: usize,
    ) -> Result<Tensor, Error> {
        let stack = Stack { gate_up, down, first_expert };
        routed_experts(&self.threads, x, routed, &stack, self.dtype)
    }

    fn place(&mut self, mut routed: Routed, slots: &ExpertSlots, first_row: usize) -> Result<Routed, Error> {
        let rows = first_row..first_row + routed.experts.len() / routed.top_k.max(1);
        let (Some(tokens), Some(positions)) =
            (self.tokens.get(rows.clone()), self.positions.get(rows.clone()))
        else {
            let detail = format!("rows {rows:?} in a step of {}", self.tokens.len());
            return Err(Error::Shape { op: "place", detail });
        };
        dispatch::place(&mut routed, slots, tokens.iter().copied().zip(positions.iter().copied()))?;
        Ok(routed)
    }

    fn count_choices(&mut self, routed: &Routed, counts: &mut [u64]) -> Result<bool, Error> {
        for &expert in routed.experts.iter() {
            let Some(count) = counts.get_mut(expert as usize) else {
                let detail = format!("expert {expert} of {} that are counted", counts.len());
                return Err(Error::Shape { op: "count_choices", detail });
            };
            *count += 1;
        }
        Ok(true)
    }

    fn slice_rows(&mut self, x: &Tensor, rows: Range<usize>) -> Result<Tensor, Error> {
        let width = x.width();
        let Some(wanted) = x.as_slice().get(rows.start * width..rows.end * width) else {
            return Err(Error::Shape { op: "slice_rows", detail: format!("rows {rows:?} of {}", x.rows()) });
        };
        Ok(Tensor::copied(width, wanted))
    }

    fn pack(
        &mut self,
        x: &Tensor,
        routed: &Routed,
        owners: ExpertOwners,
        counts: &mut Vec<usize>,
    ) -> Result<Tensor, Error> {
        dispatch::pack(x, routed, owners, counts)
    }

    fn unpack(&mut self, packed: &Tensor, hidden: usize) -> Result<(Tensor, Routed), Error> {
        dispatch::unpack(packed, hidden)
    }

    fn combine(&mut self, returned: &Tensor, routed: &Routed, owners: ExpertOwners) -> Result<Tensor, Error> {
        dispatch::combine(returned, routed, owners)
    }

    fn add_rows(&mut self, mut a: Tensor, first_row: usize, b: &Tensor, scale: f32) -> Result<Tensor, Error> {
        b.expect_width("add_rows", a.width())?;
        let (rows, start) = (a.rows(), first_row * a.width());
        let Some(part) = a.as_mut_slice().get_mut(start..start + b.as_slice().len()) else {
            let detail = format!("{} rows from {first_row} on, of {rows}", b.rows());
            return Err(Error::Shape { op: "add_rows", detail });
        };
        for (a, &b) in part.iter_mut().zip(b.as_slice()) {
            *a += scale * b;
        }
        Ok(a)
    }

    fn add_scaled(&mut self, mut a: Tensor, b: &Tensor, scale: f32) -> Result<Tensor, Error> {
        a.expect_shape_of("add_scaled", b)?;
        for (a, &b) in a.as_mut_slice().iter_mut().zip(b.as_slice()) {
            *a += scale * b;
        }
        Ok(a)
    }

    fn residual_add(&mut self, x: Tensor, sum: &Tensor) -> Result<Tensor, Error> {
        let x = self.add_scaled(x, sum, 1.0)?;
        Ok(self.rounded(x))
    }

    fn logit_rows(&mut self, x: &Tensor, which: Range<usize>) -> Result<Tensor, Error> {
        let Some(wanted) = self.logit_rows.get(which.clone()) else {
            let detail = format!("rows {which:?} of {} that have logits", self.logit_rows.len());
            return Err(Error::Shape { op: "logit_rows", detail });
        };
        Ok(Tensor::collect(x.width(), wanted.len() * x.width(), |data| {
            wanted.iter().for_each(|&row| data.extend_from_slice(x.row(row as usize)));
        }))
    }

    fn buffer(&mut self, rows: usize, width: usize) -> Result<Tensor, Error> {
        Ok(Tensor::zeros(rows, width))
    }

    fn upload(&mut self, width: usize, values: &[f32]) -> Result<Tensor, Error> {
        Tensor::new(width, values.to_vec())
    }

    fn draw(
        &mut self,
        logits: &Tensor,
        (width, scale): (usize, f32),
        (first, asks): (usize, &[Ask<'_>]),
    ) -> Result<Vec<Choice>, Error> {
        let mut values = self.read(logits)?;
        values.iter_mut().for_each(|value| *value *= scale);
        let choices = draw_rows(&values, width, asks);
        let token = |choice: &Choice| match choice {
            Choice::Token { token, .. } => *token,
            Choice::Likelihood(_) | Choice::NotANumber | Choice::Left => TokenId(0),
        };
        let tokens: Vec<TokenId> = choices.iter().map(token).collect();
        self.feed(first, &tokens)?;
        Ok(choices)
    }

    fn mark(&mut self) -> Result<Vec<Choice>, Error> {
        Ok(Vec::new())
    }

    fn feed(&mut self, first: usize, tokens: &[TokenId]) -> Result<(), Error> {
        let end = first + tokens.len();
        if self.drawn.len() < end {
            self.drawn.resize(end, TokenId(0));
        }
        self.drawn[first..end].copy_from_slice(tokens);
        Ok(())
    }

    fn tokens_drawn(&mut self, rows: Range<usize>) -> Result<Tensor, Error> {
        let bits: Vec<f32> = self.drawn[rows].iter().map(|token| f32::from_bits(token.0)).collect();
        Tensor::new(bits.len(), bits)
    }

    fn feed_tensor(&mut self, first: usize, tokens: &Tensor) -> Result<(), Error> {
        let tokens: Vec<TokenId> = tokens.as_slice().iter().map(|bits| TokenId(bits.to_bits())).collect();
        self.feed(first, &tokens)
    }

    fn is_drawn(&mut self, _drawing: &Vec<Choice>) -> Result<bool, Error> {
        Ok(true)
    }

    fn collect(&mut self, drawing: Vec<Choice>) -> Result<Vec<Choice>, Error> {
        Ok(drawing)
    }

    fn read(&mut self, x: &Tensor) -> Result<Vec<f32>, Error> {
        Ok(x.as_slice().to_vec())
    }
}

/// All of `dummy`, on every core: its bands are independent.
fn made(dummy: &Dummy) -> HostTensor {
    let mut data = vec![bf16::ZERO; dummy.elements()];
    dummy.bands(&mut data).into_par_iter().for_each(DummyBand::fill);
    HostTensor::BF16 { shape: dummy.shape.clone(), data }
}

/// silu(gate) · up for rows of `gate_up` [T, 2I]: each factor rounded as the reference stores it.
pub(crate) fn swiglu_rows(gate_up: &[f32], width: usize, dtype: DType, out: &mut [f32]) {
    let rounds = dtype == DType::BF16;
    for (gate_up, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
        let (gate, up) = gate_up.split_at(width);
        dispatch(Silu { gate, out });
        if rounds {
            round_all_bf16(out);
        }
        out.iter_mut().zip(up).for_each(|(o, &u)| *o *= u);
        if rounds {
            round_all_bf16(out);
        }
    }
}

/// silu of each element; the loop is left to the compiler.
struct Silu<'a> {
    gate: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Silu<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) {
        for i in 0..self.out.len() {
            self.out[i] = silu(self.gate[i]);
        }
    }
}
