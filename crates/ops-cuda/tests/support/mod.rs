//! A card for tests, or a word that there is none.

#![allow(dead_code, reason = "each test file uses the part it needs")]

use ops_cuda::{CudaBackend, KernelCache, Options};
use types::{Bytes, DType};

/// Why nothing was tested, printed; `None` when a card is there.
pub(crate) fn skipped() -> bool {
    match ops_cuda::probe() {
        Ok(found) => {
            println!("on {found}");
            false
        }
        Err(error) => {
            println!("no CUDA driver: skipped ({error})");
            true
        }
    }
}

/// Why nothing was tested, printed; `None` when two cards are there.
pub(crate) fn skipped_without_two() -> bool {
    match ops_cuda::probe() {
        Ok(found) if found.cards.len() >= 2 => {
            println!("on {found}");
            false
        }
        Ok(found) => {
            println!("two cards are needed: skipped (there is {found})");
            true
        }
        Err(error) => {
            println!("no CUDA driver: skipped ({error})");
            true
        }
    }
}

pub(crate) fn backend(dtype: DType) -> Result<CudaBackend, ops::Error> {
    backend_on(0, dtype)
}

/// On one of several cards.
pub(crate) fn backend_on(ordinal: usize, dtype: DType) -> Result<CudaBackend, ops::Error> {
    let activations = Bytes(256 << 20);
    let options = Options { ordinal, dtype, activations, cache: KernelCache::user(), heads: None };
    Ok(CudaBackend::new(&options)?)
}
