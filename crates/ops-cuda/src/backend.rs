//! The backend: every op checks shapes, takes its result from the arena and queues its kernel.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use half::bf16;
use ops::sample::{Ask, Choice};
use ops::{
    Backend, Batch, Dummy, Error, ExpertOwners, ExpertSlots, HostTensor, KvLayerSpec, Norm, Rope, Routing,
    WeightParts, Window,
};
use types::{Bytes, DType, TokenId};

use crate::attention::{AttentionKernels, HeadShape, KvLayer, RopeKey, frequencies, head_shape};
use crate::device::{Device, Grid, Options};
use crate::dummy::DummyKernel;
use crate::graph::{Course, Recordings};
use crate::idle::Idle;
use crate::kernels::{Address, EmbedParams, GatherParams, NormParams, RoundParams};
use crate::landing::{Drawing, DrawnTokens, Reports};
use crate::loading::Loading;
use crate::memory::{self, DeviceBuffer, Pinned};
use crate::sampling::{DRAWN_ROWS_MAX, Staging, left_to_host};
use crate::step::Step;
use crate::tensor::{Routed, Tensor, Weight, same_shape, size};

/// The op set on one card for one rank. Not `Send`: the thread that makes it uses it.
#[derive(Debug)]
pub struct CudaBackend {
    dtype: DType,
    attention: HashMap<HeadShape, AttentionKernels>,
    turns: HashMap<RopeKey, DeviceBuffer>,
    landing: Pinned,
    step: Step,
    recordings: Recordings,
    idle: Idle,
    staging: Staging,
    drawn: DrawnTokens,
    pub(crate) dummy: Option<DummyKernel>,
    pub(crate) loading: Loading,
    device: Rc<Device>,
}

impl CudaBackend {
    /// Takes a card: compiles the kernels (or reads them from the cache) and allocates the activations' memory.
    ///
    /// # Errors
    /// When a library, the card or memory is missing, or a kernel does not compile.
    pub fn new(options: &Options) -> Result<Self, crate::Error> {
        let dtype = options.dtype;
        let device = Rc::new(Device::open(options)?);
        Ok(Self {
            dtype,
            attention: HashMap::new(),
            turns: HashMap::new(),
            landing: Pinned::new(1 << 16)?,
            step: Step::new()?,
            recordings: Recordings::default(),
            idle: Idle::new()?,
            staging: Staging::new()?,
            drawn: DrawnTokens::new()?,
            dummy: None,
            loading: Loading::default(),
            device,
        })
    }

    /// The card's name, as its driver says it.
    ///
    /// # Errors
    /// On a driver failure.
    pub fn card(&self) -> Result<String, crate::Error> {
        self.device.name()
    }

    /// Memory of the card that nothing has taken yet.
    ///
    /// # Errors
    /// On a driver failure.
    pub fn memory_free(&self) -> Result<Bytes, crate::Error> {
        self.device.bind()?;
        memory::free()
    }

    /// Waits until the card has done everything that was queued.
    ///
    /// # Errors
    /// On a device failure.
    pub fn synchronize(&self) -> Result<(), Error> {
        Ok(self.device.synchronize()?)
    }

    pub(crate) const fn storage(&self) -> DType {
        self.dtype
    }

    pub(crate) fn staging(&mut self) -> (&mut Staging, &Device) {
        (&mut self.staging, &self.device)
    }

    pub(crate) const fn drawn(&mut self) -> (&mut DrawnTokens, &Rc<Device>) {
        (&mut self.drawn, &self.device)
    }

    /// Makes room for the tokens of so many logit rows.
    pub(crate) fn reserve_drawn(&mut self, rows: usize) -> Result<(), Error> {
        if self.drawn.reserve(&self.device, rows)? {
            self.recordings.forget();
        }
        Ok(())
    }

    /// Queues the way to the host of tokens that the step's last kernel so far has drawn: how many from which on.
    pub(crate) fn land_drawn(&mut self, rows: (usize, usize), reports: Reports) -> Result<Drawing, Error> {
        self.idle.ends(&self.device)?;
        Ok(self.drawn.land(&self.device, rows, (reports, self.idle.step()))?)
    }

