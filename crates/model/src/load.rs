//! Loading one rank's weights: one thread reads ahead, this one hands what was read to the backend. A backend that keeps
//! weights in host memory gets whole ones; one that has a device of its own gets them in parts, in memory that it lends
//! ([`ops::WeightParts`]), of which the next is read while one is copied. Reads of one weight or part run in parallel.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::{thread, vec};

use ops::{Backend, Dummy, HostMemory, HostPart, HostTensor, WeightParts};
use rayon::prelude::*;
use types::{Bytes, DType};

use crate::assemble::{Assembler, Assembly};
use crate::catalogue::Catalogue;
use crate::checkpoint::{Block, Checkpoint};
use crate::config::{Mlp, ModelConfig};
use crate::dummy;
use crate::error::Error;
use crate::layout::{Part, Slot, slots};
use crate::shard::ShardPlan;
use crate::weights::{GatedMlp, LayerWeights, MlpWeights, Weights};

/// Told how far loading is, from several threads.
pub trait Progress: Sync {
    /// Once, before the first read: what this rank will read.
    fn start(&self, total: Bytes);
    /// After each read: what it read. The sum over all calls is the total.
    fn advance(&self, bytes: Bytes);
}

/// Nobody watches.
impl Progress for () {
    fn start(&self, _total: Bytes) {}
    fn advance(&self, _bytes: Bytes) {}
}

/// What loading did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadSummary {
    /// Read from disk by this rank.
    pub bytes_read: Bytes,
    /// Now resident on the device.
    pub resident: Bytes,
    /// Resident weights.
    pub tensors: usize,
    /// Vision tensors of the checkpoint that were left alone.
    pub skipped_tensors: usize,
    /// Their size.
    pub skipped_bytes: Bytes,
}

/// Loads the weights of the plan's rank onto `backend`, in the dtype it keeps them in.
///
/// # Errors
/// When the checkpoint does not hold what `config` asks for, a bias is not zero, a file cannot be read, or the
/// backend does not take a weight.
pub fn load<B: Backend>(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    plan: &ShardPlan,
    backend: &mut B,
    progress: &dyn Progress,
) -> Result<(Weights<B>, LoadSummary), Error> {
    let catalogue = Catalogue::resolve(checkpoint, config)?;
    let kept = |stored| backend.weight_dtype(stored);
    let stored = |tensor: &str| checkpoint.dtype(tensor);
    let assembler = Assembler { stored: &stored, catalogue: &catalogue, config, plan, kept: &kept };
    let assemblies: Vec<Assembly> = slots(config).into_iter().map(|slot| assembler.assembly(slot)).collect();
    let biases = own_biases(&catalogue, plan);
    let bias_bytes = biases.iter().filter_map(|bias| checkpoint.entry(bias)).map(|entry| entry.bytes);
    let total = assemblies.iter().map(Assembly::disk_bytes).chain(bias_bytes).sum();
    progress.start(Bytes(total));
    let meter = Meter { progress, bytes: AtomicU64::new(0) };
    biases.par_iter().try_for_each(|bias| check_zero(checkpoint, bias, &meter))?;
    let tensors = assemblies.len();
    let place = |source| Error::Place { weight: "the first weight".to_owned(), source };
    let lent = match backend.weight_parts() {
        Some(parts) => Some((parts.part_bytes_max(), parts.memory().map_err(place)?)),
        None => None,
    };
    let (weights, resident) = thread::scope(|scope| {
        // No buffer: the reader holds what it has read until this thread is done with what came before.
        let (sender, receiver) = sync_channel(0);
        let reader = Reader { assemblies: &assemblies, checkpoint, meter: &meter, lent };
        scope.spawn(move || reader.run(&sender));
        let mut placer = Placer { supply: Supply::Read(receiver), backend, resident: Bytes(0) };
        let weights = placer.weights(config)?;
        Ok::<_, Error>((weights, placer.resident))
    })?;
    if let Some(parts) = backend.weight_parts() {
        parts.finish().map_err(|source| Error::Place { weight: "the last weight".to_owned(), source })?;
    }
    let summary = LoadSummary {
        bytes_read: Bytes(meter.bytes.into_inner()),
        resident,
        tensors,
        skipped_tensors: catalogue.skipped_tensors,
        skipped_bytes: catalogue.skipped_bytes,
    };
    Ok((weights, summary))
}

