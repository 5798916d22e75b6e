//! Every form of a checkpoint loads the same weights, and every rank exactly its part of them.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use model::{
    Block, Checkpoint, Error, Files, LoadSummary, ModelConfig, Progress, ShardPlan, WeightBytes, load,
};
use ops::HostTensor;
use safetensors::Dtype;
use serde_json::json;
use support::{
    Recorder, Rng, Tensors, config_json, directory, flat, fused, inside_vision, open, parse, random_tensors,
    rank, sharded_directory, weights_of, with,
};
use types::{Bytes, DType, TpRank, TpSize};

const SEED: u64 = 3;
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/assets/demo");
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden");

type Loaded = BTreeMap<String, HostTensor>;

fn load_rank(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    rank: TpRank,
    dtype: DType,
) -> (Loaded, LoadSummary) {
    let plan = ShardPlan::new(config, rank).unwrap();
    let (weights, summary) = load(checkpoint, config, &plan, &mut Recorder::new(dtype), &()).unwrap();
    (weights_of(&weights).into_iter().map(|(name, host)| (name, host.clone())).collect(), summary)
}

fn load_solo(checkpoint: &Checkpoint, config: &ModelConfig) -> Loaded {
    load_rank(checkpoint, config, TpRank::SOLO, DType::F32).0
}

/// Rows × columns of a named random tensor.
fn part(
    tensors: &Tensors,
    name: &str,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
) -> Vec<f32> {
    let (shape, values) = &tensors[name];
    let width = *shape.last().unwrap();
    rows.flat_map(|row| values[row * width..][cols.clone()].to_vec()).collect()
}

#[test]
fn merged_weights_hold_their_parts_in_order() {
    let config = parse(&config_json()).unwrap();
    let tensors = random_tensors(&config, SEED);
    let loaded = load_solo(&open(&directory(&tensors, Dtype::F32)).unwrap(), &config);
    let whole = |name: &str| tensors[&format!("model.{name}.weight")].1.clone();
    let below = |names: [&str; 2]| names.map(|name| whole(&format!("layers.{name}"))).concat();
    assert_eq!(flat(&loaded["embed"]), whole("embed_tokens"));
    assert_eq!(flat(&loaded["norm"]), whole("norm"));
    let qkv = ["q", "k", "v"].map(|name| whole(&format!("layers.2.self_attn.{name}_proj"))).concat();
    assert_eq!(flat(&loaded["2.qkv"]), qkv);
    assert_eq!(loaded["2.qkv"].shape(), [(4 + 2 + 2) * 6, 16]);
    assert_eq!(flat(&loaded["2.o"]), whole("layers.2.self_attn.o_proj"));
    assert_eq!(flat(&loaded["2.router"]), whole("layers.2.mlp.gate"));
    assert_eq!(flat(&loaded["0.dense.gate_up"]), below(["0.mlp.gate_proj", "0.mlp.up_proj"]));
    let shared = below(["1.mlp.shared_experts.gate_proj", "1.mlp.shared_experts.up_proj"]);
    assert_eq!(flat(&loaded["1.shared.gate_up"]), shared);
    let experts: Vec<f32> = (0..4)
        .flat_map(|e| ["gate", "up"].map(|m| whole(&format!("layers.1.mlp.experts.{e}.{m}_proj"))).concat())
        .collect();
    assert_eq!(flat(&loaded["1.experts.gate_up"]), experts);
    assert_eq!(loaded["1.experts.gate_up"].shape(), [4, 16, 16]);
    assert_eq!(loaded["1.experts.down"].shape(), [4, 16, 8]);
}

