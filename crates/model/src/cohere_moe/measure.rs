//! What benchmarks ask of a model: keys and values without a prompt, and which experts a step reads.

use collectives::Collective;
use ops::{Backend, Batch};

use super::Model;
use crate::{Error, Mlp};

impl<B: Backend, C: Collective<B::Tensor>> Model<B, C> {
    /// Fills the whole KV cache with seeded numbers, as if every block had been written.
    ///
    /// # Errors
    /// When the backend does not make them.
    pub fn fill_kv(&mut self, seed: u64) -> Result<(), Error> {
        for (number, layer) in (seed..).zip(&mut self.kv) {
            self.backend.dummy_kv(layer, number)?;
        }
        Ok(())
    }

    /// Runs a step and counts, for each sparse layer in order, the experts of this rank that at least one of its rows
    /// chose.
    ///
    /// # Errors
    /// As [`Model::step`].
    pub fn experts_touched(&mut self, batch: &Batch) -> Result<Vec<usize>, Error> {
        let rows = batch.tokens.len();
        self.backend.begin_step(batch)?;
        let mut x = self.embed(rows)?;
        let (mut touched, mut n) = (Vec::new(), None);
        for index in 0..self.config.layers.len() {
            touched.extend(self.touched(index, &x).map_err(|e| e.in_layer(index))?);
            (x, n) = self.layer(index, (x, n), &[rows]).map_err(|e| e.in_layer(index))?;
        }
        Ok(touched)
    }

    /// Of one layer, from the residual stream before it; `None` when it is dense.
    fn touched(&mut self, index: usize, x: &B::Tensor) -> Result<Option<usize>, Error> {
        let (layer, weights) = (self.config.layers[index], &self.weights.layers[index]);
        let (Mlp::Sparse, Some(moe), Some(router)) = (layer.mlp, self.config.moe, weights.router()) else {
            return Ok(None);
        };
        let n = self.backend.norm(x, &weights.norm, self.config.norm)?;
        let logits = self.backend.linear(&n, router)?;
        let logits = self.backend.read(&logits)?;
        let held = self.plan.experts.as_ref().map_or(0..moe.experts, |shard| shard.experts.clone());
        let chosen = ops::chosen(&logits, moe.experts, moe.routing.top_k);
        Ok(Some(chosen.into_iter().filter(|expert| held.contains(expert)).count()))
    }
}
