//! What is measured: a model's backend on this machine, and the two ceilings it is measured against.

use std::hint::black_box;
use std::num::NonZero;
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use collectives::{Collective, InProcess, Solo};
use model::{KvBudget, Model, ModelConfig, Parts, ShardPlan, WeightBytes};
use ops::{Backend, Batch, BatchSequence, BlockTable, Dummy, DummyPiece};
use ops_cpu::{CpuBackend, HostCollective};
use ops_cuda::{CudaBackend, Patience, SoloDevice};
use serde_json::{Value, json};
use settings::Settings;
use types::{Bytes, DType, Dispatch, ExpertSharding, Position, TokenId, TpRank, TpSize};
use worker::{Device, LoadFormat, StepBounds};

use crate::args::{self, ComputeFlags, FileFlag, ModelFlags, StartedBy};
use crate::embedded;

/// Memory of a card that measuring its matrix products takes, whatever the model.
const SCRATCH: Bytes = Bytes(512 << 20);
/// Repetitions of what gives a ceiling; the best counts.
const ROUNDS: usize = 8;
/// Longest wait for another rank.
pub(super) const PATIENCE: Patience =
    Patience { boot: Duration::from_secs(60), step: Duration::from_secs(60) };
/// Bytes each thread copies at a time on the CPU: larger than caches.
const COPY_BYTES: usize = 64 << 20;

/// Whose steps are measured, and on what.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct TargetArgs {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub file: FileFlag,
    /// The model; computed in bf16 when it is a preset, unless --dtype says otherwise.
    #[command(flatten)]
    pub model: ModelFlags,
    /// How it is computed.
    #[command(flatten)]
    pub compute: ComputeFlags,
    /// CPU threads [default: the machine's cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
    /// Ranks that share the model, threads of this process with a card each (or a share of the CPU threads); times and
    /// floors are those of rank 0
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=128))]
    pub tensor_parallel: u32,
    /// How they share the routed experts: tensor (a part of each) or expert (some of them whole)
    #[arg(long, default_value = "tensor", value_parser = ["tensor", "expert"])]
    pub experts: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// The model to be measured, as one rank has it.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) name: String,
    pub(super) config: ModelConfig,
    pub(super) plan: ShardPlan,
    pub(super) dtype: DType,
    experts: ExpertSharding,
    device: Device,
    threads: usize,
    settings: Settings,
}

/// A device and what it reaches at best, measured in this run.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    /// What computes.
    pub(super) name: String,
    /// Bytes a second of a large copy, read and written.
    pub(super) copy: f64,
    /// Floating-point operations a second of a large matrix product.
    pub(super) matmul: f64,
}

/// A measurement that runs on any backend. Every rank of a group makes it, all of them in step.
pub(super) trait Measurement: Clone + Send {
    /// What it finds.
    type Found: Send;

    /// Runs it.
    fn run<B: Settled, C: Collective<B::Tensor>>(
        self,
        target: &Target,
        machine: Machine,
        parts: (B, C),
    ) -> anyhow::Result<Self::Found>;
}

/// A backend that can be waited for.
pub(super) trait Settled: Backend {
    /// Returns once everything that was queued is done.
    fn settle(&mut self) -> Result<(), ops::Error>;

    /// How long the device had nothing to do between the last two steps, where that is measured.
    fn idle(&self) -> Option<Duration>;
}

impl Settled for CpuBackend {
    fn settle(&mut self) -> Result<(), ops::Error> {
        Ok(())
    }

    fn idle(&self) -> Option<Duration> {
        None
    }
}

impl Settled for CudaBackend {
    fn settle(&mut self) -> Result<(), ops::Error> {
        self.synchronize()
    }

    fn idle(&self) -> Option<Duration> {
        Self::idle(self)
    }
}

impl Target {
    pub(super) fn new(args: &TargetArgs) -> anyhow::Result<Self> {
        let settings = args::load(StartedBy::User, &args.file, &[&args.model.of_shape(), &args.compute])?;
        let config = embedded::model_config(&settings)?;
        let preset_alone = settings.model.preset.is_some() && args.compute.dtype.is_none();
        let cores = available_parallelism().map_or(1, NonZero::get);
        let (ranks, experts) = (TpSize::new(args.tensor_parallel)?, args.experts.parse::<ExpertSharding>());
        let experts = experts.map_err(|error| anyhow!("--experts {}: {error}", args.experts))?;
        Ok(Self {
            name: embedded::served_name(&settings),
            plan: ShardPlan::sharded(&config, TpRank::new(0, ranks)?, experts)?,
            experts,
            config,
            dtype: if preset_alone { DType::BF16 } else { settings.model.dtype },
            device: settings.model.device,
            threads: args.threads.map_or(cores, |threads| threads as usize),
            settings,
        })
    }

