//! A backend without arithmetic: a weight is the host tensor it came as.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use half::bf16;
use model::{MlpWeights, Weights};
use ops::sample::{Ask, Choice};
use ops::{
    Backend, Batch, Error, ExpertOwners, ExpertSlots, HostBytes, HostMemory, HostPart, HostTensor,
    KvLayerSpec, Norm, Rope, Routing, WeightParts, Window,
};
use types::{Bytes, DType, TokenId};

/// Keeps weights, refuses them beyond its room, and notes how far reading ran ahead of it.
pub(crate) struct Recorder {
    dtype: DType,
    room: u64,
    /// Bytes read so far, when someone counts them.
    read: Arc<AtomicU64>,
    taken: u64,
    /// Most bytes that were read and not handed over yet.
    pub(crate) ahead_max: u64,
    /// When weights come in parts.
    parts: Option<InParts>,
}

/// Words of memory: aligned for any element.
type Words = Vec<u64>;

/// What parts come in, and the weight that is being put together of them.
struct InParts {
    bytes_max: usize,
    pool: Arc<Pool>,
    shape: Vec<usize>,
    bytes: Vec<u8>,
    written: Vec<bool>,
    /// The last part, whose memory a device may still be reading.
    held: Option<HostPart>,
    /// Parts of all weights.
    count: usize,
}

/// Three pieces of memory, full of what is no part of any weight.
pub(crate) struct Pool {
    idle: Mutex<Vec<Words>>,
    returned: Condvar,
    lent: AtomicUsize,
    /// Most pieces that were out at once.
    lent_max: AtomicUsize,
}

struct Lent {
    words: Words,
    pool: Arc<Pool>,
}

struct Lender(Arc<Pool>);

const PIECES: usize = 3;
const DIRT: u64 = 0x7fc1_7fc1_7fc1_7fc1;

impl HostMemory for Lender {
    fn take(&self) -> Box<dyn HostBytes> {
        let idle = self.0.idle.lock().unwrap();
        let words = self.0.returned.wait_while(idle, |idle| idle.is_empty()).unwrap().pop().unwrap();
        let lent = self.0.lent.fetch_add(1, Ordering::Relaxed) + 1;
        self.0.lent_max.fetch_max(lent, Ordering::Relaxed);
        Box::new(Lent { words, pool: Arc::clone(&self.0) })
    }
}

impl HostBytes for Lent {
    fn as_mut_slice(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.words)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut words = std::mem::take(&mut self.words);
        words.fill(DIRT);
        self.pool.lent.fetch_sub(1, Ordering::Relaxed);
        self.pool.idle.lock().unwrap().push(words);
        self.pool.returned.notify_one();
    }
}

impl Recorder {
    /// Takes weights in parts of at most so many bytes.
    pub(crate) fn in_parts(dtype: DType, bytes_max: usize) -> Self {
        let idle = Mutex::new(vec![vec![DIRT; bytes_max.div_ceil(8)]; PIECES]);
        let (lent, lent_max) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let pool = Arc::new(Pool { idle, returned: Condvar::new(), lent, lent_max });
        let (shape, bytes, written) = (Vec::new(), Vec::new(), Vec::new());
        let parts = InParts { bytes_max, pool, shape, bytes, written, held: None, count: 0 };
        Self { parts: Some(parts), ..Self::new(dtype) }
    }

    /// Parts that came, the pieces of memory that were out at once at most, and those that are out now.
    pub(crate) fn parts_seen(&self) -> (usize, usize, usize) {
        let parts = self.parts.as_ref().unwrap();
        let of = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        (parts.count, of(&parts.pool.lent_max), of(&parts.pool.lent))
    }

    fn put_together(&mut self) -> HostTensor {
        let parts = self.parts.as_mut().unwrap();
        assert!(parts.written.iter().all(|written| *written), "every byte of a weight comes");
        let (shape, bytes) = (parts.shape.clone(), &parts.bytes);
        match self.dtype {
            DType::F32 => {
                let data = bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect();
                HostTensor::F32 { shape, data }
            }
            DType::BF16 => {
                let data = bytes.as_chunks().0.iter().map(|two| bf16::from_le_bytes(*two)).collect();
                HostTensor::BF16 { shape, data }
            }
        }
    }
}

