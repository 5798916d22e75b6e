//! A backend with one op computed wrongly, for mistakes that no configuration can express.

use std::ops::Range;

use ops::sample::{Ask, Choice};
use ops::{
    Backend, Batch, Error, ExpertOwners, ExpertSlots, HostTensor, KvLayerSpec, Norm, Rope, Routing, Window,
};
use ops_cpu::{CpuBackend, KvLayer, Routed, Tensor, Weight};
use types::{DType, TokenId};

/// Width of the residual stream in every golden case.
const HIDDEN: usize = 64;

/// The mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mistake {
    /// No mistake: the wrapper itself changes nothing.
    None,
    /// Rotary pairs (i, i + D/2) instead of (2i, 2i+1).
    NeoxRope,
    /// Routing weights are the logits, not their scores.
    WeightsBeforeSigmoid,
    /// up is gated by itself: silu(up) · gate.
    GateUpSwapped,
    /// The MLP reads the state after attention instead of the layer's one norm.
    SerialBlock,
}

/// Delegates everything but the mistake.
pub(crate) struct Mutant {
    inner: CpuBackend,
    mistake: Mistake,
    heads: Option<(usize, usize, usize)>,
    /// The layer's residual stream with its norm, and whether attention has run.
    serial: Option<(Tensor, Weight, Norm)>,
    attended: bool,
    /// What the MLP of a serial block would read.
    second: Option<Tensor>,
}

impl Mutant {
    pub(crate) fn new(inner: CpuBackend, mistake: Mistake) -> Self {
        Self { inner, mistake, heads: None, serial: None, attended: false, second: None }
    }

    /// The MLP's input: the one norm, or in a serial block the norm of the state after attention.
    fn input(&self, x: &Tensor) -> Tensor {
        self.second.clone().unwrap_or_else(|| x.clone())
    }
}

/// Columns of q and k so ordered that turning neighbours turns (i, i + D/2).
fn neox(qkv: &Tensor, (query, kv, dim): (usize, usize, usize)) -> Tensor {
    let mut out = qkv.clone();
    for row in out.as_mut_slice().chunks_exact_mut((query + 2 * kv) * dim) {
        for head in row[..(query + kv) * dim].chunks_exact_mut(dim) {
            let old = head.to_vec();
            for i in 0..dim / 2 {
                head[2 * i] = old[i];
                head[2 * i + 1] = old[i + dim / 2];
            }
        }
    }
    out
}

fn swapped(rows: &[f32], width: usize) -> Vec<f32> {
    rows.chunks_exact(2 * width).flat_map(|row| [&row[width..], &row[..width]].concat()).collect()
}

impl Backend for Mutant {
    type Tensor = Tensor;
    type Weight = Weight;
    type Experts = Weight;
    type KvLayer = KvLayer;
    type Routed = (Routed, Tensor);
    type Drawing = Vec<Choice>;

    fn dtype(&self) -> DType {
        self.inner.dtype()
    }

    fn weight_dtype(&self, stored: DType) -> DType {
        self.inner.weight_dtype(stored)
    }

    fn weight(&mut self, host: HostTensor) -> Result<Weight, Error> {
        self.inner.weight(host)
    }

    fn experts(&mut self, host: HostTensor) -> Result<Weight, Error> {
        let HostTensor::F32 { shape, data } = host else { return self.inner.experts(host) };
        // Of the two stacks, gate_up is the one that reads the residual stream: [E, 2I, H], and not [E, H, I].
        let is_gate_up = shape[2] == HIDDEN;
        let matrix = shape[1] * shape[2];
        let data = match self.mistake == Mistake::GateUpSwapped && is_gate_up {
            true => data.chunks_exact(matrix).flat_map(|m| swapped(m, matrix / 2)).collect(),
            false => data,
        };
        self.inner.experts(HostTensor::F32 { shape, data })
    }

    fn kv_layer(&mut self, spec: &KvLayerSpec) -> Result<KvLayer, Error> {
        self.heads = Some((spec.query_heads, spec.kv_heads, spec.head_dim));
        self.inner.kv_layer(spec)
    }

    fn begin_step(&mut self, batch: &Batch) -> Result<(), Error> {
        self.inner.begin_step(batch)
    }

    fn embed(&mut self, table: &Weight, first_token: TokenId) -> Result<Tensor, Error> {
        self.inner.embed(table, first_token)
    }

    fn round(&mut self, x: Tensor) -> Result<Tensor, Error> {
        self.inner.round(x)
    }

    fn norm(&mut self, x: &Tensor, weight: &Weight, norm: Norm) -> Result<Tensor, Error> {
        if self.mistake == Mistake::SerialBlock {
            self.serial = Some((x.clone(), weight.clone(), norm));
            self.second = None;
        }
        self.inner.norm(x, weight, norm)
    }

    fn linear(&mut self, x: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
        let x = self.input(x);
        self.inner.linear(&x, weight)
    }

    fn linear_partial(&mut self, x: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
        let out = self.inner.linear_partial(x, weight)?;
        if let (true, Some((stream, weight, norm))) = (std::mem::take(&mut self.attended), &self.serial) {
            let after = self.inner.residual_add(stream.clone(), &out)?;
            self.second = Some(self.inner.norm(&after, weight, *norm)?);
        }
        Ok(out)
    }