    /// Takes the devices, measures their ceilings, and runs `measurement` on them; what rank 0 finds.
    pub(super) fn measure<M: Measurement>(
        &self,
        bounds: &StepBounds,
        measurement: M,
    ) -> anyhow::Result<M::Found> {
        let ranks = self.plan.rank.size();
        if ranks == TpSize::ONE {
            return self.measure_rank(bounds, measurement, None);
        }
        thread::scope(|scope| {
            let mut running = Vec::new();
            for (rank, line) in ranks.ranks().zip(InProcess::group(ranks, PATIENCE.step)) {
                let plan = ShardPlan::sharded(&self.config, rank, self.experts)?;
                let (target, measurement) = (Self { plan, ..self.clone() }, measurement.clone());
                running.push(scope.spawn(move || target.measure_rank(bounds, measurement, Some(line))));
            }
            let found: Vec<_> = running.into_iter().map(thread::ScopedJoinHandle::join).collect();
            let mut found =
                found.into_iter().map(|rank| rank.map_err(|_| anyhow!("a rank's thread ended"))?);
            let first = found.next().unwrap_or_else(|| unreachable!("a group has a rank"));
            // The others' errors say why the first one waited in vain.
            found.try_for_each(|rank| rank.map(drop))?;
            first
        })
    }

    /// One rank's part of [`Target::measure`]; `line` leads to the others.
    fn measure_rank<M: Measurement>(
        &self,
        bounds: &StepBounds,
        measurement: M,
        line: Option<InProcess>,
    ) -> anyhow::Result<M::Found> {
        let cuda = match self.device {
            Device::Cpu => false,
            Device::Cuda => true,
            Device::Auto => ops_cuda::probe().is_ok(),
        };
        let ranks = self.plan.rank.size().as_usize();
        let times = if ranks > 1 { format!("{ranks} × ") } else { String::new() };
        if cuda {
            let mut options = worker::cuda_options(self.dtype, &self.config, &self.plan, bounds);
            options.activations += SCRATCH;
            let cards = ops_cuda::probe().context("--device cuda")?.cards.len();
            options.ordinal = self.plan.rank.as_usize() % cards;
            let mut backend = CudaBackend::new(&options).context("--device cuda")?;
            let name = format!("{times}{}, {}", backend.card()?, self.dtype);
            let copy = backend.copy_bandwidth()?;
            let matmul = matmul_rate(&mut backend, (2048, 8192))?;
            let machine = Machine { name, copy, matmul };
            let Some(line) = line else {
                return measurement.run(self, machine, (backend, SoloDevice::new(Solo::new())?));
            };
            let comm =
                ops_cuda::connect(&backend, line, PATIENCE, ops_cuda::one_shot(self.plan.rank.size())?)?;
            return measurement.run(self, machine, (backend, comm));
        }
        let threads = (self.threads / ranks).max(1);
        let mut backend = CpuBackend::new(self.dtype, threads)?;
        let plural = if threads == 1 { "" } else { "s" };
        let name = format!("{times}cpu, {threads} thread{plural}, {}", self.dtype);
        let copy = host_copy_bandwidth(threads);
        let matmul = matmul_rate(&mut backend, (256, 1024))?;
        let machine = Machine { name, copy, matmul };
        match line {
            Some(line) => measurement.run(self, machine, (backend, HostCollective(line))),
            None => measurement.run(self, machine, (backend, HostCollective(Solo::new()))),
        }
    }

