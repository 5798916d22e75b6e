//! What a rank has done in its steps: what it said to others, and which experts were chosen.

use std::time::Duration;

use collectives::{Collective, Counters, Op, Traffic};
use ops::Backend;

use crate::Error;

/// Counts of one rank since its model was put together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Activity {
    /// Steps run.
    pub steps: u64,
    /// Rows of this rank's batches.
    pub rows: u64,
    /// Collectives of the steps, in the whole group and in the sub-group together.
    pub collectives: Counters,
    /// Rows sent to the experts of other ranks.
    pub rows_sent: u64,
    /// Rows that came from other ranks for this rank's experts.
    pub rows_received: u64,
    /// By layer and expert: rows that chose it, of those this rank routed. That is all rows of its sub-group in replicated
    /// dispatch, and its slice of them in all-to-all dispatch. A layer's list is empty when it is dense, and all are when
    /// the backend does not count.
    pub chosen: Vec<Vec<u64>>,
}

/// Counters travel as fp32 numbers below 2^22, which fp32 holds exactly: three of them hold 66 bits.
const DIGIT_BITS: u32 = 22;
const DIGITS: usize = 3;
/// Numbers of an activity before those of the experts.
const FIXED: usize = 4 + 5 * Op::ALL.len();

impl Activity {
    fn numbers(&self) -> Vec<u64> {
        let mut numbers = vec![self.steps, self.rows, self.rows_sent, self.rows_received];
        for op in Op::ALL {
            let Traffic { ops, messages_sent, bytes_sent, bytes_received } = self.collectives.of(op);
            let took = u64::try_from(self.collectives.time(op).as_nanos()).unwrap_or(u64::MAX);
            numbers.extend([ops, messages_sent, bytes_sent, bytes_received, took]);
        }
        numbers.extend(self.chosen.iter().flatten());
        numbers
    }

    /// The activity that `numbers` tell, with `self`'s layers.
    fn told(&self, numbers: &[u64]) -> Self {
        let mut by_op = [Traffic::default(); Op::ALL.len()];
        let mut took = [Duration::ZERO; Op::ALL.len()];
        for ((traffic, took), of) in by_op.iter_mut().zip(&mut took).zip(numbers[4..FIXED].chunks_exact(5)) {
            *took = Duration::from_nanos(of[4]);
            *traffic = Traffic { ops: of[0], messages_sent: of[1], bytes_sent: of[2], bytes_received: of[3] };
        }
        let mut rest = numbers[FIXED..].iter().copied();
        let chosen = self.chosen.iter().map(|layer| rest.by_ref().take(layer.len()).collect()).collect();
        Self {
            steps: numbers[0],
            rows: numbers[1],
            rows_sent: numbers[2],
            rows_received: numbers[3],
            collectives: Counters::new(by_op).taking(took),
            chosen,
        }
    }
}

/// Every rank's activity in rank order, on every rank: one all-gather, which is no part of a step.
pub(crate) fn gather<B: Backend, C: Collective<B::Tensor>>(
    backend: &mut B,
    comm: &mut C,
    own: &Activity,
) -> Result<Vec<Activity>, Error> {
    let ranks = comm.rank().size().as_usize();
    if ranks == 1 {
        return Ok(vec![own.clone()]);
    }
    let mask = (1_u64 << DIGIT_BITS) - 1;
    let digits = |number: &u64| {
        let number = *number;
        (0..DIGITS as u32).map(move |at| ((number >> (DIGIT_BITS * at)) & mask) as f32)
    };
    let numbers = own.numbers();
    let told: Vec<f32> = numbers.iter().flat_map(digits).collect();
    let sent = backend.upload(told.len(), &told)?;
    let mut all = backend.buffer(ranks, told.len())?;
    comm.all_gather(&sent, &vec![told.len(); ranks], &mut all)?;
    let all = backend.read(&all)?;
    let number = |digits: &[f32]| {
        digits.iter().rev().fold(0, |number: u64, &digit| (number << DIGIT_BITS) | digit as u64)
    };
    let of_rank = |told: &[f32]| {
        let numbers: Vec<u64> = told.chunks_exact(DIGITS).map(number).collect();
        own.told(&numbers)
    };
    Ok(all.chunks_exact(told.len()).map(of_rank).collect())
}
