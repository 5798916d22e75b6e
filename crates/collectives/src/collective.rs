//! The trait every transport implements, and the only thing the model knows about other ranks.

use std::time::Duration;

use types::TpRank;

use crate::{Counters, Error};

/// What the ranks of one group say to each other about buffers of type `T`.
///
/// Every rank calls the same operations in the same order with matching sizes; a transport reports a mismatch as a
/// typed error instead of mixing data. Operations block until this rank's part is done or the deadline has passed.
/// Sums are taken in rank order on every transport, so results are equal bit for bit on all ranks and transports.
///
/// `T` is `[f32]` for the host transports of this crate; a backend implements it for its own tensors.
pub trait Collective<T: ?Sized> {
    /// Who this is.
    fn rank(&self) -> TpRank;

    /// Replaces `data` on every rank by the element-wise sum over all ranks.
    ///
    /// # Errors
    /// When a rank is lost, late, or brings another size or operation; the collective is unusable afterwards.
    fn all_reduce_sum(&mut self, data: &mut T) -> Result<(), Error>;

    /// Begins a [`Collective::all_reduce_sum`] of `data` that the device ends within the very next op, which reads it, and may
    /// first add to it what this rank still has to add. With `false` nothing has begun, and the caller asks for
    /// [`Collective::all_reduce_sum`]; with `true` it is counted, `data` is not the sum, and any other op is an error.
    /// All ranks get the same answer.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn begin_all_reduce_sum(&mut self, data: &T) -> Result<bool, Error> {
        let _ = data;
        Ok(false)
    }

    /// Sums `data` over all ranks and leaves this rank its slice: `counts[r]` elements go to rank `r`, in order;
    /// `data` holds `counts.sum()` elements, `own` `counts[rank]`.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn reduce_scatter_sum(&mut self, data: &T, counts: &[usize], own: &mut T) -> Result<(), Error>;

    /// Concatenates every rank's `own` in rank order into `all`: rank `r` brings `counts[r]` elements.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn all_gather(&mut self, own: &T, counts: &[usize], all: &mut T) -> Result<(), Error>;

    /// Sends `send_counts[r]` elements of `send` (in rank order) to each rank `r`, and receives `recv_counts[r]`
    /// from each into `recv`. Counts of zero are allowed; a rank whose sends do not match what the receiver expects
    /// is an error that names it.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn all_to_all_v(
        &mut self,
        send: &T,
        send_counts: &[usize],
        recv: &mut T,
        recv_counts: &[usize],
    ) -> Result<(), Error>;

    /// As [`Collective::all_to_all_v`] for a rank that does not know what comes: each message tells its own count. From
    /// rank `r` come at most `room[r]` elements, a rank that sends more is an error that names it. `came[r]` becomes
    /// what did come, and `recv` (at least `room.sum()` elements) holds it from its start on, in rank order, without
    /// gaps.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn all_to_all_open(
        &mut self,
        send: &T,
        send_counts: &[usize],
        recv: &mut T,
        room: &[usize],
        came: &mut [usize],
    ) -> Result<(), Error>;

    /// Replaces `data` on every rank by rank `root`'s.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn broadcast(&mut self, root: u32, data: &mut T) -> Result<(), Error>;

    /// Returns once every rank has arrived.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn barrier(&mut self) -> Result<(), Error>;

    /// A barrier whose deadline is not the usual one, where a transport can tell them apart: for work that ranks finish
    /// far apart, such as reading weights, and for asking quickly who is still there.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn barrier_within(&mut self, within: Duration) -> Result<(), Error> {
        let _ = within;
        self.barrier()
    }

    /// Whether operations are queued on a device, in order with its other work, and return before they are done. Such
    /// operations may be recorded and repeated with the work around them.
    fn queues(&self) -> bool {
        false
    }

    /// What this rank has done so far.
    fn counters(&self) -> Counters;

    /// Makes every pending and later operation on every rank fail soon with [`Error::Aborted`] or
    /// [`Error::PeerLost`] instead of waiting for its deadline. An operation this rank has completed may still end
    /// well on the others; their next one fails.
    fn abort(&mut self);
}

impl<T: ?Sized, C: Collective<T> + ?Sized> Collective<T> for Box<C> {
    fn rank(&self) -> TpRank {
        (**self).rank()
    }

    fn all_reduce_sum(&mut self, data: &mut T) -> Result<(), Error> {
        (**self).all_reduce_sum(data)
    }

    fn begin_all_reduce_sum(&mut self, data: &T) -> Result<bool, Error> {
        (**self).begin_all_reduce_sum(data)
    }

    fn reduce_scatter_sum(&mut self, data: &T, counts: &[usize], own: &mut T) -> Result<(), Error> {
        (**self).reduce_scatter_sum(data, counts, own)
    }

    fn all_gather(&mut self, own: &T, counts: &[usize], all: &mut T) -> Result<(), Error> {
        (**self).all_gather(own, counts, all)
    }

    fn all_to_all_v(
        &mut self,
        send: &T,
        send_counts: &[usize],
        recv: &mut T,
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        (**self).all_to_all_v(send, send_counts, recv, recv_counts)
    }

    fn all_to_all_open(
        &mut self,
        send: &T,
        send_counts: &[usize],
        recv: &mut T,
        room: &[usize],
        came: &mut [usize],
    ) -> Result<(), Error> {
        (**self).all_to_all_open(send, send_counts, recv, room, came)
    }

    fn broadcast(&mut self, root: u32, data: &mut T) -> Result<(), Error> {
        (**self).broadcast(root, data)
    }

    fn barrier(&mut self) -> Result<(), Error> {
        (**self).barrier()
    }

    fn barrier_within(&mut self, within: Duration) -> Result<(), Error> {
        (**self).barrier_within(within)
    }

    fn queues(&self) -> bool {
        (**self).queues()
    }

    fn counters(&self) -> Counters {
        (**self).counters()
    }

    fn abort(&mut self) {
        (**self).abort();
    }
}
