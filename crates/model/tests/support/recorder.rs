//! A backend without arithmetic: a weight is the host tensor it came as.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use model::{MlpWeights, Weights};
use ops::sample::{Ask, Choice};
use ops::{
    Backend, Batch, Error, ExpertOwners, ExpertSlots, HostTensor, KvLayerSpec, Norm, Rope, Routing, Window,
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
}

impl Recorder {
    pub(crate) fn new(dtype: DType) -> Self {
        Self::with_room(dtype, u64::MAX)
    }

    pub(crate) fn with_room(dtype: DType, room: u64) -> Self {
        Self { dtype, room, read: Arc::default(), taken: 0, ahead_max: 0 }
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
