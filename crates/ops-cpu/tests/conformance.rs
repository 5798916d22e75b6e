//! The CPU op set keeps the contract of `ops`, in both dtypes, with one thread and with several.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use ops::conformance::{Tolerance, run};
use ops_cpu::CpuBackend;
use types::DType;

const SEED: u64 = 20_260_501;

fn check(dtype: DType, threads: usize, tolerance: Tolerance) {
    let report = run(|| CpuBackend::new(dtype, threads), tolerance, SEED).unwrap();
    assert!(report.compared > 400, "only {} comparisons", report.compared);
    let shown: Vec<_> = report.mismatches.iter().take(5).collect();
    assert!(shown.is_empty(), "seed {SEED}: {} of {}: {shown:#?}", report.mismatches.len(), report.compared);
}

#[test]
fn f32_on_one_thread_computes_what_the_ops_mean() {
    check(DType::F32, 1, Tolerance::F32);
}

#[test]
fn f32_on_three_threads_computes_what_the_ops_mean() {
    check(DType::F32, 3, Tolerance::F32);
}

#[test]
fn bf16_computes_what_the_ops_mean() {
    check(DType::BF16, 1, Tolerance::BF16);
}