    pub(crate) fn measure_idle(&mut self, step: usize) {
        self.idle.measure(step);
    }

    pub(crate) const fn device(&self) -> &Rc<Device> {
        &self.device
    }

    /// Time between the last kernel of the step before the one that was collected last and that one's first kernel, as the
    /// card saw it: it had nothing but copies to do. `None` before the second step.
    #[must_use]
    pub const fn idle(&self) -> Option<Duration> {
        self.idle.between
    }

    /// Notes a cache layer for the recording that is being made.
    pub(crate) fn note(&mut self, layer: (KvLayerSpec, Window)) {
        self.recordings.note(layer);
    }

    /// Starts a step; a recording that was left open by an error ends without a result.
    fn start(&mut self, batch: &Batch, rows: Option<usize>) -> Result<(), Error> {
        self.device.bind()?;
        self.device.alone();
        self.device.begin_sums();
        if self.recordings.abandon() {
            // The stream leaves capture whatever the outcome.
            drop(self.device.lanes().end_capture());
        }
        if self.step.begin(&self.device, batch, (rows, self.drawn.rows()))? {
            self.recordings.forget();
        }
        Ok(self.idle.begins(&self.device)?)
    }

    fn record(&mut self, batch: &Batch, rows: usize) -> Result<(), Error> {
        self.start(batch, Some(rows))?;
        self.device.lanes().begin_capture()?;
        self.device.unchain();
        self.recordings.open(rows);
        Ok(())
    }

    pub(crate) const fn step(&self) -> &Step {
        &self.step
    }

    /// Room in the compute dtype.
    pub(crate) fn tensor(&self, rows: usize, width: usize) -> Result<Tensor, Error> {
        Tensor::new(&self.device, rows, width, self.dtype)
    }

    /// The frequencies of `rope`, on the card from their first use on.
    pub(crate) fn turns(&mut self, rope: Rope, head_dim: usize) -> Result<Address, Error> {
        match self.turns.entry((rope.theta.to_bits(), head_dim)) {
            Entry::Occupied(there) => Ok(there.get().address()),
            Entry::Vacant(place) => {
                let values = frequencies(rope, head_dim);
                let buffer = DeviceBuffer::new("rotary frequencies", values.len() * size_of::<f32>())?;
                self.device.upload(buffer.address(), &values)?;
                Ok(place.insert(buffer).address())
            }
        }
    }

    pub(crate) fn attention_kernels(&self, shape: HeadShape) -> Result<&AttentionKernels, Error> {
        self.attention.get(&shape).ok_or_else(|| Error::Shape {
            op: "attention",
            detail: format!("no cache layer with heads of {} in groups of {} was reserved", shape.0, shape.1),
        })
    }

    /// Copies the result of a step to the host.
    pub(crate) fn land(&mut self, from: Address, bytes: usize) -> Result<&[u8], Error> {
        self.landing.reserve(bytes)?;
        self.idle.ends(&self.device)?;
        self.device.download(&mut self.landing.as_mut_slice()[..bytes], from)?;
        self.idle.measure(self.idle.step());
        Ok(&self.landing.as_slice()[..bytes])
    }
}

impl Backend for CudaBackend {
    type Tensor = Tensor;
    type Weight = Weight;
    type Experts = Weight;
    type KvLayer = KvLayer;
    type Routed = Routed;
    type Drawing = Drawing;

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weight(&mut self, host: HostTensor) -> Result<Weight, Error> {
        self.device.bind()?;
        Weight::load(&self.device, &host, self.dtype)
    }

    fn experts(&mut self, host: HostTensor) -> Result<Weight, Error> {
        let weight = self.weight(host)?;
        weight.dims3("experts")?;
        Ok(weight)
    }

    fn reside(&mut self, bytes: Bytes, pieces: usize) -> Result<(), Error> {
        self.device.bind()?;
        Ok(self.device.reside(bytes + Bytes(pieces as u64 * memory::ALIGNMENT))?)
    }

    fn weight_parts(&mut self) -> Option<&mut dyn WeightParts<Weight = Weight, Experts = Weight>> {
        Some(self)
    }

