//! Looking for what CUDA needs.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on, or is skipped, says so"
)]

use ops_cuda::{Error, probe};

#[test]
fn a_machine_without_a_driver_is_told_which_library_is_missing() {
    match probe() {
        Ok(found) => assert!(!found.cards.is_empty()),
        Err(error @ Error::LibraryMissing { .. }) => assert!(error.to_string().contains("install")),
        Err(other) => assert!(!other.to_string().is_empty()),
    }
}
