//! All-to-alls whose receivers learn from the messages how much comes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use collectives::{Collective, Error, Fault, Op};
use common::{PATIENT, Random, assert_same, every, faulty_group, group, tcp_group, together, with_at_least};

/// What `from` sends to `to` in case `case`: nothing, a little, or more than a socket takes at once.
fn piece(case: u64, from: usize, to: usize) -> Vec<f32> {
    let mut random = Random(case * 10_000 + (from * 100 + to) as u64);
    let count = [0, 0, 1, 7, 300, 200_000][random.below(6)];
    random.values(count)
}

#[test]
fn what_comes_lies_in_rank_order_without_gaps_whatever_was_expected() {
    for (transport, size) in every() {
        let size = size as usize;
        together(group(transport, size as u32, PATIENT), |rank, mut member| {
            for case in 0..8 {
                let send: Vec<Vec<f32>> = (0..size).map(|to| piece(case, rank, to)).collect();
                let counts: Vec<usize> = send.iter().map(Vec::len).collect();
                let expected: Vec<Vec<f32>> = (0..size).map(|from| piece(case, from, rank)).collect();
                let told: Vec<usize> = expected.iter().map(Vec::len).collect();
                // Exactly enough room, and room for more.
                for spare in [0, 1000] {
                    let room: Vec<usize> = told.iter().map(|count| count + spare).collect();
                    let mut recv = vec![f32::NAN; room.iter().sum::<usize>() + 3];
                    let mut came = vec![usize::MAX; size];
                    member.all_to_all_open(&send.concat(), &counts, &mut recv, &room, &mut came).unwrap();
                    assert_eq!(came, told, "{transport:?} of {size}, rank {rank}");
                    let all = expected.concat();
                    assert_same(&recv[..all.len()], &all, &format!("{transport:?} of {size}, rank {rank}"));
                }
            }
        });
    }
}

#[test]
fn a_rank_that_sends_more_than_there_is_room_for_is_named() {
    for (transport, size) in with_at_least(2) {
        let members = faulty_group((transport, size), PATIENT, 0, (Fault::CorruptCount, 2));
        let results = together(members, |_, mut member| {
            let ranks = size as usize;
            let (counts, mut came) = (vec![2; ranks], vec![0; ranks]);
            let mut call = || {
                member.all_to_all_open(
                    &vec![1.0; 2 * ranks],
                    &counts,
                    &mut vec![0.0; 2 * ranks],
                    &counts,
                    &mut came,
                )
            };
            call().unwrap();
            call()
        });
        // The corrupt count goes to the last rank, which finds out; the others are told by it.
        let named = Error::Mismatch {
            rank: 0,
            collective: Op::AllToAll.name(),
            what: "count",
            ours: "at most 2".to_owned(),
            theirs: "3".to_owned(),
        };
        assert_eq!(results.last().unwrap(), &Err(named), "{transport:?} of {size}");
        for (rank, result) in results.iter().enumerate().take(results.len() - 1).skip(1) {
            let culprit = result.as_ref().err().map(Error::culprit);
            // A rank may have had its part before the group ended.
            assert!(
                result.is_ok() || culprit == Some(Some(0)),
                "{transport:?} of {size}, {rank}: {result:?}"
            );
        }
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused_with_the_numbers() {
    for (send, counts, recv, room, came) in [
        (3, vec![1, 1], 4, vec![2, 2], 2),
        (2, vec![1, 1], 3, vec![2, 2], 2),
        (2, vec![1, 1], 4, vec![2], 2),
        (2, vec![1, 1], 4, vec![2, 2], 1),
        (2, vec![2, 0], 4, vec![1, 3], 2),
    ] {
        for (transport, size) in [(common::Transport::InProcess, 2), (common::Transport::Tcp, 2)] {
            let mut members = group(transport, size, PATIENT);
            let (mut recv, mut came) = (vec![0.0; recv], vec![0; came]);
            let refused = members[0].all_to_all_open(&vec![0.0; send], &counts, &mut recv, &room, &mut came);
            assert!(
                matches!(refused, Err(Error::Argument { collective: "all_to_all_v", .. })),
                "{refused:?}"
            );
        }
    }
}

#[test]
fn each_exchange_is_one_message_to_every_other_rank() {
    for size in [1, 2, 4, 8] {
        let ranks = size as usize;
        let counters = together(tcp_group(size, PATIENT), |_, mut joined| {
            let (counts, mut came) = (vec![1; ranks], vec![0; ranks]);
            let (send, mut recv) = (vec![1.0; ranks], vec![0.0; 5 * ranks]);
            let line = &mut joined.collective;
            line.all_to_all_open(&send, &counts, &mut recv, &vec![5; ranks], &mut came).unwrap();
            line.all_to_all_v(&send, &counts, &mut recv[..ranks], &counts).unwrap();
            line.counters().of(Op::AllToAll)
        });
        for traffic in counters {
            assert_eq!((traffic.ops, traffic.messages_sent), (2, 2 * u64::from(size - 1)), "{size} ranks");
            assert_eq!(traffic.bytes_sent, 2 * 4 * u64::from(size - 1));
            assert_eq!(traffic.bytes_received, traffic.bytes_sent);
        }
    }
}