    fn attention(
        &mut self,
        qkv: &Tensor,
        kv: &mut KvLayer,
        rope: Option<Rope>,
        window: Window,
    ) -> Result<Tensor, Error> {
        self.attended = true;
        match (self.mistake, self.heads) {
            (Mistake::NeoxRope, Some(heads)) => self.inner.attention(&neox(qkv, heads), kv, rope, window),
            _ => self.inner.attention(qkv, kv, rope, window),
        }
    }

    fn swiglu(&mut self, gate_up: &Tensor) -> Result<Tensor, Error> {
        match self.mistake {
            Mistake::GateUpSwapped => {
                let rows = swapped(gate_up.as_slice(), gate_up.width() / 2);
                self.inner.swiglu(&Tensor::new(gate_up.width(), rows)?)
            }
            _ => self.inner.swiglu(gate_up),
        }
    }

    fn route(&mut self, logits: &Tensor, routing: Routing) -> Result<(Routed, Tensor), Error> {
        let mut routed = self.inner.route(logits, routing)?;
        if self.mistake == Mistake::WeightsBeforeSigmoid {
            for (i, weight) in routed.weights.iter_mut().enumerate() {
                let row = i / routed.top_k;
                *weight = logits.as_slice()[row * logits.width() + routed.experts[i] as usize];
            }
        }
        Ok((routed, logits.clone()))
    }

    fn routed_experts(
        &mut self,
        x: &Tensor,
        routed: &(Routed, Tensor),
        gate_up: &Weight,
        down: &Weight,
        first_expert: usize,
    ) -> Result<Tensor, Error> {
        let x = self.input(x);
        self.inner.routed_experts(&x, &routed.0, gate_up, down, first_expert)
    }

    fn place(
        &mut self,
        (routed, x): (Routed, Tensor),
        slots: &ExpertSlots,
        first_row: usize,
    ) -> Result<(Routed, Tensor), Error> {
        Ok((self.inner.place(routed, slots, first_row)?, x))
    }

    fn count_choices(&mut self, (routed, _): &(Routed, Tensor), counts: &mut [u64]) -> Result<bool, Error> {
        self.inner.count_choices(routed, counts)
    }

    fn slice_rows(&mut self, x: &Tensor, rows: Range<usize>) -> Result<Tensor, Error> {
        self.inner.slice_rows(x, rows)
    }

    fn pack(
        &mut self,
        x: &Tensor,
        (routed, _): &(Routed, Tensor),
        owners: ExpertOwners,
        counts: &mut Vec<usize>,
    ) -> Result<Tensor, Error> {
        self.inner.pack(x, routed, owners, counts)
    }

    fn unpack(&mut self, _: &Tensor, _: usize) -> Result<(Tensor, (Routed, Tensor)), Error> {
        unreachable!("mistakes are rehearsed with replicated rows")
    }

    fn combine(
        &mut self,
        returned: &Tensor,
        (routed, _): &(Routed, Tensor),
        owners: ExpertOwners,
    ) -> Result<Tensor, Error> {
        self.inner.combine(returned, routed, owners)
    }

    fn add_rows(&mut self, a: Tensor, first_row: usize, b: &Tensor, scale: f32) -> Result<Tensor, Error> {
        self.inner.add_rows(a, first_row, b, scale)
    }

    fn upload(&mut self, width: usize, values: &[f32]) -> Result<Tensor, Error> {
        self.inner.upload(width, values)
    }

    fn add_scaled(&mut self, a: Tensor, b: &Tensor, scale: f32) -> Result<Tensor, Error> {
        self.inner.add_scaled(a, b, scale)
    }

    fn residual_add(&mut self, x: Tensor, sum: &Tensor) -> Result<Tensor, Error> {
        self.inner.residual_add(x, sum)
    }

    fn logit_rows(&mut self, x: &Tensor, which: Range<usize>) -> Result<Tensor, Error> {
        self.inner.logit_rows(x, which)
    }

    fn buffer(&mut self, rows: usize, width: usize) -> Result<Tensor, Error> {
        self.inner.buffer(rows, width)
    }

    fn draw(
        &mut self,
        logits: &Tensor,
        shape: (usize, f32),
        asks: (usize, &[Ask<'_>]),
    ) -> Result<Vec<Choice>, Error> {
        self.inner.draw(logits, shape, asks)
    }

    fn mark(&mut self) -> Result<Vec<Choice>, Error> {
        self.inner.mark()
    }

    fn feed(&mut self, first: usize, tokens: &[TokenId]) -> Result<(), Error> {
        self.inner.feed(first, tokens)
    }

    fn tokens_drawn(&mut self, rows: Range<usize>) -> Result<Tensor, Error> {
        self.inner.tokens_drawn(rows)
    }

    fn feed_tensor(&mut self, first: usize, tokens: &Tensor) -> Result<(), Error> {
        self.inner.feed_tensor(first, tokens)
    }

    fn is_drawn(&mut self, drawing: &Vec<Choice>) -> Result<bool, Error> {
        self.inner.is_drawn(drawing)
    }

    fn collect(&mut self, drawing: Vec<Choice>) -> Result<Vec<Choice>, Error> {
        self.inner.collect(drawing)
    }

    fn read(&mut self, x: &Tensor) -> Result<Vec<f32>, Error> {
        self.inner.read(x)
    }
}