#[test]
fn a_rank_gets_its_rows_and_columns() {
    let config = parse(&config_json()).unwrap();
    let tensors = random_tensors(&config, SEED);
    let checkpoint = open(&directory(&tensors, Dtype::F32)).unwrap();
    let (loaded, _) = load_rank(&checkpoint, &config, rank(3, 4), DType::F32);
    let of = |name: &str, rows, cols| part(&tensors, &format!("model.layers.1.{name}.weight"), rows, cols);
    let qkv = [
        of("self_attn.q_proj", 18..24, 0..16),
        of("self_attn.k_proj", 6..12, 0..16),
        of("self_attn.v_proj", 6..12, 0..16),
    ];
    assert_eq!(flat(&loaded["1.qkv"]), qkv.concat());
    assert_eq!(flat(&loaded["1.o"]), of("self_attn.o_proj", 0..16, 18..24));
    let experts = (0..4).flat_map(|e| {
        let rows = ["gate", "up"].map(|m| of(&format!("mlp.experts.{e}.{m}_proj"), 6..8, 0..16));
        rows.concat()
    });
    assert_eq!(flat(&loaded["1.experts.gate_up"]), experts.collect::<Vec<_>>());
    let down = (0..4).flat_map(|e| of(&format!("mlp.experts.{e}.down_proj"), 0..16, 6..8));
    assert_eq!(flat(&loaded["1.experts.down"]), down.collect::<Vec<_>>());
    assert_eq!(flat(&loaded["1.shared.down"]), of("mlp.shared_experts.down_proj", 0..16, 6..8));
    let mut rows = part(&tensors, "model.embed_tokens.weight", 30..37, 0..16);
    rows.extend([0.0; 3 * 16]);
    assert_eq!(flat(&loaded["embed"]), rows, "seven entries, then three rows of padding");
}

#[test]
fn every_form_of_a_checkpoint_loads_the_same_weights() {
    let config = parse(&config_json()).unwrap();
    let tensors = random_tensors(&config, SEED);
    let mut dropped = tensors.clone();
    dropped.insert("lm_head.weight".into(), (vec![37, 16], vec![9.0; 37 * 16]));
    dropped.insert("model.layers.1.self_attn.rotary_emb.inv_freq".into(), (vec![3], vec![1.0; 3]));
    dropped.insert("model.layers.1.self_attn.o_proj.bias".into(), (vec![16], vec![0.0; 16]));
    dropped.insert("model.layers.1.input_layernorm.bias".into(), (vec![16], vec![-0.0; 16]));
    dropped.insert("model.layers.1.mlp.experts.3.up_proj.bias".into(), (vec![8], vec![0.0; 8]));
    let mut vision = inside_vision(&fused(&tensors, &config));
    vision.insert("model.vision_tower.encoder.weight".into(), (vec![5], vec![1.0; 5]));
    vision.insert("model.multi_modal_projector.linear_1.bias".into(), (vec![7], vec![1.0; 7]));
    let forms = [
        ("one tensor per expert", directory(&tensors, Dtype::F32)),
        ("fused experts", directory(&fused(&tensors, &config), Dtype::F32)),
        ("shards with an index", sharded_directory(&tensors)),
        ("fused experts in shards", sharded_directory(&fused(&tensors, &config))),
        ("inside a vision model", directory(&vision, Dtype::F32)),
        ("bf16 on disk", directory(&tensors, Dtype::BF16)),
        ("f16 on disk", directory(&fused(&tensors, &config), Dtype::F16)),
        ("with tensors that are dropped", directory(&dropped, Dtype::F32)),
    ];
    for (index, size) in [(0, 1), (1, 2), (2, 4)] {
        let first = open(&forms[0].1).unwrap();
        let (expected, _) = load_rank(&first, &config, rank(index, size), DType::F32);
        let (expected_bf16, _) = load_rank(&first, &config, rank(index, size), DType::BF16);
        for (name, form) in &forms {
            let checkpoint = open(form).unwrap();
            let (loaded, _) = load_rank(&checkpoint, &config, rank(index, size), DType::F32);
            assert_eq!(loaded, expected, "{name}, rank {index} of {size}, seed {SEED}");
            let (loaded, _) = load_rank(&checkpoint, &config, rank(index, size), DType::BF16);
            assert_eq!(loaded, expected_bf16, "{name}, bf16, rank {index} of {size}, seed {SEED}");
        }
    }
}

#[test]
fn vision_tensors_are_counted_and_not_read() {
    let config = parse(&config_json()).unwrap();
    let mut tensors = inside_vision(&random_tensors(&config, SEED));
    tensors.insert("model.vision_tower.a".into(), (vec![5], vec![1.0; 5]));
    tensors.insert("multi_modal_projector.b".into(), (vec![7], vec![1.0; 7]));
    let checkpoint = open(&directory(&tensors, Dtype::F32)).unwrap();
    let (_, summary) = load_rank(&checkpoint, &config, TpRank::SOLO, DType::F32);
    assert_eq!((summary.skipped_tensors, summary.skipped_bytes), (2, Bytes(12 * 4)));
    assert_eq!(summary.bytes_read, summary.resident);
}