/// Makes the weights of the plan's rank on `backend` from seeded numbers, with no checkpoint: the same model whatever
/// the plan and the device. Nothing is read, so progress counts what is made.
///
/// # Errors
/// When the backend does not take a weight.
pub fn load_dummy<B: Backend>(
    config: &ModelConfig,
    plan: &ShardPlan,
    backend: &mut B,
    progress: &dyn Progress,
) -> Result<(Weights<B>, LoadSummary), Error> {
    let made = dummy::weights(config, plan);
    let (each, tensors) = (backend.weight_dtype(DType::BF16).bytes(), made.len());
    let elements: usize = made.iter().map(|(_, dummy)| dummy.elements()).sum();
    progress.start(Bytes((elements * each) as u64));
    let supply = Supply::Made { rest: made.into_iter(), each, progress };
    let mut placer = Placer { supply, backend, resident: Bytes(0) };
    let (weights, resident) = (placer.weights(config)?, placer.resident);
    let nothing = Bytes(0);
    let summary =
        LoadSummary { bytes_read: nothing, resident, tensors, skipped_tensors: 0, skipped_bytes: nothing };
    Ok((weights, summary))
}

/// Counts what is read and passes it on.
pub(crate) struct Meter<'a> {
    progress: &'a dyn Progress,
    bytes: AtomicU64,
}

impl Meter<'_> {
    pub(crate) fn advance(&self, bytes: Bytes) {
        self.bytes.fetch_add(bytes.0, Ordering::Relaxed);
        self.progress.advance(bytes);
    }
}

/// The biases this rank checks: the ranks share them out, so that together they read each once.
fn own_biases<'a>(catalogue: &'a Catalogue, plan: &ShardPlan) -> Vec<&'a str> {
    let (first, step) = (plan.whole.as_usize(), plan.whole.size().as_usize());
    catalogue.biases().iter().skip(first).step_by(step).map(String::as_str).collect()
}

fn check_zero(checkpoint: &Checkpoint, bias: &str, meter: &Meter<'_>) -> Result<(), Error> {
    let elements = checkpoint.shape(bias).map_or(0, |shape| shape.iter().product());
    let mut values = vec![0.0_f32; elements];
    checkpoint.read(bias, &Block { matrix: 0, rows: 0..1, cols: 0..elements }, &mut values)?;
    meter.advance(checkpoint.entry(bias).map_or(Bytes(0), |entry| Bytes(entry.bytes)));
    match values.iter().position(|value| *value != 0.0) {
        None => Ok(()),
        Some(element) => {
            Err(Error::Bias { tensor: bias.to_owned(), element, elements, value: values[element] })
        }
    }
}

/// What the reader's thread hands over, or why it ended.
type Read = Result<Message, Error>;

/// A weight, or a piece of one.
enum Message {
    /// All of it.
    Whole(Slot, HostTensor),
    /// It comes in so many parts.
    Begin(Slot, Coming),
    /// The next of them.
    Part(HostPart),
}

/// A weight that comes in parts.
struct Coming {
    shape: Vec<usize>,
    bytes: Bytes,
    parts: usize,
}

/// The thread that reads every weight in order.
struct Reader<'a> {
    assemblies: &'a [Assembly],
    checkpoint: &'a Checkpoint,
    meter: &'a Meter<'a>,
    /// Bytes of a part at most, and the memory that parts are read into.
    lent: Option<(usize, Arc<dyn HostMemory>)>,
}

impl Reader<'_> {
    /// Until a read fails or nobody takes what is read any more.
    fn run(&self, sender: &SyncSender<Read>) {
        for assembly in self.assemblies {
            let outcome = match &self.lent {
                Some((most, memory)) => self.parts(assembly, *most, &**memory, sender),
                None => {
                    let read = assembly.read(self.checkpoint, self.meter);
                    self.hand(sender, read.map(|host| Message::Whole(assembly.slot, host)))
                }
            };
            if outcome.is_none() {
                return;
            }
        }
    }

    fn parts(
        &self,
        assembly: &Assembly,
        most: usize,
        memory: &dyn HostMemory,
        sender: &SyncSender<Read>,
    ) -> Option<()> {
        let parts = assembly.parts(most);
        let coming = Coming { shape: assembly.shape.clone(), bytes: assembly.bytes(), parts: parts.len() };
        self.hand(sender, Ok(Message::Begin(assembly.slot, coming)))?;
        parts.iter().try_for_each(|part| {
            let read = assembly.read_part(part, memory, (self.checkpoint, self.meter));
            self.hand(sender, read.map(Message::Part))
        })
    }

    /// `None` when this was the last.
    fn hand(&self, sender: &SyncSender<Read>, read: Read) -> Option<()> {
        let last = read.is_err();
        let taken = sender.send(read).is_ok();
        (taken && !last).then_some(())
    }
}

/// Where weights come from, in the order of the layout.
enum Supply<'a> {
    /// The reader's thread.
    Read(Receiver<Read>),
    /// Seeded numbers; `each` is the bytes of an element once it is kept.
    Made { rest: vec::IntoIter<(Slot, Dummy)>, each: usize, progress: &'a dyn Progress },
}

/// The next weight.
enum Next {
    Host(HostTensor),
    Parts(Coming),
    Dummy(Dummy),
}

/// How a backend takes parts.
type PartsOf<'a, B> =
    dyn WeightParts<Weight = <B as Backend>::Weight, Experts = <B as Backend>::Experts> + 'a;

