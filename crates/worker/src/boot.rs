//! From a configuration to a rank that can run steps: read the configuration, meet the other ranks, load the
//! weights, reserve the KV cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use collectives::{
    AbortHandle, Collective, GroupSecret, Joined, Member, PlanChannel, Rendezvous, RendezvousOptions, Tcp,
    TcpOptions,
};
use model::{Checkpoint, KvBudget, Model, ModelConfig, Parts, Placement, ShardPlan, Sharing};
use ops::Backend;
use ops_cpu::{CpuBackend, HostCollective};
use ops_cuda::{CudaBackend, Patience};
use types::{Bytes, DType};

use crate::activity::Plan;
use crate::device::{self, Chosen, OnDevice, RankModel, StepBounds};
use crate::executor::VOCABULARY_MAX;
use crate::{Config, Error, LoadFormat, Part, Phase, RankMemory, Report, Reporter, capacity};

/// How long a rank looks for the others' data before it sleeps: about a loopback round trip.
const SPIN: std::time::Duration = std::time::Duration::from_micros(20);
/// Logit rows a step may ask for: prompt log-probabilities of a chunk; made a few at a time, so this costs no memory.
const LOGIT_ROWS_MAX: u32 = 1 << 14;

/// What is known before the ranks meet.
pub(crate) struct Facts {
    pub(crate) device: Chosen,
    pub(crate) weights: WeightSource,
    pub(crate) model: ModelConfig,
    pub(crate) plan: ShardPlan,
    pub(crate) engine: engine::Config,
    /// Of what is computed: equal in all groups of a cluster, or routers will not use them.
    pub(crate) config_hash: [u8; 32],
    /// Equal on all ranks of this group, or they will not join.
    pub(crate) group_hash: [u8; 32],
}

/// Where the weights come from.
pub(crate) enum WeightSource {
    Checkpoint(Checkpoint),
    /// Seeded numbers.
    Dummy,
}

/// A rank that can run steps.
pub(crate) struct Booted {
    pub(crate) model: RankModel,
    pub(crate) plans: PlanChannel,
    pub(crate) abort: AbortHandle,
}

/// Reads the checkpoint's configuration and decides everything that follows from it.
pub(crate) fn facts(config: &Config) -> Result<Facts, Error> {
    let device = device::choose(config.device, config.rank.size())?;
    let weights = match config.load_format {
        LoadFormat::Checkpoint => WeightSource::Checkpoint(Checkpoint::open(config.model.clone())?),
        LoadFormat::Dummy => WeightSource::Dummy,
    };
    let mut model = ModelConfig::from_files(&config.model)?;
    if let Some(window_keys) = config.window_keys {
        model.window_keys = window_keys;
    }
    if let Some(layers) = config.layers {
        model.cut(layers as usize)?;
    }
    let plan = plan(config, &model)?;
    let engine = engine_config(config, &model)?;
    let placed = plan.placement.as_ref().map(|placement| placement.to_json()).unwrap_or_default();
    let config_hash = match &weights {
        WeightSource::Checkpoint(checkpoint) => {
            let changed = format!("window_keys={}", model.window_keys);
            model::config_hash(checkpoint, config.dtype, changed.as_bytes())?
        }
        WeightSource::Dummy => model::dummy_hash(&model, config.dtype),
    };
    let extra = format!("{} {engine:?} {placed}", config.model_name);
    let group_hash = model::group_hash(config_hash, config.rank.size(), extra.as_bytes());
    Ok(Facts { device, weights, model, plan, engine, config_hash, group_hash })
}

/// What this rank holds.
fn plan(config: &Config, model: &ModelConfig) -> Result<ShardPlan, Error> {
    let data = data_parallel(config);
    if data > 1 && model.vocab_size as u64 > u64::from(VOCABULARY_MAX) {
        let needed = format!("1 for a vocabulary of more than {VOCABULARY_MAX} tokens");
        return Err(Error::Budget { field: "data_parallel", got: data.to_string(), needed });
    }
    let placement = config.expert_placement.as_deref().map(Placement::from_file).transpose()?.map(Arc::new);
    let sharing = Sharing { tensor: config.tensor, experts: config.experts, placement };
    Ok(ShardPlan::shared(model, config.rank, &sharing)?)
}

/// Sub-groups of the group.
const fn data_parallel(config: &Config) -> u32 {
    config.rank.size().get() / config.tensor.get()
}

