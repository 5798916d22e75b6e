//! Every kernel compiles for the cards that are meant, at the shapes of the published models and of the tests, without
//! a card: NVRTC alone is needed. Registers that go to memory fail.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

use std::fs;

use ops_cuda::{Compiled, Error, KernelCache, Source, compile};
use types::DType;

const ARCHES: [&str; 3] = ["sm_80", "sm_90a", "sm_100a"];
/// (head dimension, query heads together): North, Command A+, the golden checkpoints, the demo model.
const HEADS: [(usize, usize); 5] = [(128, 8), (128, 4), (16, 2), (16, 4), (32, 4)];

fn sources() -> Vec<Source> {
    let mut sources = vec![Source::gemm()];
    for dtype in [DType::F32, DType::BF16] {
        sources.extend([Source::rows(dtype), Source::skinny(dtype), Source::experts(dtype)]);
        sources.extend(HEADS.map(|(head_dim, group)| Source::attention(dtype, head_dim, group)));
    }
    sources
}

/// `None`, and a word about it, without a compiler.
fn compiled(source: &Source, arch: &str) -> Option<Compiled> {
    match compile(source, arch) {
        Ok(compiled) => Some(compiled),
        Err(error @ Error::LibraryMissing { .. }) => {
            println!("skipped: {error}");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

/// ptxas' lines about spilled bytes that are not zero.
fn spills(log: &str) -> Vec<&str> {
    let spilled =
        |line: &&str| line.contains("bytes spill stores") && !line.contains(" 0 bytes spill stores");
    log.lines().filter(spilled).collect()
}

#[test]
fn every_kernel_compiles_for_every_card_without_spilling() {
    let mut spilled = Vec::new();
    for arch in ARCHES {
        for source in sources() {
            let Some(Compiled { cubin, log }) = compiled(&source, arch) else {
                return;
            };
            let place = format!("{} {:?} for {arch}", source.file(), source.defines());
            assert!(cubin.starts_with(b"\x7fELF"), "{place}: not a cubin");
            assert!(log.contains("registers"), "{place}: no report of registers");
            spilled.extend(spills(&log).into_iter().map(|line| format!("{place}: {line}")));
        }
    }
    assert!(spilled.is_empty(), "{spilled:#?}");
}

#[test]
fn a_damaged_cache_entry_is_compiled_again() {
    let directory = tempfile::tempdir().unwrap();
    let cache = KernelCache(Some(directory.path().to_owned()));
    let source = Source::rows(DType::F32);
    if compiled(&source, "sm_90a").is_none() {
        return;
    }
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
    let rebuilt = cache.get(&source, "sm_90a").unwrap();
    assert!(!rebuilt.log.is_empty(), "a damaged entry is not used");
    assert_eq!(cache.get(&source, "sm_90a").unwrap().cubin, rebuilt.cubin);
}
