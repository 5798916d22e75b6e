//! Sub-groups of a group: they run operations of their own at the same time, and end together.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::time::{Duration, Instant};

use collectives::{Collective, Error, InProcess, Op, Solo, Tcp};
use common::{PATIENT, tcp_group, together};
use types::TpSize;

/// A whole group and the sub-groups of `each` ranks, on both transports that have several.
fn split<C: Collective<[f32]>>(
    whole: Vec<C>,
    each: u32,
    split: impl Fn(&C, TpSize) -> Result<C, Error>,
) -> Vec<(C, C)> {
    let size = TpSize::new(each).unwrap();
    whole
        .into_iter()
        .map(|whole| (split(&whole, size).unwrap(), whole))
        .map(|(own, whole)| (whole, own))
        .collect()
}

fn threads(size: u32, each: u32, deadline: Duration) -> Vec<(InProcess, InProcess)> {
    split(InProcess::group(TpSize::new(size).unwrap(), deadline), each, InProcess::split)
}

fn processes(size: u32, each: u32, deadline: Duration) -> Vec<(Tcp, Tcp)> {
    let whole = tcp_group(size, deadline).into_iter().map(|joined| joined.collective).collect();
    split(whole, each, Tcp::split)
}

/// Sub-groups take different numbers of steps between two operations of the whole group.
fn walk<C: Collective<[f32]>>(rank: usize, each: usize, (mut whole, mut own): (C, C)) {
    let (subgroup, size) = (rank / each, whole.rank().size().as_usize());
    assert_eq!((own.rank().as_usize(), own.rank().size().as_usize()), (rank % each, each));
    for round in 0..20 {
        for _ in 0..(round + subgroup) % 4 {
            let mut data = vec![rank as f32; 3 + subgroup];
            own.all_reduce_sum(&mut data).unwrap();
            let expected: usize = (subgroup * each..(subgroup + 1) * each).sum();
            assert!(data.iter().all(|sum| *sum == expected as f32), "rank {rank}: {data:?}");
            let mut all = vec![0.0; each];
            own.all_gather(&[rank as f32], &vec![1; each], &mut all).unwrap();
            assert_eq!(all, (subgroup * each..(subgroup + 1) * each).map(|r| r as f32).collect::<Vec<_>>());
        }
        let (send, mut recv, mut came) = (vec![rank as f32; size], vec![0.0; 2 * size], vec![0; size]);
        whole.all_to_all_open(&send, &vec![1; size], &mut recv, &vec![2; size], &mut came).unwrap();
        assert_eq!(recv[..size], (0..size).map(|r| r as f32).collect::<Vec<_>>());
    }
    let reduced = own.counters().of(Op::AllReduce);
    assert_eq!(whole.counters().of(Op::AllReduce).ops, 0);
    assert_eq!(whole.counters().of(Op::AllToAll).ops, 20);
    assert_eq!(reduced.messages_sent, reduced.ops * (each as u64 - 1));
}

#[test]
fn subgroups_work_side_by_side_and_meet_in_the_whole_group() {
    for (size, each) in [(4, 2), (4, 1), (4, 4), (6, 3), (8, 2)] {
        together(threads(size, each, PATIENT), |rank, pair| walk(rank, each as usize, pair));
        together(processes(size, each, PATIENT), |rank, pair| walk(rank, each as usize, pair));
    }
}

#[test]
fn a_group_only_splits_evenly() {
    let whole = InProcess::group(TpSize::new(4).unwrap(), PATIENT).remove(1);
    let refused = whole.split(TpSize::new(3).unwrap()).map(|_| ());
    assert!(matches!(refused, Err(Error::Argument { collective: "split", got: 3, .. })), "{refused:?}");
    assert!(Solo::new().split(TpSize::new(2).unwrap()).is_err());
    Solo::new().split(TpSize::ONE).unwrap();
}

/// Rank 3 is gone: its sub-group notices, and the other, which does not talk to it, is told at once.
fn lose_one<C: Collective<[f32]> + Send>(members: Vec<(C, C)>) {
    let started = Instant::now();
    let results = together(members, |rank, (mut whole, mut own)| {
        whole.barrier().unwrap();
        if rank == 3 {
            return None;
        }
        let first = own.all_reduce_sum(&mut [1.0]);
        Some(first.and_then(|()| whole.barrier()))
    });
    assert!(started.elapsed() < Duration::from_secs(20), "waited for a deadline");
    for (rank, result) in results.into_iter().enumerate().take(3) {
        let error = result.unwrap().unwrap_err();
        assert_eq!(error.culprit(), Some(3), "rank {rank}: {error}");
    }
}

#[test]
fn a_rank_that_leaves_ends_every_subgroup_and_is_named_by_its_number_in_the_whole_group() {
    lose_one(threads(4, 2, PATIENT));
    lose_one(processes(4, 2, PATIENT));
}

#[test]
fn a_rank_that_is_late_in_a_subgroup_is_named_by_its_number_in_the_whole_group() {
    fn late<C: Collective<[f32]> + Send>(members: Vec<(C, C)>) {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let done = std::sync::Mutex::new(Some(done));
        let results = together(members, |rank, (_whole, mut own)| match rank {
            3 => {
                let _ = wait.lock().unwrap().recv();
                None
            }
            2 => {
                let outcome = own.all_reduce_sum(&mut [1.0]);
                drop(done.lock().unwrap().take());
                Some(outcome)
            }
            _ => Some(own.all_reduce_sum(&mut [1.0])),
        });
        let error = results[2].clone().unwrap().unwrap_err();
        let collective = Op::AllReduce.name();
        assert!(
            matches!(&error, Error::Deadline { rank: 3, collective: c, sequence: 1, .. } if *c == collective),
            "{error:?}"
        );
    }
    late(threads(4, 2, Duration::from_millis(200)));
    late(processes(4, 2, Duration::from_millis(200)));
}
