//! Which backend a rank runs on, and the model over it.

use std::num::NonZero;
use std::thread::available_parallelism;
use std::time::Duration;

use collectives::{Collective, Tcp};
use model::{Activity, Forward, Model, ModelConfig, Pending, ShardPlan};
use ops::sample::{Ask, Choice};
use ops::{Backend, Batch, KvGroup};
use ops_cpu::{CpuBackend, HostCollective};
use ops_cuda::{Activations, CardLine, CudaBackend, DRAWN_ROWS_MAX, KernelCache, KernelShape, Options};
use types::{Bytes, DType, Dispatch, TpSize};

use crate::numerics::Numerics;
use crate::{Device, Error};

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// The CPU op set.
    Cpu,
    /// A card each.
    Cuda,
}

/// Decides, or says why CUDA cannot be used. `ranks` are those of the group; a machine with fewer cards shares them
/// only when CUDA was asked for.
///
/// # Errors
/// [`Error::Cuda`] when CUDA was asked for.
pub(crate) fn choose(device: Device, ranks: TpSize) -> Result<Chosen, Error> {
    match device {
        Device::Cpu => Ok(Chosen::Cpu),
        Device::Cuda => ops_cuda::probe().map(|_| Chosen::Cuda).map_err(Error::Cuda),
        Device::Auto => match ops_cuda::probe() {
            Ok(found) if found.cards.len() >= ranks.as_usize() => {
                tracing::info!(%found, "a GPU is there, and is used");
                Ok(Chosen::Cuda)
            }
            Ok(found) => {
                let (cards, ranks) = (found.cards.len(), ranks.get());
                tracing::info!(
                    %found,
                    "{cards} GPUs are fewer than {ranks} ranks: this group computes on the CPU; --device cuda shares \
                     them, and is right for a group over several hosts"
                );
                Ok(Chosen::Cpu)
            }
            Err(_) => Ok(Chosen::Cpu),
        },
    }
}

/// Memory this machine can still give out, or `None` where it does not say.
pub(crate) fn memory_available() -> Option<Bytes> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kibibytes << 10))
}

/// Threads of one rank: what was asked for, or an equal share of the cores the ranks of this machine have.
pub(crate) fn threads(asked: Option<usize>, ranks: TpSize) -> usize {
    let cores = available_parallelism().map_or(1, NonZero::get);
    asked.unwrap_or(cores / ranks.as_usize()).max(1)
}

/// The largest step a rank runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepBounds {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// Blocks of each KV pool, by [`KvGroup::index`].
    pub blocks: [u32; 2],
    /// Whether rows are sent to the ranks of their experts.
    pub all_to_all: bool,
}

impl StepBounds {
    /// Of what an engine plans.
    #[must_use]
    pub fn of(engine: &engine::Config, dispatch: Dispatch) -> Self {
        Self {
            all_to_all: dispatch == Dispatch::AllToAll,
            rows: engine.step_tokens_max.max(engine.running_max) as usize,
            sequences: engine.running_max as usize,
            blocks: engine.blocks,
        }
    }
}

/// The card of a rank that is number `place` of those on its machine.
pub(crate) fn card(place: usize) -> Result<usize, Error> {
    let found = ops_cuda::probe().map_err(Error::Cuda)?;
    Ok(place % found.cards.len())
}

/// How a card is used for one rank: memory for the largest step. The card is the first; [`Options::ordinal`] says which.
#[must_use]
pub fn cuda_options(dtype: DType, model: &ModelConfig, plan: &ShardPlan, step: &StepBounds) -> Options {
    let shared = plan.shared.as_ref().map_or(0, ExactSizeIterator::len);
    let dense = plan.dense.as_ref().map_or(0, ExactSizeIterator::len);
    // Two words for each sequence and group before its blocks; sequences may share blocks, which a factor covers.
    let blocks: usize = KvGroup::ALL.iter().map(|group| step.blocks[group.index()] as usize).sum();
    let activations = Activations {
        rows: step.rows,
        logit_rows: step.rows.min(DRAWN_ROWS_MAX),
        hidden: model.hidden_size,
        qkv: (plan.query_heads.len() + 2 * plan.kv_heads.len()) * model.head_dim,
        intermediate: dense.max(shared),
        experts: model.moe.as_ref().map_or(0, |moe| moe.experts),
        top_k: model.moe.as_ref().map_or(0, |moe| moe.routing.top_k),
        expert_intermediate: plan.experts.as_ref().map_or(0, |shard| shard.width.len()),
        vocab: plan.vocab_rows,
        ranks: plan.rank.size().as_usize(),
        exchanged_rows: if step.all_to_all { plan.subgroups() * step.rows } else { 0 },
        table_words: 2 * blocks + 4 * step.sequences,
    };
    let heads = KernelShape {
        dtype,
        head_dim: model.head_dim,
        query_heads: plan.query_heads.len(),
        kv_heads: plan.kv_heads.len(),
    };
    let (activations, cache) = (activations.bytes(), KernelCache::user());
    Options { ordinal: 0, dtype, activations, cache, heads: Some(heads) }
}

/// The model one rank runs.
pub(crate) struct RankModel {
    on: OnDevice,
    /// Looks at every layer, when asked to.
    numerics: Option<Numerics>,
}

