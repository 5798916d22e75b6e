//! `cohort plan`: whether a group would fit and what it would serve, with no weights and no device.

mod placing;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use model::{ModelConfig, Placement};
use serde_json::{Value, json};
use settings::Settings;
use types::{Bytes, DType, KvGroup, TpSize};
use worker::{Capacity, CollectiveCosts, GroupShape, Memory};

use crate::args::{self, ComputeFlags, FileFlag, GroupFlags, ModelFlags, StartedBy};
use crate::embedded;
use crate::out::say;
use crate::table::{Align, Table};

const MORE: &str = "\
A --preset is computed in bf16 unless --dtype says otherwise. With --memory the KV cache takes what the weights leave,
unless --kv-tokens says how large it is. What a step's activations take comes on top: give --memory without it. Ends
with an error when the plan is not legal or does not fit.

Examples:
  cohort plan --preset north-mini-code --tensor-parallel 2 --memory 139GiB
  cohort plan --model /models/north --tensor-parallel 4 --context 131072 --json
  cohort plan --model /models/north --tensor-parallel 4 --experts expert \\
    --expert-load load.json --expert-replicas 2 --placement-out placement.json";

/// Flags of `cohort plan`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct Args {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub file: FileFlag,
    /// Memory of each rank for weights and KV cache, such as 139GiB
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<Bytes>,
    /// Tokens of the sequences that are counted as running at once [default: what model and KV cache hold]
    #[arg(long, value_name = "N")]
    pub context: Option<u32>,
    /// How often experts were chosen, as `cohort debug expert-load` prints it: proposes a placement for all ranks and shows
    /// how evenly their work is shared out. zipf:SEED is a made-up skewed load
    #[arg(long, value_name = "FILE")]
    pub expert_load: Option<String>,
    /// Copies of hot experts that each rank may hold beside its share, in the proposed placement
    #[arg(long, value_name = "N", default_value_t = 0, requires = "expert_load")]
    pub expert_replicas: usize,
    /// Write the proposed placement here, for --expert-placement
    #[arg(long, value_name = "FILE", requires = "expert_load")]
    pub placement_out: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// What is served; only its config.json is read.
    #[command(flatten)]
    pub model: ModelFlags,
    /// How it is computed.
    #[command(flatten)]
    pub compute: ComputeFlags,
    /// The group's size and bounds.
    #[command(flatten)]
    pub group: GroupFlags,
}

/// What was asked, made whole.
struct Question {
    name: String,
    model: ModelConfig,
    shape: GroupShape,
}

/// Works the plan out and prints it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let outcome = question(args).and_then(|mut question| {
        let proposal = placing::propose(args, &mut question.shape, &question.model)?;
        let capacity = Capacity::new(&question.model, &question.shape)?;
        Ok((question, capacity, proposal))
    });
    let (question, capacity, proposal) = match outcome {
        Ok(worked_out) => worked_out,
        Err(error) => {
            if args.json {
                say!("{}", json!({ "fits": false, "error": format!("{error:#}") }));
            }
            return Err(error);
        }
    };
    if args.json {
        let mut all = as_json(&question, &capacity);
        all["placement"] = proposal.as_ref().map_or(Value::Null, placing::Proposal::as_json);
        say!("{all}");
    } else {
        show(&question, &capacity);
        proposal.iter().for_each(placing::Proposal::show);
    }
    if let (Some(file), Some(proposal)) = (&args.placement_out, &proposal) {
        proposal.write(file)?;
    }
    if capacity.fits { Ok(()) } else { bail!(why_not(&question, &capacity)) }
}

