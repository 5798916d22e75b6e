//! `cohort kernels`: what the GPU kernels of a model become, with no GPU at hand.

use std::time::Instant;

use anyhow::bail;
use model::ShardPlan;
use ops_cuda::{KernelShape, ProgramReport};
use serde_json::{Value, json};
use types::{DType, ExpertSharding, TpRank, TpSize};

use crate::args::{self, FileFlag, ModelFlags, StartedBy};
use crate::embedded;
use crate::out::say;
use crate::table::{Align, Table};

const MORE: &str = "\
Needs NVIDIA's kernel compiler alone (libnvrtc: of the CUDA 13 runtime, or unpacked from the Python package
nvidia-cuda-nvrtc into a folder named by COHORT_CUDA_LIBRARIES). Ends with an error when a kernel does not compile, or
spills registers to memory.

Examples:
  cohort kernels check --arch sm_90a --preset north-mini-code
  cohort kernels check --arch sm_80 --arch sm_100a --model /models/north --json";

/// Flags of `cohort kernels`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub what: What,
}

/// What can be done with kernels.
#[derive(Debug, Clone, PartialEq, clap::Subcommand)]
pub enum What {
    /// Compile every kernel of a model and show its registers and memory
    Check(Box<CheckArgs>),
}

/// Flags of `cohort kernels check`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct CheckArgs {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub file: FileFlag,
    /// Card to compile for, such as sm_90a; may be given again
    #[arg(long = "arch", value_name = "ARCH", default_values = ["sm_80", "sm_90a", "sm_100a"])]
    pub arches: Vec<String>,
    /// Compute dtype; may be given again
    #[arg(long = "dtype", value_name = "DTYPE", value_parser = ["f32", "bf16"], default_values = ["bf16"])]
    pub dtypes: Vec<String>,
    /// Ranks that share the model
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub tensor_parallel: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Whose kernels; only its config.json is read.
    #[command(flatten)]
    pub model: ModelFlags,
}

/// Compiles and prints.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let What::Check(args) = &args.what;
    let settings = args::load(StartedBy::User, &args.file, &[&args.model.of_shape()])?;
    let (name, model) = (embedded::served_name(&settings), embedded::model_config(&settings)?);
    let rank = TpRank::new(0, TpSize::new(args.tensor_parallel)?)?;
    let plan = ShardPlan::sharded(&model, rank, ExpertSharding::Tensor)?;
    let mut sources = Vec::new();
    for dtype in &args.dtypes {
        let Ok(dtype) = dtype.parse::<DType>() else { bail!("--dtype {dtype}: use f32 or bf16") };
        let (query_heads, kv_heads) = (plan.query_heads.len(), plan.kv_heads.len());
        let shape = KernelShape { dtype, head_dim: model.head_dim, query_heads, kv_heads };
        sources.extend(ops_cuda::sources(&shape));
    }
    let started = Instant::now();
    let checked = args.arches.iter().map(|arch| ops_cuda::check(&sources, arch));
    let programs = checked.collect::<Result<Vec<_>, _>>()?.concat();
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        say!("{}", as_json(&name, &programs, seconds));
    } else {
        show(&name, &programs, seconds);
    }
    refuse_spills(&programs)
}

fn refuse_spills(programs: &[ProgramReport]) -> anyhow::Result<()> {
    let mut spilled = Vec::new();
    for program in programs {
        for kernel in program.kernels.iter().filter(|kernel| kernel.spills()) {
            spilled.push(format!("{} of {} for {}", kernel.name, program.file, program.arch));
        }
    }
    if spilled.is_empty() { Ok(()) } else { bail!("registers are spilled by {}", spilled.join(", ")) }
}

fn as_json(name: &str, programs: &[ProgramReport], seconds: f64) -> Value {
    let program = |program: &ProgramReport| {
        let kernels: Vec<Value> = program
            .kernels
            .iter()
            .map(|kernel| {
                json!({
                    "name": kernel.name,
                    "registers": kernel.registers,
                    "shared_bytes": kernel.shared_bytes,
                    "stack_bytes": kernel.stack_bytes,
                    "spill_bytes": kernel.spill_bytes,
                })
            })
            .collect();
        json!({
            "arch": program.arch,
            "file": program.file,
            "constants": program.defines,
            "compile_ms": program.elapsed.as_secs_f64() * 1e3,
            "cubin_bytes": program.cubin_bytes,
            "kernels": kernels,
        })
    };
    let programs: Vec<Value> = programs.iter().map(program).collect();
    json!({ "model": name, "seconds": seconds, "programs": programs })
}

fn show(name: &str, programs: &[ProgramReport], seconds: f64) {
    let [left, right] = [Align::Left, Align::Right];
    let mut table = Table::new([left, left, left, left, right, right, right, right]);
    let head = ["card", "file", "constants", "kernel", "registers", "shared B", "stack B", "spilled B"];
    table.row(head.map(str::to_owned));
    for program in programs {
        for kernel in &program.kernels {
            table.row([
                program.arch.clone(),
                program.file.to_owned(),
                program.defines.join(" "),
                kernel.name.clone(),
                kernel.registers.to_string(),
                kernel.shared_bytes.to_string(),
                kernel.stack_bytes.to_string(),
                kernel.spill_bytes.to_string(),
            ]);
        }
    }
    table.lines().for_each(|line| say!("{line}"));
    say!("{name}: {} files compiled in {seconds:.1} s", programs.len());
}