impl WeightParts for Recorder {
    type Weight = HostTensor;
    type Experts = HostTensor;

    fn part_bytes_max(&self) -> usize {
        self.parts.as_ref().unwrap().bytes_max
    }

    fn memory(&mut self) -> Result<Arc<dyn HostMemory>, Error> {
        Ok(Arc::new(Lender(Arc::clone(&self.parts.as_ref().unwrap().pool))))
    }

    fn begin(&mut self, shape: &[usize]) -> Result<(), Error> {
        let bytes = shape.iter().product::<usize>() * self.dtype.bytes();
        let parts = self.parts.as_mut().unwrap();
        (parts.shape, parts.bytes, parts.written) = (shape.to_vec(), vec![0; bytes], vec![false; bytes]);
        Ok(())
    }

    fn write(&mut self, mut part: HostPart) -> Result<(), Error> {
        let first = part.first * self.dtype.bytes();
        let parts = self.parts.as_mut().unwrap();
        assert!(part.bytes <= parts.bytes_max, "a part is no larger than what was asked for");
        let to = first..first + part.bytes;
        assert!(parts.written[to.clone()].iter().all(|written| !written), "no byte comes twice");
        parts.written[to.clone()].fill(true);
        parts.bytes[to].copy_from_slice(&part.memory.as_mut_slice()[..part.bytes]);
        parts.held = Some(part);
        parts.count += 1;
        Ok(())
    }

    fn end_weight(&mut self) -> Result<HostTensor, Error> {
        let host = self.put_together();
        assert!(host.shape().len() <= 2, "a weight is a matrix or a vector");
        self.take(host)
    }

    fn end_experts(&mut self) -> Result<HostTensor, Error> {
        let host = self.put_together();
        assert_eq!(host.shape().len(), 3, "experts are a stack of matrices");
        self.take(host)
    }

    fn finish(&mut self) -> Result<(), Error> {
        self.parts.as_mut().unwrap().held = None;
        Ok(())
    }
}

impl Recorder {
    pub(crate) fn new(dtype: DType) -> Self {
        Self::with_room(dtype, u64::MAX)
    }

    pub(crate) fn with_room(dtype: DType, room: u64) -> Self {
        Self { dtype, room, read: Arc::default(), taken: 0, ahead_max: 0, parts: None }
    }

    pub(crate) fn watching(dtype: DType, read: Arc<AtomicU64>) -> Self {
        Self { read, ..Self::new(dtype) }
    }

    fn take(&mut self, host: HostTensor) -> Result<HostTensor, Error> {
        assert_eq!(host.dtype(), self.dtype, "weights arrive in the compute dtype");
        let needed = host.bytes();
        if needed.0 > self.room {
            return Err(Error::Memory { what: "weight".to_owned(), needed, available: Bytes(self.room) });
        }
        self.room -= needed.0;
        self.taken += needed.0;
        self.ahead_max = self.ahead_max.max(self.read.load(Ordering::Relaxed).saturating_sub(self.taken));
        Ok(host)
    }
}

/// Every weight under a name, to compare and to look into.
pub(crate) fn weights_of(weights: &Weights<Recorder>) -> Vec<(String, &HostTensor)> {
    let mut list = vec![("embed".to_owned(), &weights.embed), ("norm".to_owned(), &weights.final_norm)];
    list.extend(weights.head.iter().map(|head| ("head".to_owned(), head)));
    for (at, layer) in weights.layers.iter().enumerate() {
        let mut add = |name: &str, weight| list.push((format!("{at}.{name}"), weight));
        add("norm", &layer.norm);
        add("qkv", &layer.qkv);
        add("o", &layer.o);
        match &layer.mlp {
            MlpWeights::Dense(mlp) => {
                add("dense.gate_up", &mlp.gate_up);
                add("dense.down", &mlp.down);
            }
            MlpWeights::Sparse { router, gate_up, down, shared } => {
                add("router", router);
                add("experts.gate_up", gate_up);
                add("experts.down", down);
                if let Some(mlp) = shared {
                    add("shared.gate_up", &mlp.gate_up);
                    add("shared.down", &mlp.down);
                }
            }
        }
    }
    list
}