fn question(args: &Args) -> anyhow::Result<Question> {
    let model = args.model.of_shape();
    let settings = args::load(StartedBy::User, &args.file, &[&model, &args.compute, &args.group])?;
    let (name, model) = (embedded::served_name(&settings), embedded::model_config(&settings)?);
    let shape = GroupShape {
        tensor: settings.group.tensor_parallel,
        data: settings.group.data_parallel,
        experts: settings.group.experts,
        placement: settings
            .group
            .expert_placement
            .as_deref()
            .map(Placement::from_file)
            .transpose()?
            .map(Arc::new),
        dispatch: settings.group.dispatch.resolve(settings.group.data_parallel),
        dtype: dtype(args, &settings),
        limits: settings.limits(),
        memory: match (args.memory, args.group.kv_tokens) {
            (None, _) => Memory::Unknown,
            (Some(memory), Some(_)) => Memory::Holds(memory),
            (Some(memory), None) => Memory::Filled(memory),
        },
        context_tokens: args.context,
    };
    Ok(Question { name, model, shape })
}

fn dtype(args: &Args, settings: &Settings) -> DType {
    match (settings.model.preset, &args.compute.dtype) {
        (Some(_), None) => DType::BF16,
        _ => settings.model.dtype,
    }
}

/// What is missing, in numbers.
fn why_not(question: &Question, capacity: &Capacity) -> String {
    let weights = capacity.ranks.iter().map(|rank| rank.weights.total()).max().unwrap_or_default();
    let kv = capacity.ranks.iter().map(|rank| rank.kv).max().unwrap_or_default();
    let works = match fitting_sizes(question).as_slice() {
        [] => String::new(),
        sizes => {
            let sizes = sizes.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            format!("; it would with --tensor-parallel {sizes}")
        }
    };
    let ranks = question.shape.tensor.get() * question.shape.data;
    match question.shape.memory.size() {
        Some(memory) if weights + kv > memory || capacity.kv_tokens == 0 => format!(
            "{} does not fit on {ranks} ranks: {weights} of weights and {kv} of KV cache in {memory} on each{works}",
            question.name
        ),
        _ => format!(
            "a KV cache of {} tokens does not hold a sequence of {} tokens, which takes {} on each rank{works}",
            capacity.kv_tokens, capacity.context_tokens, capacity.kv_sequence
        ),
    }
}

/// Larger groups in which it would fit.
fn fitting_sizes(question: &Question) -> Vec<u32> {
    let shape = &question.shape;
    let larger = [2, 4, 8, 16].into_iter().filter(|size| *size > shape.tensor.get());
    let fits = |size: &u32| {
        let size = TpSize::new(*size).ok();
        let shape = size.map(|tensor| GroupShape { tensor, placement: None, ..shape.clone() });
        shape.and_then(|shape| Capacity::new(&question.model, &shape).ok()).is_some_and(|found| found.fits)
    };
    larger.filter(fits).collect()
}

fn as_json(question: &Question, capacity: &Capacity) -> Value {
    let shape = &question.shape;
    let ranks: Vec<Value> = capacity
        .ranks
        .iter()
        .enumerate()
        .map(|(at, rank)| {
            let weights: serde_json::Map<_, _> = rank
                .weights
                .kinds()
                .into_iter()
                .map(|(kind, bytes)| (kind.to_owned(), json!(bytes.0)))
                .collect();
            json!({
                "rank": at,
                "weights_bytes": rank.weights.total().0,
                "weights": weights,
                "kv_bytes": rank.kv.0,
            })
        })
        .collect();
    let [full, sliding] = KvGroup::ALL.map(|group| {
        let costs = &capacity.kv[group.index()];
        json!({
            "bytes_per_token": costs.per_token.0,
            "bytes_per_block": costs.per_block.0,
            "blocks": costs.blocks,
        })
    });
    let costs = &capacity.collectives;
    json!({
        "model": question.name,
        "fits": capacity.fits,
        "tensor_parallel": shape.tensor.get(),
        "data_parallel": shape.data,
        "experts": shape.experts.name(),
        "dispatch": shape.dispatch.name(),
        "dtype": shape.dtype.name(),
        "weights_dtype": capacity.weights_dtype.name(),
        "memory_bytes": shape.memory.size().map(|bytes| bytes.0),
        "ranks": ranks,
        "kv": { "full": full, "sliding": sliding },
        "kv_tokens": capacity.kv_tokens_all,
        "kv_tokens_per_subgroup": capacity.kv_tokens,
        "context_tokens": capacity.context_tokens,
        "kv_bytes_per_sequence": capacity.kv_sequence.0,
        "concurrency": capacity.concurrency,
        "collectives": {
            "all_reduces": costs.all_reduces,
            "all_reduces_per_layer": costs.all_reduces_per_layer,
            "all_gathers": costs.all_gathers,
            "all_to_alls": costs.all_to_alls,
            "all_to_all_messages_per_layer": costs.all_to_all_messages_per_layer,
            "messages_per_decode_step": costs.decode_messages,
            "bytes_per_decode_token": costs.decode_token.0,
            "bytes_per_prompt_token": costs.prompt_token.0,
        },
    })
}

