//! What measurements need of a card: weights from nowhere, and how fast it copies.

use std::time::Instant;

use ops::Error;

use crate::backend::CudaBackend;
use crate::device::Grid;
use crate::kernels::FillParams;
use crate::tensor::Weight;

impl CudaBackend {
    /// A weight of seeded numbers, uniform in ±`scale`, made on the card: for timing shapes without a checkpoint.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn random_weight(&mut self, dims: &[usize], seed: u64, scale: f32) -> Result<Weight, Error> {
        self.device().bind()?;
        let weight = Weight::reserve(self.device(), dims, self.storage())?;
        let count = dims.iter().product::<usize>() as u64;
        let params = FillParams { out: weight.address(), count, seed, scale };
        let blocks = self.device().multiprocessors * 8;
        self.device().launch(self.device().kernels.fill, Grid::new(blocks, 1, 256), &params)?;
        // Weights are read before a kernel waits for the one before it.
        self.device().unchain();
        Ok(weight)
    }

    /// Bytes a second of large copies on the card, read and written: what a step's bytes are measured against.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn copy_bandwidth(&mut self) -> Result<f64, Error> {
        const BYTES: usize = 1 << 30;
        const ROUNDS: u32 = 8;
        let from = self.random_weight(&[BYTES / self.storage().bytes()], 1, 1.0)?;
        let to = self.random_weight(&[BYTES / self.storage().bytes()], 2, 1.0)?;
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            self.synchronize()?;
            let started = Instant::now();
            self.device().copy(to.address(), from.address(), BYTES)?;
            self.synchronize()?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        Ok(2.0 * BYTES as f64 / best)
    }
}