    fn dummy_weight(&mut self, dummy: &Dummy) -> Result<Weight, Error> {
        self.make_dummy(dummy)
    }

    fn dummy_experts(&mut self, dummy: &Dummy) -> Result<Weight, Error> {
        let weight = self.make_dummy(dummy)?;
        weight.dims3("experts")?;
        Ok(weight)
    }

    fn kv_layer(&mut self, spec: &KvLayerSpec) -> Result<KvLayer, Error> {
        self.device.bind()?;
        self.recordings.forget();
        let layer = KvLayer::new(self, spec)?;
        let shape = head_shape(spec);
        if !self.attention.contains_key(&shape) {
            let kernels = AttentionKernels::load(self, shape)?;
            self.attention.insert(shape, kernels);
        }
        Ok(layer)
    }

    fn dummy_kv(&mut self, kv: &mut KvLayer, seed: u64) -> Result<(), Error> {
        self.make_dummy_kv(kv, seed)
    }

    fn begin_step(&mut self, batch: &Batch) -> Result<(), Error> {
        self.start(batch, None)
    }

    fn begin_or_repeat(&mut self, batch: &Batch) -> Result<Option<Tensor>, Error> {
        // A recording's places are those of an empty arena.
        let whole = self.device.free.borrow().is_whole();
        let course = if whole { self.recordings.course(batch) } else { Course::Run };
        match course {
            Course::Run => self.start(batch, None)?,
            Course::Record(rows) => self.record(batch, rows)?,
            Course::Repeat(rows) => {
                self.start(batch, Some(rows))?;
                let Some(recording) = self.recordings.get(rows) else {
                    self.record(batch, rows)?;
                    return Ok(None);
                };
                for (spec, window) in &recording.layers {
                    self.step.check_tables(spec, *window)?;
                }
                let result = Tensor::again(&self.device, &recording.result);
                self.device.repeat(&recording.graph)?;
                return Ok(result);
            }
        }
        Ok(None)
    }

    fn keep(&mut self, x: Tensor) -> Result<Tensor, Error> {
        if !self.recordings.is_open() {
            return Ok(x);
        }
        let graph = self.device.lanes().end_capture();
        let graph = match graph {
            Ok(graph) => graph,
            Err(error) => {
                self.recordings.abandon();
                return Err(error.into());
            }
        };
        if let Some(recording) = self.recordings.keep(graph, x.kept()) {
            self.device.repeat(&recording.graph)?;
        }
        self.device.unchain();
        Ok(x)
    }

    fn fork(&mut self) -> Result<(), Error> {
        if self.recordings.is_open() { Ok(self.device.fork()?) } else { Ok(()) }
    }

    fn other_branch(&mut self) -> Result<(), Error> {
        self.device.other_lane();
        Ok(())
    }

    fn join(&mut self) -> Result<(), Error> {
        if self.recordings.is_open() { Ok(self.device.join()?) } else { Ok(()) }
    }

    fn embed(&mut self, table: &Weight, first_token: TokenId) -> Result<Tensor, Error> {
        let (rows, hidden) = table.dims2("embed")?;
        let out = Tensor::new(&self.device, self.step.rows(), hidden, DType::F32)?;
        let params = EmbedParams {
            out: out.address(),
            table: table.address(),
            tokens: self.step.tokens(),
            drawn: self.drawn.at(0),
            first: first_token.0,
            rows: size("embed", rows)?,
            width: size("embed", hidden)?,
        };
        let grid = Grid::new(size("embed", out.rows())?, 1, 256);
        self.device.launch(self.device.kernels.embed, grid, &params)?;
        Ok(out)
    }

    fn round(&mut self, x: Tensor) -> Result<Tensor, Error> {
        if x.dtype() == self.dtype {
            return Ok(x);
        }
        let out = self.tensor(x.rows(), x.width())?;
        let params = RoundParams { out: out.address(), x: x.address(), count: x.elements() as u64 };
        self.device.launch(self.device.kernels.round, Grid::over(x.elements()), &params)?;
        Ok(out)
    }