    /// The model with its weights and a KV cache full of seeded numbers.
    pub(super) fn model<B: Backend, C: Collective<B::Tensor>>(
        &self,
        (mut backend, comm): (B, C),
        budget: KvBudget,
    ) -> anyhow::Result<Model<B, C>> {
        let (config, plan) = (self.config.clone(), self.plan.clone());
        let weights = match self.settings.model.load_format {
            LoadFormat::Dummy => model::load_dummy(&config, &plan, &mut backend, &())?.0,
            LoadFormat::Checkpoint => {
                let checkpoint = model::Checkpoint::open(embedded::checkpoint(&self.settings))?;
                model::load(&checkpoint, &config, &plan, &mut backend, &())?.0
            }
        };
        let parts =
            Parts { config, plan, backend, comm, subgroup: None, weights, dispatch: Dispatch::Replicated };
        let mut model = Model::new(parts, budget)?;
        model.fill_kv(1)?;
        Ok(model)
    }

    /// Bytes of the resident weights, as the backend keeps them.
    pub(super) fn weight_bytes<B: Backend>(&self, backend: &B) -> WeightBytes {
        let stored = match self.settings.model.load_format {
            LoadFormat::Dummy => DType::BF16,
            LoadFormat::Checkpoint => self.config.stored_dtype.unwrap_or(DType::F32),
        };
        WeightBytes::new(&self.config, &self.plan, backend.weight_dtype(stored))
    }
}

impl Machine {
    pub(super) fn as_json(&self) -> Value {
        json!({
            "device": self.name,
            "copy_bytes_per_s": self.copy,
            "matmul_flop_per_s": self.matmul,
        })
    }

    /// One line about it.
    pub(super) fn line(&self) -> String {
        format!(
            "{}: copies {:.1} GB/s (read and written), matrix products {:.2} TFLOP/s",
            self.name,
            self.copy / 1e9,
            self.matmul / 1e12
        )
    }
}

/// A weight of its own, of a small variance.
pub(super) fn weight(shape: &[usize], tensor: u64) -> Dummy {
    let cols = shape.last().copied().unwrap_or(1);
    let rows = shape.iter().product::<usize>() / cols.max(1);
    let piece = DummyPiece { tensor, first: 0, stride: cols as u64, rows, cols };
    let (centre, scale) = if shape.len() == 1 { (1.0, 0.1) } else { (0.0, (3.0 / cols as f32).sqrt()) };
    Dummy { shape: shape.to_vec(), centre, scale, pieces: vec![piece] }
}

/// Rows of seeded numbers of about variance 1 in the compute dtype: rows of a table, normalised.
pub(super) fn rows<B: Backend>(backend: &mut B, rows: usize, width: usize) -> Result<B::Tensor, ops::Error> {
    let table = backend.dummy_weight(&weight(&[rows, width], 77))?;
    let ones = backend.dummy_weight(&weight(&[width], 78))?;
    backend.begin_step(&plain_batch(rows))?;
    let x = backend.embed(&table, TokenId(0))?;
    let x = backend.round(x)?;
    backend.norm(&x, &ones, ops::Norm::Rms { eps: 1e-6 })
}

/// Rows of one sequence that no attention reads.
fn plain_batch(rows: usize) -> Batch {
    let tokens = (0..rows).map(|row| TokenId(u32::try_from(row).unwrap_or(u32::MAX))).collect();
    let tables = [BlockTable::default(), BlockTable::default()];
    let sequences = vec![BatchSequence { rows: 0..rows, start: Position(0), tables }];
    Batch { tokens, sequences, ..Batch::default() }
}

/// Operations a second of [count, width] × [width, width], the best of a few rounds.
fn matmul_rate<B: Settled>(backend: &mut B, (count, width): (usize, usize)) -> Result<f64, ops::Error> {
    let w = backend.dummy_weight(&weight(&[width, width], 79))?;
    let x = rows(backend, count, width)?;
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        backend.settle()?;
        let started = Instant::now();
        let y = backend.linear(&x, &w)?;
        backend.settle()?;
        best = best.min(started.elapsed().as_secs_f64());
        drop(y);
    }
    Ok(2.0 * (count * width * width) as f64 / best)
}

/// Bytes a second that so many threads copy together, read and written.
fn host_copy_bandwidth(threads: usize) -> f64 {
    let copy = || {
        let (from, mut to) = (vec![1_u8; COPY_BYTES], vec![2_u8; COPY_BYTES]);
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            let started = Instant::now();
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
            best = best.min(started.elapsed().as_secs_f64());
        }
        2.0 * COPY_BYTES as f64 / best
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(copy)).collect();
        running.into_iter().map(|thread| thread.join().unwrap_or(0.0)).sum()
    })
}