#[test]
fn an_untied_head_is_loaded_beside_the_embedding() {
    let config = parse(&with(config_json(), &json!({ "tie_word_embeddings": false }))).unwrap();
    let tensors = random_tensors(&config, SEED);
    let checkpoint = open(&directory(&tensors, Dtype::F32)).unwrap();
    let loaded = load_solo(&checkpoint, &config);
    assert_eq!(flat(&loaded["head"]), tensors["lm_head.weight"].1);
    let (last, _) = load_rank(&checkpoint, &config, rank(1, 2), DType::F32);
    assert_eq!(last["head"].shape(), [19, 16]);
}

#[test]
fn a_rank_reads_only_its_own_bytes() {
    let config = parse(&config_json()).unwrap();
    let checkpoint = open(&directory(&random_tensors(&config, SEED), Dtype::BF16)).unwrap();
    let padding = 16 * 2 * 3; // three zero rows of four ranks' 40, on the last rank
    for index in 0..4 {
        let before = checkpoint.bytes_read();
        let (_, summary) = load_rank(&checkpoint, &config, rank(index, 4), DType::BF16);
        let read = checkpoint.bytes_read().0 - before.0;
        assert_eq!(Bytes(read), summary.bytes_read);
        let padded = if index == 3 { padding } else { 0 };
        assert_eq!(
            summary.bytes_read.0 + padded,
            summary.resident.0,
            "rank {index}: as stored, and nothing else"
        );
    }
}

#[test]
fn the_memory_sums_are_what_becomes_resident() {
    let variants = [
        json!({}),
        json!({ "tie_word_embeddings": false, "num_shared_experts": 2 }),
        json!({ "first_k_dense_replace": 0, "num_shared_experts": 0 }),
        json!({ "first_k_dense_replace": 4 }),
    ];
    for changes in variants {
        let config = parse(&with(config_json(), &changes)).unwrap();
        let checkpoint = open(&directory(&random_tensors(&config, SEED), Dtype::F32)).unwrap();
        for (rank, dtype) in [1, 2, 4].into_iter().flat_map(|size| {
            TpSize::new(size).unwrap().ranks().flat_map(|rank| [(rank, DType::F32), (rank, DType::BF16)])
        }) {
            let plan = ShardPlan::new(&config, rank).unwrap();
            let (loaded, summary) = load_rank(&checkpoint, &config, rank, dtype);
            let sums = WeightBytes::new(&config, &plan, dtype);
            assert_eq!(sums.total(), summary.resident, "{rank} {dtype} {changes}");
            let held: u64 = loaded.values().map(|host| host.bytes().0).sum();
            assert_eq!((held, loaded.len()), (summary.resident.0, summary.tensors), "{rank} {changes}");
        }
    }
}

#[derive(Default)]
struct Watch {
    total: AtomicU64,
    read: AtomicU64,
}

impl Progress for Watch {
    fn start(&self, total: Bytes) {
        self.total.store(total.0, Ordering::Relaxed);
    }

    fn advance(&self, bytes: Bytes) {
        self.read.fetch_add(bytes.0, Ordering::Relaxed);
    }
}

#[test]
fn progress_ends_at_the_total_it_started_with() {
    let config = parse(&config_json()).unwrap();
    let mut tensors = random_tensors(&config, SEED);
    tensors.insert("model.norm.bias".into(), (vec![16], vec![0.0; 16]));
    tensors.insert("model.layers.0.mlp.up_proj.bias".into(), (vec![12], vec![0.0; 12]));
    let checkpoint = open(&directory(&tensors, Dtype::F32)).unwrap();
    let mut all = 0;
    for index in 0..2 {
        let (watch, plan) = (Watch::default(), ShardPlan::new(&config, rank(index, 2)).unwrap());
        let (_, summary) = load(&checkpoint, &config, &plan, &mut Recorder::new(DType::F32), &watch).unwrap();
        assert_eq!(watch.total.into_inner(), summary.bytes_read.0);
        assert_eq!(watch.read.into_inner(), summary.bytes_read.0);
        all += summary.bytes_read.0;
    }
    assert_eq!(all, checkpoint.bytes_read().0);
}

/// Counts what is read; shared with the backend that is handed it.
struct Read(Arc<AtomicU64>);

impl Progress for Read {
    fn start(&self, _: Bytes) {}

