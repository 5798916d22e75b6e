//! Which tensors still miss the other ranks' part. Forgetting the reduce, or doing it twice, does not compile.

use collectives::Collective;
use ops::Backend;

use crate::Error;

/// This rank's summand of a tensor that is the sum over all ranks.
#[must_use = "a partial sum means nothing until it is reduced"]
pub struct Partial<T>(T);

/// A tensor that is whole and equal on every rank.
pub struct Reduced<T>(T);

impl<T> Partial<T> {
    /// Marks the result of a row-parallel product, or of a lookup in this rank's rows.
    pub(crate) const fn new(tensor: T) -> Self {
        Self(tensor)
    }

    /// `self + scale · other`, still without the other ranks' parts.
    pub(crate) fn plus<B: Backend<Tensor = T>>(
        self,
        backend: &mut B,
        other: &Self,
        scale: f32,
    ) -> Result<Self, Error> {
        Ok(Self(backend.add_scaled(self.0, &other.0, scale)?))
    }

    /// `self` with `scale · rows` added from row `first_row` on, still without the other ranks' parts.
    pub(crate) fn plus_rows<B: Backend<Tensor = T>>(
        self,
        backend: &mut B,
        (first_row, rows): (usize, &T),
        scale: f32,
    ) -> Result<Self, Error> {
        Ok(Self(backend.add_rows(self.0, first_row, rows, scale)?))
    }

    /// The sum over all ranks: the one all-reduce.
    pub(crate) fn reduce<C: Collective<T>>(mut self, comm: &mut C) -> Result<Reduced<T>, Error> {
        comm.all_reduce_sum(&mut self.0)?;
        Ok(Reduced(self.0))
    }
}

impl<T> Reduced<T> {
    /// The whole tensor.
    pub(crate) const fn get(&self) -> &T {
        &self.0
    }

    /// The whole tensor, by value.
    pub(crate) fn into_inner(self) -> T {
        self.0
    }
}