/// Takes weights to the device.
struct Placer<'a, B: Backend> {
    supply: Supply<'a>,
    backend: &'a mut B,
    resident: Bytes,
}

impl<B: Backend> Placer<'_, B> {
    fn weights(&mut self, config: &ModelConfig) -> Result<Weights<B>, Error> {
        let embed = self.weight(Slot::Embed)?;
        let head = if config.tied_head { None } else { Some(self.weight(Slot::Head)?) };
        let final_norm = self.weight(Slot::FinalNorm)?;
        let layers = (0..config.layers.len()).map(|at| self.layer(config, at));
        let layers = layers.collect::<Result<Vec<_>, Error>>()?;
        Ok(Weights { embed, head, final_norm, layers })
    }

    fn layer(&mut self, config: &ModelConfig, at: usize) -> Result<LayerWeights<B>, Error> {
        let slot = |part| Slot::Layer(at, part);
        let norm = self.weight(slot(Part::Norm))?;
        let qkv = self.weight(slot(Part::Qkv))?;
        let o = self.weight(slot(Part::O))?;
        let mlp = match config.layers[at].mlp {
            Mlp::Dense => MlpWeights::Dense(self.gated(slot(Part::DenseGateUp), slot(Part::DenseDown))?),
            Mlp::Sparse => {
                let router = self.weight(slot(Part::Router))?;
                let gate_up = self.experts(slot(Part::ExpertsGateUp))?;
                let down = self.experts(slot(Part::ExpertsDown))?;
                let shared = if config.moe.is_some_and(|moe| moe.shared.is_some()) {
                    Some(self.gated(slot(Part::SharedGateUp), slot(Part::SharedDown))?)
                } else {
                    None
                };
                MlpWeights::Sparse { router, gate_up, down, shared }
            }
        };
        Ok(LayerWeights { norm, qkv, o, mlp })
    }

    fn gated(&mut self, gate_up: Slot, down: Slot) -> Result<GatedMlp<B>, Error> {
        Ok(GatedMlp { gate_up: self.weight(gate_up)?, down: self.weight(down)? })
    }

    fn weight(&mut self, slot: Slot) -> Result<B::Weight, Error> {
        let placed = match self.next(slot)? {
            Next::Host(host) => self.backend.weight(host),
            Next::Dummy(dummy) => self.backend.dummy_weight(&dummy),
            Next::Parts(coming) => self.write(slot, &coming)?.end_weight(),
        };
        placed.map_err(|source| Error::Place { weight: slot.to_string(), source })
    }

    fn experts(&mut self, slot: Slot) -> Result<B::Experts, Error> {
        let placed = match self.next(slot)? {
            Next::Host(host) => self.backend.experts(host),
            Next::Dummy(dummy) => self.backend.dummy_experts(&dummy),
            Next::Parts(coming) => self.write(slot, &coming)?.end_experts(),
        };
        placed.map_err(|source| Error::Place { weight: slot.to_string(), source })
    }

    /// Hands the parts of a weight over as they come.
    fn write(&mut self, slot: Slot, coming: &Coming) -> Result<&mut PartsOf<'_, B>, Error> {
        let place = |source| Error::Place { weight: slot.to_string(), source };
        let Supply::Read(receiver) = &self.supply else { unreachable!("only what is read comes in parts") };
        let parts = self.backend.weight_parts().expect("it said how it takes parts");
        parts.begin(&coming.shape).map_err(place)?;
        for _ in 0..coming.parts {
            match received(receiver)? {
                Message::Part(part) => parts.write(part).map_err(place)?,
                Message::Whole(..) | Message::Begin(..) => unreachable!("{slot} has more parts to come"),
            }
        }
        Ok(parts)
    }

    fn next(&mut self, wanted: Slot) -> Result<Next, Error> {
        let (slot, next, bytes) = match &mut self.supply {
            Supply::Read(receiver) => match received(receiver)? {
                Message::Whole(slot, host) => {
                    let bytes = host.bytes();
                    (slot, Next::Host(host), bytes)
                }
                Message::Begin(slot, coming) => {
                    let bytes = coming.bytes;
                    (slot, Next::Parts(coming), bytes)
                }
                Message::Part(_) => unreachable!("every part of the weight before was taken"),
            },
            Supply::Made { rest, each, progress } => {
                let (slot, dummy) = rest.next().expect("every weight of the layout is made");
                let bytes = Bytes((dummy.elements() * *each) as u64);
                progress.advance(bytes);
                (slot, Next::Dummy(dummy), bytes)
            }
        };
        assert_eq!(slot, wanted, "weights come in the order they are placed");
        self.resident += bytes;
        Ok(next)
    }
}

fn received(receiver: &Receiver<Read>) -> Read {
    receiver.recv().expect("the reader sends every weight or an error")
}
