//! Which backend a rank runs on, and the model over it.

use std::num::NonZero;
use std::thread::available_parallelism;

use collectives::Tcp;
use model::{Activity, Model, ModelConfig, ShardPlan};
use ops::{Batch, KvGroup};
use ops_cpu::{CpuBackend, HostCollective};
use ops_cuda::{Activations, CudaBackend, KernelCache, Options, SoloDevice};
use types::{Bytes, TpSize};

use crate::{Config, Device, Error};

/// Rows whose logits the model makes at once at most.
const LOGIT_ROWS: usize = 64;

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// The CPU op set.
    Cpu,
    /// The first card this process may use.
    Cuda,
}

/// Decides, or says why CUDA cannot be used.
///
/// # Errors
/// [`Error::Cuda`] when CUDA was asked for.
pub(crate) fn choose(device: Device, ranks: TpSize) -> Result<Chosen, Error> {
    match device {
        Device::Cpu => Ok(Chosen::Cpu),
        Device::Cuda if ranks != TpSize::ONE => {
            Err(Error::Cuda(ops_cuda::Error::NoNccl { ranks: ranks.get() }))
        }
        Device::Cuda => ops_cuda::probe().map(|_| Chosen::Cuda).map_err(Error::Cuda),
        Device::Auto => match ops_cuda::probe() {
            Ok(found) if ranks == TpSize::ONE => {
                tracing::info!(%found, "a GPU is there, and is used");
                Ok(Chosen::Cuda)
            }
            Ok(found) => {
                let why = ops_cuda::Error::NoNccl { ranks: ranks.get() };
                tracing::info!(%found, %why, "a GPU is there, and this group computes on the CPU");
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

/// How a card is used for this rank: memory for the largest step the engine plans.
pub(crate) fn cuda_options(
    config: &Config,
    model: &ModelConfig,
    plan: &ShardPlan,
    engine: &engine::Config,
) -> Options {
    let shared = plan.shared.as_ref().map_or(0, ExactSizeIterator::len);
    let dense = plan.dense.as_ref().map_or(0, ExactSizeIterator::len);
    // Two words for each sequence and group before its blocks; sequences may share blocks, which a factor covers.
    let blocks: usize = KvGroup::ALL.iter().map(|group| engine.blocks[group.index()] as usize).sum();
    let activations = Activations {
        rows: engine.step_tokens_max.max(engine.running_max) as usize,
        logit_rows: LOGIT_ROWS,
        hidden: model.hidden_size,
        qkv: (plan.query_heads.len() + 2 * plan.kv_heads.len()) * model.head_dim,
        intermediate: dense.max(shared),
        experts: model.moe.as_ref().map_or(0, |moe| moe.experts),
        top_k: model.moe.as_ref().map_or(0, |moe| moe.routing.top_k),
        expert_intermediate: plan.experts.as_ref().map_or(0, |shard| shard.width.len()),
        vocab: plan.vocab_rows,
        table_words: 2 * blocks + 4 * engine.running_max as usize,
    };
    Options { ordinal: 0, dtype: config.dtype, activations: activations.bytes(), cache: KernelCache::user() }
}

/// The model one rank runs.
pub(crate) enum RankModel {
    /// On the CPU, in a group of any size.
    Cpu(Box<Model<CpuBackend, HostCollective<Tcp>>>),
    /// On a card, alone.
    Cuda(Box<Model<CudaBackend, SoloDevice<Tcp>>>),
}

impl RankModel {
    /// As [`Model::step`].
    pub(crate) fn step(
        &mut self,
        batch: &Batch,
        sink: impl FnMut(usize, &[f32]) -> Result<(), model::Error>,
    ) -> Result<(), model::Error> {
        match self {
            Self::Cpu(model) => model.step(batch, sink),
            Self::Cuda(model) => model.step(batch, sink),
        }
    }

    /// As [`Model::gather_activity`].
    pub(crate) fn gather_activity(&mut self) -> Result<Vec<Activity>, model::Error> {
        match self {
            Self::Cpu(model) => model.gather_activity(),
            Self::Cuda(model) => model.gather_activity(),
        }
    }

    pub(crate) const fn config(&self) -> &ModelConfig {
        match self {
            Self::Cpu(model) => model.config(),
            Self::Cuda(model) => model.config(),
        }
    }
}
