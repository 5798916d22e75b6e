//! The collective of a rank that has its model on one card alone.

use collectives::{Collective, Counters, Error};
use types::TpRank;

use crate::Tensor;

/// A group of one rank, whose data never leaves its card: sums are the rank's own, the rest are copies. The line
/// behind it is told of each operation with nothing in it, so an abort still ends the rank.
#[derive(Debug)]
pub struct SoloDevice<C>(C);

impl<C: Collective<[f32]>> SoloDevice<C> {
    /// Over `line`, whose group must have one rank.
    ///
    /// # Errors
    /// [`crate::Error::NotAlone`] when it has more.
    pub fn new(line: C) -> Result<Self, crate::Error> {
        let ranks = line.rank().size().get();
        if ranks == 1 { Ok(Self(line)) } else { Err(crate::Error::NotAlone { ranks }) }
    }

    fn copy(collective: &'static str, from: &Tensor, counts: &[usize], to: &Tensor) -> Result<(), Error> {
        for (what, got) in [("length of the input", from.elements()), ("length of the output", to.elements())]
        {
            if counts != [got] || from.dtype() != to.dtype() {
                let expected = format!("{counts:?} numbers of {}", from.dtype());
                return Err(Error::Argument { collective, what, expected, got: got as u64 });
            }
        }
        from.device().copy(to.address(), from.address(), from.bytes()).map_err(|error| Error::Argument {
            collective,
            what: "the copy on the card",
            expected: error.to_string(),
            got: from.bytes() as u64,
        })
    }
}

impl<C: Collective<[f32]>> Collective<Tensor> for SoloDevice<C> {
    fn rank(&self) -> TpRank {
        self.0.rank()
    }

    fn all_reduce_sum(&mut self, _data: &mut Tensor) -> Result<(), Error> {
        self.0.all_reduce_sum(&mut [])
    }

    fn reduce_scatter_sum(&mut self, data: &Tensor, counts: &[usize], own: &mut Tensor) -> Result<(), Error> {
        self.0.reduce_scatter_sum(&[], &[0], &mut [])?;
        Self::copy("reduce-scatter", data, counts, own)
    }

    fn all_gather(&mut self, own: &Tensor, counts: &[usize], all: &mut Tensor) -> Result<(), Error> {
        self.0.all_gather(&[], &[0], &mut [])?;
        Self::copy("all-gather", own, counts, all)
    }

    fn all_to_all_v(
        &mut self,
        send: &Tensor,
        send_counts: &[usize],
        recv: &mut Tensor,
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        self.0.all_to_all_v(&[], &[0], &mut [], &[0])?;
        // The sizes of both sides are checked: with one rank they are the same number.
        let counts = if send_counts == recv_counts { send_counts } else { &[] };
        Self::copy("all-to-all", send, counts, recv)
    }

    fn all_to_all_open(
        &mut self,
        send: &Tensor,
        send_counts: &[usize],
        recv: &mut Tensor,
        room: &[usize],
        came: &mut [usize],
    ) -> Result<(), Error> {
        // Alone, what comes is what goes.
        self.0.all_to_all_open(&[], &[0], &mut [], &[0], &mut [0])?;
        came.copy_from_slice(send_counts);
        let counts = if send_counts == room { send_counts } else { &[] };
        Self::copy("all-to-all", send, counts, recv)
    }

    fn broadcast(&mut self, root: u32, _data: &mut Tensor) -> Result<(), Error> {
        self.0.broadcast(root, &mut [])
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.0.barrier()
    }

    fn queues(&self) -> bool {
        true
    }

    fn counters(&self) -> Counters {
        self.0.counters()
    }

    fn abort(&mut self) {
        self.0.abort();
    }
}
