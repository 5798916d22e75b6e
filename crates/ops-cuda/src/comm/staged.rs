//! The collective of ranks whose cards cannot talk to each other: numbers go through host memory.

use collectives::{Collective, Counters, Error};
use half::bf16;
use types::{DType, TpRank};

use crate::Tensor;

/// A host collective for tensors on cards. Sums are taken in fp32 in rank order, as the host's are. Every operation
/// waits for the card, so this is for ranks that share a card, and for comparing.
#[derive(Debug)]
pub struct Staged<C> {
    line: C,
    from: Vec<f32>,
    to: Vec<f32>,
}

impl<C: Collective<[f32]>> Staged<C> {
    /// Over `line`.
    pub const fn new(line: C) -> Self {
        Self { line, from: Vec::new(), to: Vec::new() }
    }
}

fn failed(collective: &'static str, tensor: &Tensor, error: &crate::Error) -> Error {
    let (what, expected) = ("the copy between card and host", error.to_string());
    Error::Argument { collective, what, expected, got: tensor.bytes() as u64 }
}

/// The numbers of `tensor`, as fp32.
fn fetch(collective: &'static str, tensor: &Tensor, into: &mut Vec<f32>) -> Result<(), Error> {
    into.clear();
    into.resize(tensor.elements(), 0.0);
    let mut bytes = vec![0; tensor.bytes()];
    tensor.device().download(&mut bytes, tensor.address()).map_err(|e| failed(collective, tensor, &e))?;
    match tensor.dtype() {
        DType::F32 => {
            for (number, bytes) in into.iter_mut().zip(bytes.as_chunks().0) {
                *number = f32::from_le_bytes(*bytes);
            }
        }
        DType::BF16 => {
            for (number, bytes) in into.iter_mut().zip(bytes.as_chunks().0) {
                *number = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
    Ok(())
}

/// Puts numbers at the start of `tensor`, rounded to its dtype.
fn store(collective: &'static str, tensor: &Tensor, numbers: &[f32]) -> Result<(), Error> {
    let (device, to) = (tensor.device(), tensor.address());
    let stored = match tensor.dtype() {
        DType::F32 => device.upload(to, numbers),
        DType::BF16 => {
            let narrow: Vec<bf16> = numbers.iter().map(|&number| bf16::from_f32(number)).collect();
            device.upload(to, &narrow)
        }
    };
    stored.map_err(|error| failed(collective, tensor, &error))
}

impl<C: Collective<[f32]>> Collective<Tensor> for Staged<C> {
    fn rank(&self) -> TpRank {
        self.line.rank()
    }

    fn all_reduce_sum(&mut self, data: &mut Tensor) -> Result<(), Error> {
        fetch("all_reduce_sum", data, &mut self.from)?;
        self.line.all_reduce_sum(&mut self.from)?;
        store("all_reduce_sum", data, &self.from)
    }

    fn reduce_scatter_sum(&mut self, data: &Tensor, counts: &[usize], own: &mut Tensor) -> Result<(), Error> {
        fetch("reduce_scatter_sum", data, &mut self.from)?;
        self.to.resize(own.elements(), 0.0);
        self.line.reduce_scatter_sum(&self.from, counts, &mut self.to)?;
        store("reduce_scatter_sum", own, &self.to)
    }

    fn all_gather(&mut self, own: &Tensor, counts: &[usize], all: &mut Tensor) -> Result<(), Error> {
        fetch("all_gather", own, &mut self.from)?;
        self.to.resize(all.elements(), 0.0);
        self.line.all_gather(&self.from, counts, &mut self.to)?;
        store("all_gather", all, &self.to)
    }

    fn all_to_all_v(
        &mut self,
        send: &Tensor,
        send_counts: &[usize],
        recv: &mut Tensor,
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        fetch("all_to_all_v", send, &mut self.from)?;
        self.to.resize(recv.elements(), 0.0);
        self.line.all_to_all_v(&self.from, send_counts, &mut self.to, recv_counts)?;
        store("all_to_all_v", recv, &self.to)
    }

    fn all_to_all_open(
        &mut self,
        send: &Tensor,
        send_counts: &[usize],
        recv: &mut Tensor,
        room: &[usize],
        came: &mut [usize],
    ) -> Result<(), Error> {
        fetch("all_to_all_v", send, &mut self.from)?;
        self.to.resize(recv.elements(), 0.0);
        self.line.all_to_all_open(&self.from, send_counts, &mut self.to, room, came)?;
        store("all_to_all_v", recv, &self.to[..came.iter().sum()])
    }

    fn broadcast(&mut self, root: u32, data: &mut Tensor) -> Result<(), Error> {
        fetch("broadcast", data, &mut self.from)?;
        self.line.broadcast(root, &mut self.from)?;
        store("broadcast", data, &self.from)
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.line.barrier()
    }

    fn counters(&self) -> Counters {
        self.line.counters()
    }

    fn abort(&mut self) {
        self.line.abort();
    }
}