    fn advance(&self, bytes: Bytes) {
        self.0.fetch_add(bytes.0, Ordering::Relaxed);
    }
}

#[test]
fn no_more_than_one_weight_is_read_ahead() {
    let config = parse(&config_json()).unwrap();
    let checkpoint = open(&directory(&random_tensors(&config, SEED), Dtype::F32)).unwrap();
    let plan = ShardPlan::new(&config, TpRank::SOLO).unwrap();
    let read = Arc::new(AtomicU64::new(0));
    let mut backend = Recorder::watching(DType::F32, read.clone());
    let (weights, _) = load(&checkpoint, &config, &plan, &mut backend, &Read(read)).unwrap();
    let largest = weights_of(&weights).iter().map(|(_, host)| host.bytes().0).max().unwrap();
    assert!(backend.ahead_max <= largest, "{} bytes ahead, largest {largest}", backend.ahead_max);
}

#[test]
fn a_backend_that_is_full_is_an_error_naming_the_weight() {
    let config = parse(&config_json()).unwrap();
    let checkpoint = open(&directory(&random_tensors(&config, SEED), Dtype::F32)).unwrap();
    let plan = ShardPlan::new(&config, TpRank::SOLO).unwrap();
    let mut backend = Recorder::with_room(DType::F32, 10_000);
    let Err(error) = load(&checkpoint, &config, &plan, &mut backend, &()) else { panic!("it fits") };
    assert!(matches!(error, Error::Place { .. }));
    assert!(error.to_string().starts_with("loading layer 1 qkv: "), "{error}");
}

#[test]
fn any_block_of_a_tensor_can_be_read() {
    let mut rng = Rng(SEED);
    let values: Vec<f32> = (0..5 * 6 * 7).map(|_| rng.weight()).collect();
    let tensors = Tensors::from([("stack".to_owned(), (vec![5, 6, 7], values.clone()))]);
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let directory = directory(&tensors, dtype);
        let checkpoint = open(&directory).unwrap();
        for _ in 0..200 {
            let range = |rng: &mut Rng, end: usize| {
                let start = rng.below(end + 1);
                start..start + rng.below(end - start + 1)
            };
            let block = Block { matrix: rng.below(5), rows: range(&mut rng, 6), cols: range(&mut rng, 7) };
            let mut out = vec![0.0_f32; block.elements()];
            checkpoint.read("stack", &block, &mut out).unwrap();
            let wanted = block.rows.clone().flat_map(|row| {
                let first = (block.matrix * 6 + row) * 7;
                values[first + block.cols.start..first + block.cols.end].to_vec()
            });
            assert_eq!(out, wanted.collect::<Vec<_>>(), "seed {SEED}, {block:?} of {dtype}");
        }
    }
}

#[test]
fn the_golden_and_demo_checkpoints_load() {
    let golden = ["north", "command-a-plus", "softmax-sum", "sigmoid-raw"];
    let places = golden.map(|case| format!("{GOLDEN}/{case}"));
    for place in places.iter().map(String::as_str).chain([DEMO]) {
        let files = Files::Directory(place.into());
        let config = ModelConfig::from_files(&files).unwrap();
        let checkpoint = Checkpoint::open(files).unwrap();
        let (_, solo) = load_rank(&checkpoint, &config, TpRank::SOLO, DType::BF16);
        let (_, half) = load_rank(&checkpoint, &config, rank(1, 2), DType::BF16);
        assert!(half.resident.0 * 100 <= solo.resident.0 * 60, "{place}: {half:?} of {solo:?}");
    }
}

#[test]
fn a_checkpoint_may_be_part_of_the_program() {
    let config = parse(&config_json()).unwrap();
    let tensors = random_tensors(&config, SEED);
    let weights: &'static [u8] = support::serialized(&tensors, Dtype::BF16).leak();
    let json: &'static [u8] = config_json().to_string().into_bytes().leak();
    let files: &'static [(&str, &[u8])] = vec![("config.json", json), ("model.safetensors", weights)].leak();
    let files = Files::Embedded(files);
    assert_eq!(ModelConfig::from_files(&files).unwrap(), config);
    assert!(files.read("tokenizer.json").unwrap().is_none());
    let embedded = load_solo(&Checkpoint::open(files).unwrap(), &config);
    assert_eq!(embedded, load_solo(&open(&directory(&tensors, Dtype::F32)).unwrap(), &config));
}