    fn norm(&mut self, x: &Tensor, weight: &Weight, norm: Norm) -> Result<Tensor, Error> {
        let width = weight.dims1("norm")?;
        if x.width() != width {
            let detail = format!("rows of {} and a weight of {width}", x.width());
            return Err(Error::Shape { op: "norm", detail });
        }
        let out = self.tensor(x.rows(), width)?;
        let (eps, layer) = match norm {
            Norm::Rms { eps } => (eps, 0),
            Norm::Layer { eps } => (eps, 1),
        };
        let params = NormParams {
            out: out.address(),
            x: x.address(),
            weight: weight.address(),
            width: size("norm", width)?,
            x_f32: x.is_f32(),
            eps,
            layer,
        };
        self.device.launch(self.device.kernels.norm, Grid::new(size("norm", x.rows())?, 1, 256), &params)?;
        Ok(out)
    }

    fn linear(&mut self, x: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
        self.product(x, weight, self.dtype)
    }

    fn linear_partial(&mut self, x: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
        self.product(x, weight, DType::F32)
    }

    fn attention(
        &mut self,
        qkv: &Tensor,
        kv: &mut KvLayer,
        rope: Option<Rope>,
        window: Window,
    ) -> Result<Tensor, Error> {
        self.attend(qkv, kv, rope, window)
    }

    fn swiglu(&mut self, gate_up: &Tensor) -> Result<Tensor, Error> {
        self.gated(gate_up)
    }

    fn route(&mut self, logits: &Tensor, routing: Routing) -> Result<Routed, Error> {
        self.choose(logits, routing)
    }

    fn router(&mut self, x: &Tensor, weight: &Weight, routing: Routing) -> Result<Routed, Error> {
        if let Some(routed) = self.route_few(x, weight, routing)? {
            return Ok(routed);
        }
        let logits = self.linear(x, weight)?;
        self.choose(&logits, routing)
    }

    fn routed_experts(
        &mut self,
        x: &Tensor,
        routed: &Routed,
        gate_up: &Weight,
        down: &Weight,
        first_expert: usize,
    ) -> Result<Tensor, Error> {
        self.run_experts(x, routed, (gate_up, down), first_expert)
    }

    fn add_scaled(&mut self, a: Tensor, b: &Tensor, scale: f32) -> Result<Tensor, Error> {
        same_shape("add_scaled", &a, b)?;
        let out = match a.dtype() {
            DType::F32 => None,
            DType::BF16 => Some(Tensor::new(&self.device, a.rows(), a.width(), DType::F32)?),
        };
        self.sum(out.as_ref().unwrap_or(&a), &a, b, scale)?;
        Ok(out.unwrap_or(a))
    }

    fn residual_add(&mut self, x: Tensor, sum: &Tensor) -> Result<Tensor, Error> {
        same_shape("residual_add", &x, sum)?;
        x.expect("residual_add", sum.width(), self.dtype)?;
        self.sum(&x, &x, sum, 1.0)?;
        Ok(x)
    }

    fn residual_norm(
        &mut self,
        x: Tensor,
        (sum, more): (Tensor, Option<(&Tensor, f32)>),
        (weight, norm): (&Weight, Norm),
    ) -> Result<(Tensor, Tensor), Error> {
        match self.residual_norm_at_once(&x, (&sum, more), (weight, norm))? {
            Some(n) => Ok((x, n)),
            None => {
                let sum = match more {
                    Some((more, scale)) => self.add_scaled(sum, more, scale)?,
                    None => sum,
                };
                let x = self.residual_add(x, &sum)?;
                let n = self.norm(&x, weight, norm)?;
                Ok((x, n))
            }
        }
    }

    fn drawn_rows_max(&self) -> usize {
        DRAWN_ROWS_MAX
    }