/// The engine's budgets for this model.
fn engine_config(config: &Config, model: &ModelConfig) -> Result<engine::Config, Error> {
    let limits = &config.limits;
    // A sequence cannot outgrow the cache, so that is what callers are told the context is.
    let kv_tokens = limits.block_size.blocks_for(limits.kv_tokens).saturating_mul(limits.block_size.tokens());
    let engine = engine::Config {
        block_size: limits.block_size,
        blocks: capacity::pools(model, limits),
        window_keys: model.window_keys,
        context_tokens_max: model.context_tokens_max.min(kv_tokens),
        vocab_size: u32::try_from(model.vocab_size).unwrap_or(u32::MAX),
        eos_token_ids: model.eos_token_ids.clone(),
        step_tokens_max: limits.step_tokens_max,
        logit_rows_max: LOGIT_ROWS_MAX.max(limits.running_max),
        running_max: limits.running_max,
        data_parallel: data_parallel(config),
        waiting_requests_max: limits.waiting_requests_max,
        waiting_tokens_max: limits.waiting_tokens_max.max(model.context_tokens_max),
    };
    engine.check().map_err(|source| Error::Engine { rank: config.rank, source })?;
    Ok(engine)
}

/// The parallel plan, equal on all ranks.
pub(crate) fn parallel(config: &Config) -> Plan {
    let (tensor, experts, dispatch) = (config.tensor, config.experts, config.dispatch);
    let data = data_parallel(config);
    let placed = if config.expert_placement.is_some() { " placed" } else { "" };
    let name = format!("tensor={tensor} data={data} experts={experts} dispatch={dispatch}{placed}");
    Plan { name, tensor }
}

/// Brings the ranks together.
pub(crate) fn meet(config: &Config, facts: &Facts, reporter: &dyn Reporter) -> Result<Joined, Error> {
    let rank = config.rank;
    let plan = parallel(config).name;
    let member = Member { rank, plan, config_hash: facts.group_hash };
    let tcp = TcpOptions { deadline: config.step_timeout, spin: SPIN };
    // As it is now: ranks that have met stay together when it changes.
    let secret = config.access.secret.as_ref();
    let secret = secret.map(|secret| GroupSecret::new(secret.now().expose().as_bytes()));
    let options = RendezvousOptions { within: config.boot_timeout, tcp, secret };
    let joined = if rank.is_leader() {
        Rendezvous::bind(config.rendezvous).and_then(|rendezvous| {
            reporter.report(Report::Rendezvous(rendezvous.local_addr()));
            rendezvous.lead(&member, &options)
        })
    } else {
        let leader = config.leader.clone().unwrap_or_else(|| config.rendezvous.to_string());
        collectives::join(&leader, &member, &options)
    };
    joined.map_err(|source| Error::Group { rank, source })
}

/// Loads the rank's weights and puts its model together.
pub(crate) fn load(
    config: &Config,
    facts: Facts,
    joined: Joined,
    reporter: &Arc<dyn Reporter>,
) -> Result<Booted, Error> {
    let rank = config.rank;
    let Joined { mut collective, plan: plans } = joined;
    let abort = collective.abort_handle();
    let on = match facts.device {
        Chosen::Cpu => {
            let threads = device::threads(config.threads, rank.size());
            let backend =
                CpuBackend::new(config.dtype, threads).map_err(|source| Error::Device { rank, source })?;
            let plural = if threads == 1 { "" } else { "s" };
            let name = format!("cpu, {threads} thread{plural}, {}", config.dtype);
            let line = Line { collective, wrap: |_: &CpuBackend, tcp| Ok(HostCollective(tcp)) };
            let available = device::memory_available().map(|bytes| (bytes, RankMemory::Shared));
            let ready = Ready { backend, name, available };
            OnDevice::Cpu(Box::new(assemble(config, facts, ready, line, reporter)?))
        }
        Chosen::Cuda => {
            let bounds = StepBounds::of(&facts.engine, config.dispatch);
            let mut options = device::cuda_options(config.dtype, &facts.model, &facts.plan, &bounds);
            options.ordinal =
                device::card(ops_cuda::place_on_machine(&mut collective).map_err(Error::Cuda)?)?;
            let backend = CudaBackend::new(&options).map_err(Error::Cuda)?;
            let name = format!("cuda, {}, {}", backend.card().map_err(Error::Cuda)?, config.dtype);
            let patience = Patience { boot: config.boot_timeout, step: config.step_timeout };
            let one_shot = ops_cuda::one_shot(config.tensor).map_err(Error::Cuda)?;
            let wrap = |backend: &CudaBackend, tcp| {
                ops_cuda::connect(backend, tcp, patience, one_shot).map_err(Error::Cuda)
            };
            let line = Line { collective, wrap };
            // What the line to the other cards will take is not there for weights and keys: one for all ranks, and one for a
            // sub-group's.
            let lines = [rank.size().as_usize(), config.tensor.as_usize()];
            let lines = &lines[..if rank.size() == config.tensor { 1 } else { 2 }];
            let taken: u64 = lines.iter().map(|&ranks| ops_cuda::line_bytes(ranks, one_shot).0).sum();
            let free = backend.memory_free().map_err(Error::Cuda)?;
            let free = Bytes(free.0.saturating_sub(taken));
            let available = Some((free, RankMemory::OfEachRank));
            let ready = Ready { backend, name, available };
            OnDevice::Cuda(Box::new(assemble(config, facts, ready, line, reporter)?))
        }
    };
    Ok(Booted { model: RankModel::new(on, config.check_numerics), plans, abort })
}

