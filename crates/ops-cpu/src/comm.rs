//! Host collectives on this backend's tensors.

use collectives::{Collective, Counters, Error};
use types::TpRank;

use crate::tensor::Tensor;

/// Lets any host collective reduce and gather CPU tensors.
#[derive(Debug)]
pub struct HostCollective<C>(pub C);

impl<C: Collective<[f32]>> Collective<Tensor> for HostCollective<C> {
    fn rank(&self) -> TpRank {
        self.0.rank()
    }

    fn all_reduce_sum(&mut self, data: &mut Tensor) -> Result<(), Error> {
        self.0.all_reduce_sum(data.as_mut_slice())
    }

    fn reduce_scatter_sum(&mut self, data: &Tensor, counts: &[usize], own: &mut Tensor) -> Result<(), Error> {
        self.0.reduce_scatter_sum(data.as_slice(), counts, own.as_mut_slice())
    }

    fn all_gather(&mut self, own: &Tensor, counts: &[usize], all: &mut Tensor) -> Result<(), Error> {
        self.0.all_gather(own.as_slice(), counts, all.as_mut_slice())
    }

    fn all_to_all_v(
        &mut self,
        send: &Tensor,
        send_counts: &[usize],
        recv: &mut Tensor,
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        self.0.all_to_all_v(send.as_slice(), send_counts, recv.as_mut_slice(), recv_counts)
    }

    fn all_to_all_open(
        &mut self,
        send: &Tensor,
        send_counts: &[usize],
        recv: &mut Tensor,
        room: &[usize],
        came: &mut [usize],
    ) -> Result<(), Error> {
        self.0.all_to_all_open(send.as_slice(), send_counts, recv.as_mut_slice(), room, came)
    }

    fn broadcast(&mut self, root: u32, data: &mut Tensor) -> Result<(), Error> {
        self.0.broadcast(root, data.as_mut_slice())
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.0.barrier()
    }

    fn counters(&self) -> Counters {
        self.0.counters()
    }

    fn abort(&mut self) {
        self.0.abort();
    }
}
