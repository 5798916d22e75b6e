//! What a rank counts of its own operations.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use collectives::{Collective, InProcess, ONE_SHOT_BYTES_MAX, Op, Solo};
use common::{PATIENT, tcp_group, together};
use types::TpSize;

#[test]
fn counters_tell_operations_and_payload_bytes() {
    let counters_of = |results: Vec<collectives::Counters>, ranks: u64| {
        for counters in results {
            let reduced = counters.of(Op::AllReduce);
            assert_eq!(reduced.ops, 2);
            assert_eq!(reduced.bytes_sent, 2 * 12 * (ranks - 1));
            assert_eq!(reduced.bytes_received, 2 * 12 * (ranks - 1));
            assert_eq!(counters.of(Op::Barrier).ops, 1);
            assert_eq!(counters.of(Op::AllToAll), collectives::Traffic::default());
            assert_eq!(counters.ops(), 3);
        }
    };
    fn work(member: &mut impl Collective<[f32]>) {
        member.all_reduce_sum(&mut [1.0; 3]).unwrap();
        member.barrier().unwrap();
        member.all_reduce_sum(&mut [1.0; 3]).unwrap();
    }
    let mut solo = Solo::new();
    work(&mut solo);
    counters_of(vec![solo.counters()], 1);
    let threads = InProcess::group(TpSize::new(3).unwrap(), PATIENT);
    let results = together(threads, |_, mut member| {
        work(&mut member);
        member.counters()
    });
    counters_of(results, 3);
    let results = together(tcp_group(3, PATIENT), |_, mut joined| {
        work(&mut joined.collective);
        joined.collective.counters()
    });
    counters_of(results, 3);
}

#[test]
fn a_large_sum_of_many_ranks_moves_less_than_everything_to_everyone() {
    let len = ONE_SHOT_BYTES_MAX / size_of::<f32>();
    let bytes = |ranks, len| {
        let results = together(tcp_group(ranks, PATIENT), |_, mut joined| {
            joined.collective.all_reduce_sum(&mut vec![1.0; len]).unwrap();
            joined.collective.counters().of(Op::AllReduce).bytes_sent
        });
        results.into_iter().sum::<u64>() / u64::from(ranks)
    };
    let size = ONE_SHOT_BYTES_MAX as u64;
    assert_eq!(bytes(2, 4 * len), 4 * size);
    assert_eq!(bytes(4, len), 3 * size);
    // Three quarters of it out as summands, and a quarter's sum to three ranks.
    assert_eq!(bytes(4, 4 * len), 4 * size * 6 / 4);
}