/// The connection to the other ranks, and how a backend's tensors go through it.
struct Line<F> {
    collective: Tcp,
    wrap: F,
}

/// A backend before it holds anything.
struct Ready<B> {
    backend: B,
    /// What reports call it.
    name: String,
    /// Its free memory, when it is known.
    available: Option<(Bytes, RankMemory)>,
}

/// Weights, cache and line of a rank.
fn assemble<B, C, F>(
    config: &Config,
    facts: Facts,
    ready: Ready<B>,
    line: Line<F>,
    reporter: &Arc<dyn Reporter>,
) -> Result<Model<B, C>, Error>
where
    B: Backend,
    C: Collective<B::Tensor>,
    F: Fn(&B, Tcp) -> Result<C, Error>,
{
    let rank = config.rank;
    let started = Instant::now();
    let progress =
        LoadProgress { reporter: Arc::clone(reporter), done: AtomicU64::new(0), total: AtomicU64::new(0) };
    let Facts { weights: source, model: model_config, plan, engine, .. } = facts;
    let Ready { mut backend, name, available } = ready;
    let stored = match &source {
        WeightSource::Checkpoint(_) => model_config.stored_dtype.unwrap_or(DType::F32),
        WeightSource::Dummy => DType::BF16,
    };
    if let Some((available, memory)) = available {
        let part = Part {
            model: &model_config,
            plan: &plan,
            experts: config.experts,
            weights: backend.weight_dtype(stored),
            dtype: config.dtype,
            limits: &config.limits,
        };
        part.check(available, memory)?;
        let (bytes, pieces) = part.resident();
        backend.reside(bytes, pieces).map_err(|source| Error::Device { rank, source })?;
    }
    let (weights, summary) = match &source {
        WeightSource::Checkpoint(checkpoint) => {
            model::load(checkpoint, &model_config, &plan, &mut backend, &progress)?
        }
        WeightSource::Dummy => model::load_dummy(&model_config, &plan, &mut backend, &progress)?,
    };
    reporter.report(Report::Loaded {
        resident: summary.resident,
        read: summary.bytes_read,
        tensors: summary.tensors,
        skipped_tensors: summary.skipped_tensors,
        skipped_bytes: summary.skipped_bytes,
        elapsed: started.elapsed(),
        device: name,
    });
    let Line { mut collective, wrap } = line;
    // Ranks read at their own pace: the others are waited for here, so that a slow disk is not taken for a hang.
    collective.barrier_within(config.boot_timeout).map_err(|source| Error::Group { rank, source })?;
    let split = plan.subgroups() > 1;
    let subgroup = split.then(|| collective.split(config.tensor)).transpose();
    let subgroup = subgroup.map_err(|source| Error::Group { rank, source })?;
    let subgroup = subgroup.map(|own| wrap(&backend, own)).transpose()?;
    let comm = wrap(&backend, collective)?;
    let parts =
        Parts { config: model_config, plan, backend, comm, subgroup, weights, dispatch: config.dispatch };
    Ok(Model::new(parts, KvBudget { block_size: engine.block_size, blocks: engine.blocks })?)
}

/// Passes the loader's progress on, a whole percent at a time.
struct LoadProgress {
    reporter: Arc<dyn Reporter>,
    done: AtomicU64,
    total: AtomicU64,
}

impl LoadProgress {
    fn report(&self, done: u64, total: u64) {
        self.reporter.report(Report::Phase { phase: Phase::Loading, done: Bytes(done), total: Bytes(total) });
    }
}

impl model::Progress for LoadProgress {
    fn start(&self, total: Bytes) {
        self.total.store(total.0, Ordering::Relaxed);
        self.report(0, total.0);
    }

    fn advance(&self, bytes: Bytes) {
        let total = self.total.load(Ordering::Relaxed).max(1);
        let before = self.done.fetch_add(bytes.0, Ordering::Relaxed);
        let after = before + bytes.0;
        if before * 100 / total != after * 100 / total {
            self.report(after, total);
        }
    }
}