/// Elements as f32.
pub(crate) fn flat(host: &HostTensor) -> Vec<f32> {
    match host {
        HostTensor::F32 { data, .. } => data.clone(),
        HostTensor::BF16 { data, .. } => data.iter().map(|value| value.to_f32()).collect(),
    }
}

impl Backend for Recorder {
    type Tensor = ();
    type Weight = HostTensor;
    type Experts = HostTensor;
    type KvLayer = ();
    type Routed = ();
    type Drawing = ();

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weight(&mut self, host: HostTensor) -> Result<HostTensor, Error> {
        assert!(host.shape().len() <= 2, "a weight is a matrix or a vector");
        self.take(host)
    }

    fn experts(&mut self, host: HostTensor) -> Result<HostTensor, Error> {
        assert_eq!(host.shape().len(), 3, "experts are a stack of matrices");
        self.take(host)
    }

    fn weight_parts(&mut self) -> Option<&mut dyn WeightParts<Weight = HostTensor, Experts = HostTensor>> {
        if self.parts.is_some() { Some(self) } else { None }
    }

    fn kv_layer(&mut self, _: &KvLayerSpec) -> Result<(), Error> {
        unreachable!("loading reserves no cache")
    }

    fn begin_step(&mut self, _: &Batch) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn embed(&mut self, _: &HostTensor, _: TokenId) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn round(&mut self, (): ()) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn norm(&mut self, (): &(), _: &HostTensor, _: Norm) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn linear(&mut self, (): &(), _: &HostTensor) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn linear_partial(&mut self, (): &(), _: &HostTensor) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn attention(&mut self, (): &(), (): &mut (), _: Option<Rope>, _: Window) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn swiglu(&mut self, (): &()) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn route(&mut self, (): &(), _: Routing) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn routed_experts(
        &mut self,
        (): &(),
        (): &(),
        _: &HostTensor,
        _: &HostTensor,
        _: usize,
    ) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn place(&mut self, (): (), _: &ExpertSlots, _: usize) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn count_choices(&mut self, (): &(), _: &mut [u64]) -> Result<bool, Error> {
        unreachable!("loading takes no step")
    }

    fn slice_rows(&mut self, (): &(), _: Range<usize>) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn pack(&mut self, (): &(), (): &(), _: ExpertOwners, _: &mut Vec<usize>) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn unpack(&mut self, (): &(), _: usize) -> Result<((), ()), Error> {
        unreachable!("loading takes no step")
    }

    fn combine(&mut self, (): &(), (): &(), _: ExpertOwners) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn add_rows(&mut self, (): (), _: usize, (): &(), _: f32) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn upload(&mut self, _: usize, _: &[f32]) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn draw(&mut self, (): &(), _: (usize, f32), _: (usize, &[Ask<'_>])) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn mark(&mut self) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn feed(&mut self, _: usize, _: &[TokenId]) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn tokens_drawn(&mut self, _: Range<usize>) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn feed_tensor(&mut self, _: usize, (): &()) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn is_drawn(&mut self, (): &()) -> Result<bool, Error> {
        unreachable!("loading takes no step")
    }

    fn collect(&mut self, (): ()) -> Result<Vec<Choice>, Error> {
        unreachable!("loading takes no step")
    }

    fn add_scaled(&mut self, (): (), (): &(), _: f32) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn residual_add(&mut self, (): (), (): &()) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn logit_rows(&mut self, (): &(), _: Range<usize>) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn buffer(&mut self, _: usize, _: usize) -> Result<(), Error> {
        unreachable!("loading takes no step")
    }

    fn read(&mut self, (): &()) -> Result<Vec<f32>, Error> {
        unreachable!("loading takes no step")
    }
}