fn show(question: &Question, capacity: &Capacity) {
    let shape = &question.shape;
    let (ranks, experts) = (capacity.ranks.len(), shape.experts);
    let plural = if ranks == 1 { "" } else { "s" };
    let subgroups = match shape.data {
        1 => String::new(),
        data => format!(" in {data} sub-groups of {}", shape.tensor),
    };
    let placed = if shape.placement.is_some() { " as placed" } else { "" };
    say!(
        "{} on {ranks} rank{plural}{subgroups}, experts by {experts}{placed}, dispatch {}, computed in {}, weights in {}",
        question.name,
        shape.dispatch,
        shape.dtype,
        capacity.weights_dtype
    );
    say!("\nBytes of a rank");
    let most = capacity.ranks.iter().max_by_key(|rank| rank.weights.total() + rank.kv);
    if let Some(most) = most {
        let mut table = Table::new([Align::Left, Align::Right, Align::Right]);
        let mut row = |what: &str, Bytes(bytes): Bytes| {
            table.row([what.to_owned(), bytes.to_string(), Bytes(bytes).to_string()]);
        };
        most.weights.kinds().into_iter().filter(|(_, bytes)| bytes.0 > 0).for_each(|(kind, b)| row(kind, b));
        row("all weights", most.weights.total());
        row("KV cache", most.kv);
        table.lines().for_each(|line| say!("{line}"));
    }
    if let Some(memory) = shape.memory.size() {
        say!("  of {memory} given");
    }
    say!("\nKV cache of a rank");
    for group in KvGroup::ALL {
        let costs = &capacity.kv[group.index()];
        say!(
            "  {group} layers: {} a token, {} a block of {}, {} blocks",
            costs.per_token,
            costs.per_block,
            shape.limits.block_size.tokens(),
            costs.blocks
        );
    }
    let each = if shape.data == 1 { "" } else { " in each sub-group" };
    say!(
        "  {} tokens{each}; {} sequences of {} tokens at once, {} each",
        capacity.kv_tokens,
        capacity.concurrency,
        capacity.context_tokens,
        capacity.kv_sequence
    );
    show_collectives(&capacity.collectives);
}

fn show_collectives(costs: &CollectiveCosts) {
    say!(
        "\nCollectives of a step: {} all-reduces, {} all-gather, {} all-to-alls",
        costs.all_reduces,
        costs.all_gathers,
        costs.all_to_alls
    );
    let exchanged = match costs.all_to_all_messages_per_layer {
        0 => String::new(),
        messages => format!(", {messages} all-to-all messages in a sparse layer"),
    };
    say!("  {} all-reduce in a layer{exchanged}", costs.all_reduces_per_layer);
    let bound = if costs.all_to_alls > 0 { "at most " } else { "" };
    say!(
        "  a rank sends {} messages when it decodes, {bound}{} for a decoded token, {} for a prompt's token",
        costs.decode_messages,
        costs.decode_token,
        costs.prompt_token
    );
}
