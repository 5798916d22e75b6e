//! The CUDA op set keeps the contract of `ops`, in both dtypes.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

mod support;

use ops::conformance::{Tolerance, run};
use support::{backend, skipped};
use types::DType;

const SEED: u64 = 20_260_501;

fn check(dtype: DType, tolerance: Tolerance) {
    if skipped() {
        return;
    }
    let report = run(|| backend(dtype), tolerance, SEED).unwrap();
    println!("{dtype}: {} comparisons, {} mismatches", report.compared, report.mismatches.len());
    assert!(report.compared > 400, "only {} comparisons", report.compared);
    let shown: Vec<_> = report.mismatches.iter().take(8).collect();
    assert!(shown.is_empty(), "seed {SEED}: {} of {}: {shown:#?}", report.mismatches.len(), report.compared);
}

#[test]
fn f32_computes_what_the_ops_mean() {
    check(DType::F32, Tolerance::F32);
}

#[test]
fn bf16_computes_what_the_ops_mean() {
    check(DType::BF16, Tolerance::BF16);
}
