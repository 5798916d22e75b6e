//! Which tensors still miss the other ranks' part. Forgetting the reduce, or doing it twice, does not compile.

use collectives::Collective;
use ops::{Backend, Norm};

use crate::Error;

/// This rank's summand of a tensor that is the sum over all ranks, in one piece or as `0 + scale · 1`: the last sum
/// waits, since what comes next may do it on the way.
#[must_use = "a partial sum means nothing until it is reduced"]
pub struct Partial<T>(T, Option<(T, f32)>);

/// A tensor that is whole and equal on every rank; as [`Partial`], the last sum may wait.
pub struct Reduced<T>(T, Option<(T, f32)>);

impl<T> Partial<T> {
    /// Marks the result of a row-parallel product, or of a lookup in this rank's rows.
    pub(crate) const fn new(tensor: T) -> Self {
        Self(tensor, None)
    }

    /// `self + scale · other`, still without the other ranks' parts.
    pub(crate) fn plus<B: Backend<Tensor = T>>(
        self,
        backend: &mut B,
        other: Self,
        scale: f32,
    ) -> Result<Self, Error> {
        Ok(Self(self.whole(backend)?, Some((other.whole(backend)?, scale))))
    }

    /// `self` with `scale · rows` added from row `first_row` on, still without the other ranks' parts.
    pub(crate) fn plus_rows<B: Backend<Tensor = T>>(
        self,
        backend: &mut B,
        (first_row, rows): (usize, &T),
        scale: f32,
    ) -> Result<Self, Error> {
        let whole = self.whole(backend)?;
        Ok(Self::new(backend.add_rows(whole, first_row, rows, scale)?))
    }

    fn whole<B: Backend<Tensor = T>>(self, backend: &mut B) -> Result<T, Error> {
        match self.1 {
            Some((more, scale)) => Ok(backend.add_scaled(self.0, &more, scale)?),
            None => Ok(self.0),
        }
    }

    /// The sum over all ranks: the one all-reduce.
    pub(crate) fn reduce<B: Backend<Tensor = T>, C: Collective<T>>(
        self,
        backend: &mut B,
        comm: &mut C,
    ) -> Result<Reduced<T>, Error> {
        if comm.rank().size().as_usize() == 1 {
            let Self(mut sum, more) = self;
            comm.all_reduce_sum(&mut sum)?;
            return Ok(Reduced(sum, more));
        }
        let mut whole = self.whole(backend)?;
        comm.all_reduce_sum(&mut whole)?;
        Ok(Reduced(whole, None))
    }

    /// The one all-reduce, what it does to the residual stream `x`, and that one's norm: [`Backend::residual_norm`] of the
    /// sum over all ranks. A device that can does all of it at once.
    pub(crate) fn reduce_into<B: Backend<Tensor = T>, C: Collective<T>>(
        self,
        (backend, comm): (&mut B, &mut C),
        x: T,
        norm: (&B::Weight, Norm),
    ) -> Result<(T, T), Error> {
        let several = comm.rank().size().as_usize() > 1;
        let (sum, more) = if several && comm.begin_all_reduce_sum(&self.0)? {
            (self.0, self.1)
        } else {
            self.reduce(backend, comm)?.parts()
        };
        let more = more.as_ref().map(|(more, scale)| (more, *scale));
        Ok(backend.residual_norm(x, (sum, more), norm)?)
    }
}

impl<T> Reduced<T> {
    /// The summand, and what is still to be added to it, times a factor.
    fn parts(self) -> (T, Option<(T, f32)>) {
        (self.0, self.1)
    }

    /// The whole tensor.
    pub(crate) fn whole<B: Backend<Tensor = T>>(self, backend: &mut B) -> Result<T, Error> {
        Partial(self.0, self.1).whole(backend)
    }
}