    fn left_to_host(&self, asks: &[Ask<'_>], width: usize) -> Vec<usize> {
        left_to_host(asks, width)
    }

    fn draw(
        &mut self,
        logits: &Tensor,
        shape: (usize, f32),
        rows: (usize, &[Ask<'_>]),
    ) -> Result<Drawing, Error> {
        self.draw_rows(logits, shape, rows)
    }

    fn mark(&mut self) -> Result<Drawing, Error> {
        self.idle.ends(&self.device)?;
        Ok(self.drawn.mark(&self.device, self.idle.step())?)
    }

    fn feed(&mut self, first: usize, tokens: &[TokenId]) -> Result<(), Error> {
        self.feed_tokens(first, tokens)
    }

    fn tokens_drawn(&mut self, rows: Range<usize>) -> Result<Tensor, Error> {
        self.copy_of_drawn((rows.start, rows.len()))
    }

    fn feed_tensor(&mut self, first: usize, tokens: &Tensor) -> Result<(), Error> {
        self.feed_copy(first, tokens)
    }

    fn is_drawn(&mut self, drawing: &Drawing) -> Result<bool, Error> {
        drawing.is_done(&self.device)
    }

    fn collect(&mut self, drawing: Drawing) -> Result<Vec<Choice>, Error> {
        self.collect_drawn(drawing)
    }

    fn buffer_like(&mut self, like: &Tensor, rows: usize, width: usize) -> Result<Tensor, Error> {
        Tensor::new(&self.device, rows, width, like.dtype())
    }

    fn join_ranks(&mut self, parts: Tensor, shape: (usize, usize, usize)) -> Result<Tensor, Error> {
        self.join_parts(parts, shape)
    }

    fn logit_rows(&mut self, x: &Tensor, which: Range<usize>) -> Result<Tensor, Error> {
        if which.start > which.end || which.end > self.step.logit_count() {
            let detail = format!("rows {which:?} of {} that have logits", self.step.logit_count());
            return Err(Error::Shape { op: "logit_rows", detail });
        }
        let out = Tensor::new(&self.device, which.len(), x.width(), x.dtype())?;
        let params = GatherParams {
            out: out.address(),
            x: x.address(),
            which: self.step.logit_rows(which.start),
            width: size("logit_rows", x.width())?,
            is_f32: x.is_f32(),
        };
        let grid = Grid::new(size("logit_rows", which.len())?, 1, 256);
        self.device.launch(self.device.kernels.gather, grid, &params)?;
        Ok(out)
    }

    fn buffer(&mut self, rows: usize, width: usize) -> Result<Tensor, Error> {
        Tensor::new(&self.device, rows, width, DType::F32)
    }

    fn place(&mut self, routed: Routed, slots: &ExpertSlots, first_row: usize) -> Result<Routed, Error> {
        self.place_choices(routed, slots, first_row)
    }

    /// The choices stay on the card.
    fn count_choices(&mut self, _routed: &Routed, _counts: &mut [u64]) -> Result<bool, Error> {
        Ok(false)
    }

    fn slice_rows(&mut self, x: &Tensor, rows: Range<usize>) -> Result<Tensor, Error> {
        self.slice(x, rows)
    }

    fn pack(
        &mut self,
        x: &Tensor,
        routed: &Routed,
        owners: ExpertOwners,
        counts: &mut Vec<usize>,
    ) -> Result<Tensor, Error> {
        self.pack_rows((x, routed), owners, counts)
    }

    fn unpack(&mut self, packed: &Tensor, hidden: usize) -> Result<(Tensor, Routed), Error> {
        self.unpack_rows(packed, hidden)
    }

    fn combine(&mut self, returned: &Tensor, routed: &Routed, owners: ExpertOwners) -> Result<Tensor, Error> {
        self.combine_rows(returned, routed, owners)
    }

    fn add_rows(&mut self, a: Tensor, first_row: usize, b: &Tensor, scale: f32) -> Result<Tensor, Error> {
        self.add_some_rows(a, first_row, b, scale)
    }

    fn upload(&mut self, width: usize, values: &[f32]) -> Result<Tensor, Error> {
        if width == 0 || !values.len().is_multiple_of(width) {
            let detail = format!("{} values are not rows of {width}", values.len());
            return Err(Error::Shape { op: "upload", detail });
        }
        let out = Tensor::new(&self.device, values.len() / width, width, DType::F32)?;
        self.device.upload(out.address(), values)?;
        Ok(out)
    }

    fn read(&mut self, x: &Tensor) -> Result<Vec<f32>, Error> {
        let landed = self.land(x.address(), x.bytes())?;
        Ok(match x.dtype() {
            DType::F32 => landed.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            DType::BF16 => landed.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        })
    }
}
