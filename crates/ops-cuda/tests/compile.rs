//! Every kernel compiles for the cards that are meant, at the shapes of the published models and of the tests, without
//! a card: NVRTC alone is needed. A kernel that spills registers fails.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use model::{Files, ModelConfig, Preset, ShardPlan};
use ops_cuda::{Compiled, Error, KernelCache, KernelShape, Source, check, compile, sources};
use types::{DType, ExpertSharding, TpSize};

const ARCHES: [&str; 3] = ["sm_80", "sm_90a", "sm_100a"];

/// The published models, the golden checkpoints, the demo model.
fn models() -> Vec<ModelConfig> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let golden = fs::read_dir(root.join("tests/golden")).unwrap().map(|entry| entry.unwrap().path());
    let directories = golden.chain([root.join("crates/cli/assets/demo")]);
    let with_config = directories.filter(|directory| directory.join("config.json").exists());
    let mut models: Vec<ModelConfig> =
        with_config.map(|directory| ModelConfig::from_files(&Files::Directory(directory)).unwrap()).collect();
    assert!(models.len() >= 5, "{} checkpoints", models.len());
    models.extend(Preset::ALL.map(|preset| preset.config().unwrap()));
    models
}

/// Heads of other checkpoints of the same kind: dimension, query heads, key heads.
const OTHER_HEADS: [(usize, usize, usize); 3] = [(64, 8, 8), (64, 32, 8), (64, 16, 2)];

/// What all their ranks compile, alone and in groups up to a host's eight.
fn all_sources() -> Vec<Source> {
    let mut all: Vec<Source> = Vec::new();
    let mut seen = BTreeSet::new();
    let mut add = |shape: KernelShape| {
        let new = sources(&shape).into_iter();
        all.extend(new.filter(|s| seen.insert((s.file(), s.defines().to_vec()))));
    };
    for (head_dim, query_heads, kv_heads) in OTHER_HEADS {
        for dtype in [DType::F32, DType::BF16] {
            add(KernelShape { dtype, head_dim, query_heads, kv_heads });
        }
    }
    for config in models() {
        for size in ShardPlan::sizes(&config, ExpertSharding::Tensor).into_iter().filter(|size| *size <= 8) {
            let rank = TpSize::new(size).unwrap().ranks().next().unwrap();
            let plan = ShardPlan::new(&config, rank).unwrap();
            let (query_heads, kv_heads) = (plan.query_heads.len(), plan.kv_heads.len());
            for dtype in [DType::F32, DType::BF16] {
                add(KernelShape { dtype, head_dim: config.head_dim, query_heads, kv_heads });
            }
        }
    }
    all
}

/// Whether there is no compiler, said on stdout.
fn skipped() -> bool {
    match compile(&Source::rows(DType::F32), "sm_90a") {
        Err(error @ Error::LibraryMissing { .. }) => {
            println!("skipped: {error}");
            true
        }
        _ => false,
    }
}

#[test]
fn every_kernel_compiles_for_every_card_without_spilling() {
    if skipped() {
        return;
    }
    let sources = all_sources();
    let mut spilled = Vec::new();
    for arch in ARCHES {
        for program in check(&sources, arch).unwrap() {
            let place = format!("{arch} {} {}", program.file, program.defines.join(" "));
            assert!(!program.kernels.is_empty(), "{place}: no kernels");
            for kernel in program.kernels {
                assert!(kernel.registers > 0, "{place} {}: no report of registers", kernel.name);
                println!(
                    "{place:<44} {:<20} {:>3} registers {:>6} B shared {:>3} B stack {:>3} B spilled",
                    kernel.name,
                    kernel.registers,
                    kernel.shared_bytes,
                    kernel.stack_bytes,
                    kernel.spill_bytes
                );
                if kernel.spills() {
                    spilled.push(format!("{place} {kernel:?}"));
                }
            }
        }
    }
    assert!(spilled.is_empty(), "{spilled:#?}");
}

#[test]
fn a_kernel_that_does_not_compile_is_named_with_the_compilers_words() {
    if skipped() {
        return;
    }
    // No array has the length 0.
    let broken = Source::attention(DType::BF16, 0, 1);
    let said = compile(&broken, "sm_90a").unwrap_err().to_string();
    assert!(said.contains("attention.cu") && said.contains("D=0") && said.contains("error"), "{said}");
}

#[test]
fn a_target_that_no_card_has_is_refused_before_anything_is_compiled() {
    assert!(matches!(check(&[], "sm_35"), Err(Error::Arch { .. })));
}

#[test]
fn a_damaged_cache_entry_is_compiled_again() {
    if skipped() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cache = KernelCache(Some(directory.path().to_owned()));
    let source = Source::rows(DType::F32);
    let first = cache.get(&source, "sm_90a").unwrap();
    let again = cache.get(&source, "sm_90a").unwrap();
    assert!(!first.log.is_empty() && again.log.is_empty(), "the second is read, not compiled");
    assert_eq!(first.cubin, again.cubin);
    let files: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "one file, nothing left aside: {files:?}");
    let mut content = fs::read(&files[0]).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 1;
    fs::write(&files[0], content).unwrap();
    let Compiled { log, cubin } = cache.get(&source, "sm_90a").unwrap();
    assert!(!log.is_empty(), "a damaged entry is not used");
    assert_eq!(cache.get(&source, "sm_90a").unwrap().cubin, cubin);
}

/// Names in double quotes right behind one of `calls`.
fn asked_for(text: &str, calls: &[&str]) -> Vec<String> {
    let names = calls.iter().flat_map(|call| {
        text.match_indices(call).filter_map(|(at, _)| text[at + call.len()..].split_once('"'))
    });
    names.map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn every_kernel_that_is_asked_for_by_name_exists() {
    let read = |folder: &str, endings: &[&str]| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let wanted = files.filter(|file| {
            file.extension().is_some_and(|found| endings.iter().any(|ending| found == *ending))
        });
        wanted.map(|file| fs::read_to_string(file).unwrap()).collect::<Vec<_>>().join("\n")
    };
    let kernels = read("kernels", &["cu", "cuh"]);
    let launched = |name: &str| {
        let lines = kernels.lines().filter(|line| line.starts_with("extern \"C\" __global__ void"));
        lines.filter(|line| line.contains(&format!(" {name}("))).count()
    };
    // `load` is how the products in tiles are asked for.
    let names = asked_for(&read("src", &["rs"]), &["function(\"", "[load(\"", ", load(\"", "(load(\""]);
    assert!(names.len() > 40, "{} kernels are asked for", names.len());
    let missing: Vec<&String> = names.iter().filter(|name| launched(name) == 0).collect();
    assert!(missing.is_empty(), "asked for, and in no file of kernels/: {missing:?}");
}
