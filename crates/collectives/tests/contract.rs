//! The contract of a collective, run over every transport with one to four ranks.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use common::{PATIENT, Random, assert_same, data, every, group, sum, together};

/// Lengths around the borders: empty, fewer than ranks, not divisible, at and above the one-shot limit.
const LENGTHS: [usize; 9] = [0, 1, 2, 3, 7, 1000, 8192, 8193, 50_003];

#[test]
fn every_rank_gets_the_sum_in_rank_order() {
    for (transport, size) in every() {
        let results = together(group(transport, size, PATIENT), |rank, mut member| {
            LENGTHS.map(|len| {
                let mut buffer = data(len as u64, rank, len);
                member.all_reduce_sum(&mut buffer).unwrap();
                buffer
            })
        });
        for (case, len) in LENGTHS.into_iter().enumerate() {
            let parts: Vec<_> = (0..size as usize).map(|rank| data(len as u64, rank, len)).collect();
            for (rank, result) in results.iter().enumerate() {
                let what = format!("{transport:?} of {size}, rank {rank}, {len} elements");
                assert_same(&result[case], &sum(&parts), &what);
            }
        }
    }
}

/// Uneven counts that do not divide, with a rank that gets nothing.
fn uneven(size: u32, case: usize) -> Vec<usize> {
    (0..size as usize).map(|rank| (rank * 5 + case * 3) % 7 * (1 + case * 400)).collect()
}

#[test]
fn each_rank_keeps_its_slice_of_the_sum() {
    for (transport, size) in every() {
        for case in 0..6 {
            let counts = uneven(size, case);
            let total = counts.iter().sum();
            let parts: Vec<_> = (0..size as usize).map(|rank| data(case as u64, rank, total)).collect();
            let expected = sum(&parts);
            let results = together(group(transport, size, PATIENT), |rank, mut member| {
                let mut own = vec![f32::NAN; counts[rank]];
                member.reduce_scatter_sum(&parts[rank], &counts, &mut own).unwrap();
                own
            });
            let what = format!("{transport:?} of {size}, counts {counts:?}");
            assert_same(&results.concat(), &expected, &what);
        }
    }
}

#[test]
fn gathering_puts_contributions_in_rank_order() {
    for (transport, size) in every() {
        for case in 0..6 {
            let counts = uneven(size, case);
            let parts: Vec<_> =
                (0..size as usize).map(|rank| data(case as u64, rank, counts[rank])).collect();
            let results = together(group(transport, size, PATIENT), |rank, mut member| {
                let mut all = vec![f32::NAN; counts.iter().sum()];
                member.all_gather(&parts[rank], &counts, &mut all).unwrap();
                all
            });
            for all in results {
                assert_same(&all, &parts.concat(), &format!("{transport:?} of {size}, counts {counts:?}"));
            }
        }
    }
}

#[test]
fn all_to_all_delivers_every_piece_to_its_rank_and_empty_pieces_are_fine() {
    for (transport, size) in every() {
        // The last case sends nothing at all; the one before is large from rank 0 only.
        for case in 0..5 {
            let count = |from: usize, to: usize| match case {
                4 => 0,
                3 if from > 0 => 0,
                3 => 30_000 + to,
                _ => (from * 3 + to * 2 + case) % 4 * (1 + case * 50),
            };
            let ranks = size as usize;
            let piece =
                |from: usize, to: usize| data((case * 100 + from * 10 + to) as u64, from, count(from, to));
            let results = together(group(transport, size, PATIENT), |rank, mut member| {
                let send: Vec<f32> = (0..ranks).flat_map(|to| piece(rank, to)).collect();
                let send_counts: Vec<usize> = (0..ranks).map(|to| count(rank, to)).collect();
                let recv_counts: Vec<usize> = (0..ranks).map(|from| count(from, rank)).collect();
                let mut recv = vec![f32::NAN; recv_counts.iter().sum()];
                member.all_to_all_v(&send, &send_counts, &mut recv, &recv_counts).unwrap();
                recv
            });
            for (rank, recv) in results.iter().enumerate() {
                let expected: Vec<f32> = (0..ranks).flat_map(|from| piece(from, rank)).collect();
                assert_same(recv, &expected, &format!("{transport:?} of {size}, case {case}, rank {rank}"));
            }
        }
    }
}

#[test]
fn every_rank_gets_the_roots_data() {
    for (transport, size) in every() {
        for len in [0, 1, 5, 20_000] {
            let results = together(group(transport, size, PATIENT), |rank, mut member| {
                let mut got = Vec::new();
                for root in 0..size {
                    let mut buffer = data(u64::from(root), rank, len);
                    member.broadcast(root, &mut buffer).unwrap();
                    got.push(buffer);
                }
                got
            });
            for got in results {
                for (root, buffer) in got.iter().enumerate() {
                    let what = format!("{transport:?} of {size}, root {root}");
                    assert_same(buffer, &data(root as u64, root, len), &what);
                }
            }
        }
    }
}