/// Where it runs.
pub(crate) enum OnDevice {
    /// On the CPU, in a group of any size.
    Cpu(Box<Model<CpuBackend, HostCollective<Tcp>>>),
    /// On a card.
    Cuda(Box<Model<CudaBackend, CardLine>>),
}

impl RankModel {
    pub(crate) fn new(on: OnDevice, check_numerics: bool) -> Self {
        Self { on, numerics: check_numerics.then(Numerics::default) }
    }

    /// What is found when every layer is looked at.
    pub(crate) fn numerics(&self) -> Option<Numerics> {
        self.numerics.clone()
    }

    /// As [`Model::feeds`].
    pub(crate) fn feeds(&self) -> bool {
        match &self.on {
            OnDevice::Cpu(model) => model.feeds(),
            OnDevice::Cuda(model) => model.feeds(),
        }
    }

    /// As [`Model::begin`].
    pub(crate) fn begin(&mut self, batch: &Batch, rows: &[usize]) -> Result<QueuedForward, model::Error> {
        let numerics = self.numerics.as_ref();
        Ok(match &mut self.on {
            OnDevice::Cpu(model) => OnEither::Cpu(begin(model, (batch, rows), numerics)?),
            OnDevice::Cuda(model) => OnEither::Cuda(begin(model, (batch, rows), numerics)?),
        })
    }

    /// As [`Model::draw`].
    pub(crate) fn draw(
        &mut self,
        forward: QueuedForward,
        asks: &[Ask<'_>],
    ) -> Result<QueuedTokens, model::Error> {
        Ok(match (&mut self.on, forward) {
            (OnDevice::Cpu(model), OnEither::Cpu(forward)) => OnEither::Cpu(model.draw(forward, asks)?),
            (OnDevice::Cuda(model), OnEither::Cuda(forward)) => OnEither::Cuda(model.draw(forward, asks)?),
            _ => unreachable!("a rank stays on its device"),
        })
    }

    /// As [`Model::follow`].
    pub(crate) fn follow(&mut self, forward: QueuedForward) -> Result<QueuedTokens, model::Error> {
        Ok(match (&mut self.on, forward) {
            (OnDevice::Cpu(model), OnEither::Cpu(forward)) => OnEither::Cpu(model.follow(forward)?),
            (OnDevice::Cuda(model), OnEither::Cuda(forward)) => OnEither::Cuda(model.follow(forward)?),
            _ => unreachable!("a rank stays on its device"),
        })
    }

    /// As [`Model::is_drawn`].
    pub(crate) fn is_drawn(&mut self, pending: &QueuedTokens) -> Result<bool, model::Error> {
        match (&mut self.on, pending) {
            (OnDevice::Cpu(model), OnEither::Cpu(pending)) => model.is_drawn(pending),
            (OnDevice::Cuda(model), OnEither::Cuda(pending)) => model.is_drawn(pending),
            _ => unreachable!("a rank stays on its device"),
        }
    }

    /// As [`Model::collect`].
    pub(crate) fn collect(&mut self, pending: QueuedTokens) -> Result<Vec<Choice>, model::Error> {
        match (&mut self.on, pending) {
            (OnDevice::Cpu(model), OnEither::Cpu(pending)) => model.collect(pending),
            (OnDevice::Cuda(model), OnEither::Cuda(pending)) => model.collect(pending),
            _ => unreachable!("a rank stays on its device"),
        }
    }

    /// How long the device had nothing to do before the step that was collected last, where it says so.
    pub(crate) fn idle(&self) -> Option<Duration> {
        match &self.on {
            OnDevice::Cpu(_) => None,
            OnDevice::Cuda(model) => model.backend().idle(),
        }
    }

    /// As [`Model::gather_numbers`].
    pub(crate) fn gather_numbers(&mut self, own: &[f32], counts: &[usize]) -> Result<Vec<f32>, model::Error> {
        match &mut self.on {
            OnDevice::Cpu(model) => model.gather_numbers(own, counts),
            OnDevice::Cuda(model) => model.gather_numbers(own, counts),
        }
    }

    /// Whether every layer is looked at.
    pub(crate) const fn looks(&self) -> bool {
        self.numerics.is_some()
    }

    /// As [`Model::gather_activity`].
    pub(crate) fn gather_activity(&mut self) -> Result<Vec<Activity>, model::Error> {
        match &mut self.on {
            OnDevice::Cpu(model) => model.gather_activity(),
            OnDevice::Cuda(model) => model.gather_activity(),
        }
    }
}

/// What is queued on a rank's device.
pub(crate) enum OnEither<P, G> {
    Cpu(P),
    Cuda(G),
}

/// As [`Forward`].
pub(crate) type QueuedForward = OnEither<Forward<CpuBackend>, Forward<CudaBackend>>;

/// As [`Pending`].
pub(crate) type QueuedTokens = OnEither<Pending<CpuBackend>, Pending<CudaBackend>>;

fn begin<B: Backend, C: Collective<B::Tensor>>(
    model: &mut Model<B, C>,
    (batch, rows): (&Batch, &[usize]),
    numerics: Option<&Numerics>,
) -> Result<Forward<B>, model::Error> {
    let Some(numerics) = numerics else { return model.begin(batch, rows) };
    let mut found = false;
    model.begin_observed(batch, rows, |backend, at, x| {
        // What follows the first is a consequence.
        found = found || numerics.look(backend, at, x)?;
        Ok(())
    })
}