#[test]
fn nobody_passes_a_barrier_before_all_have_arrived() {
    for (transport, size) in every() {
        let arrived = AtomicUsize::new(0);
        together(group(transport, size, PATIENT), |_, mut member| {
            for round in 1..=20 {
                arrived.fetch_add(1, Ordering::SeqCst);
                member.barrier().unwrap();
                assert!(arrived.load(Ordering::SeqCst) >= round * size as usize);
                member.barrier().unwrap();
            }
        });
    }
}

#[test]
fn buffers_larger_than_any_socket_buffer_do_not_deadlock() {
    let len = 3 << 20;
    for (transport, size) in every() {
        let ranks = size as usize;
        together(group(transport, size, PATIENT), |rank, mut member| {
            let mut buffer = vec![rank as f32 + 1.0; len];
            member.all_reduce_sum(&mut buffer).unwrap();
            let total = (1..=ranks).sum::<usize>() as f32;
            assert!(buffer.iter().all(|value| *value == total));
            let counts = vec![len / ranks; ranks];
            let used = counts.iter().sum();
            let mut own = vec![0.0; counts[rank]];
            member.reduce_scatter_sum(&buffer[..used], &counts, &mut own).unwrap();
            assert!(own.iter().all(|value| *value == total * ranks as f32));
            let mut received = vec![0.0; used];
            buffer.fill(rank as f32);
            member.all_to_all_v(&buffer[..used], &counts, &mut received, &counts).unwrap();
            for (from, piece) in received.chunks(counts[0]).enumerate() {
                assert!(piece.iter().all(|value| *value == from as f32));
            }
            member.all_gather(&own, &counts, &mut received).unwrap();
            assert!(received.iter().all(|value| *value == total * ranks as f32));
            buffer.fill(rank as f32 + 5.0);
            member.broadcast(size - 1, &mut buffer).unwrap();
            assert!(buffer.iter().all(|value| *value == size as f32 + 4.0));
        });
    }
}

/// Runs `steps` random operations; the same on every rank but for the data. Returns all results one after the other.
fn random_walk(member: &mut common::Rank, rank: usize, seed: u64, steps: usize) -> Vec<f32> {
    let ranks = member.rank().size().as_usize();
    let mut plan = Random(seed);
    let mut log = Vec::new();
    for step in 0..steps {
        let len = [0, 3, 17, 400, 9001][plan.below(5)];
        let case = seed ^ step as u64;
        let counts: Vec<usize> = (0..ranks).map(|_| plan.below(len + 1)).collect();
        let total = counts.iter().sum();
        let mut out = vec![0.0; total];
        match plan.below(6) {
            0 => {
                out = data(case, rank, len);
                member.all_reduce_sum(&mut out).unwrap();
            }
            1 => {
                out.resize(counts[rank], 0.0);
                member.reduce_scatter_sum(&data(case, rank, total), &counts, &mut out).unwrap();
            }
            2 => member.all_gather(&data(case, rank, counts[rank]), &counts, &mut out).unwrap(),
            3 => {
                // Everyone sends `counts[to]` to rank `to`, so it receives its own count from each.
                let receive = vec![counts[rank]; ranks];
                out.resize(counts[rank] * ranks, 0.0);
                member.all_to_all_v(&data(case, rank, total), &counts, &mut out, &receive).unwrap();
            }
            4 => {
                out = data(case, rank, len);
                member.broadcast(plan.below(ranks) as u32, &mut out).unwrap();
            }
            _ => member.barrier().unwrap(),
        }
        log.append(&mut out);
    }
    log
}

#[test]
fn random_sequences_give_the_same_bits_on_every_transport() {
    for seed in [1, 20, 300] {
        println!("seed {seed}");
        let mut walks: Vec<(u32, Vec<Vec<f32>>)> = Vec::new();
        for (transport, size) in every() {
            let walk = together(group(transport, size, PATIENT), |rank, mut member| {
                random_walk(&mut member, rank, seed, 60)
            });
            match walks.iter().find(|(known, _)| *known == size) {
                None => walks.push((size, walk)),
                Some((_, expected)) => {
                    for (rank, (got, expected)) in walk.iter().zip(expected).enumerate() {
                        let what = format!("seed {seed}, {transport:?} of {size}, rank {rank}");
                        assert_same(got, expected, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn a_rank_knows_its_place() {
    for (transport, size) in every() {
        for (index, member) in group(transport, size, PATIENT).iter().enumerate() {
            assert_eq!(member.rank().as_usize(), index);
            assert_eq!(member.rank().size().get(), size);
        }
    }
}
