//! What the contract says about ranks that leave, come late, differ or give up, on every transport.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use collectives::{Cause, Collective, Error, Fault, Op, TcpOptions};
use common::{
    PATIENT, Rank, Transport, faulty_group, group, tcp_group, tcp_group_with, together, with_at_least,
};

/// Far below [`PATIENT`]: whoever takes longer has waited for a deadline.
const AT_ONCE: Duration = Duration::from_secs(20);

/// Runs one operation of kind `op` on small uneven buffers that are right for every rank.
fn perform(op: Op, rank: usize, member: &mut Rank) -> Result<(), Error> {
    let ranks = member.rank().size().as_usize();
    let counts: Vec<usize> = (1..=ranks).collect();
    let total = counts.iter().sum();
    match op {
        Op::AllReduce => member.all_reduce_sum(&mut [1.0; 5]),
        Op::ReduceScatter => {
            member.reduce_scatter_sum(&vec![1.0; total], &counts, &mut vec![0.0; counts[rank]])
        }
        Op::AllGather => member.all_gather(&vec![1.0; counts[rank]], &counts, &mut vec![0.0; total]),
        Op::AllToAll => {
            let receive = vec![counts[rank]; ranks];
            let mut into = vec![0.0; counts[rank] * ranks];
            member.all_to_all_v(&vec![1.0; total], &counts, &mut into, &receive)
        }
        Op::Broadcast => member.broadcast(0, &mut [1.0; 5]),
        Op::Barrier => member.barrier(),
    }
}

#[test]
fn a_rank_that_leaves_is_named_and_nobody_hangs() {
    for (transport, size) in with_at_least(2) {
        for op in Op::ALL {
            let leaver = size - 1;
            let members = faulty_group((transport, size), PATIENT, leaver, (Fault::Leave, 3));
            let started = Instant::now();
            let results = together(members, |rank, mut member| {
                for _ in 0..2 {
                    perform(op, rank, &mut member).unwrap();
                }
                (perform(op, rank, &mut member), perform(op, rank, &mut member))
            });
            assert!(started.elapsed() < AT_ONCE, "{transport:?} of {size}: waited for a deadline");
            for (first, later) in results {
                let lost = Err(Error::PeerLost { rank: leaver, collective: op.name() });
                assert_eq!(first, lost, "{transport:?} of {size}, {op}");
                assert_eq!(later, first, "{transport:?} of {size}, {op}: a failed group stays failed");
            }
        }
    }
}

#[test]
fn a_rank_that_leaves_after_its_last_operation_harms_nobody() {
    for (transport, size) in with_at_least(2) {
        for _ in 0..20 {
            together(group(transport, size, PATIENT), |rank, mut member| {
                for op in Op::ALL {
                    perform(op, rank, &mut member).unwrap();
                }
            });
        }
    }
}

#[test]
fn a_count_that_differs_is_a_mismatch_that_names_the_rank() {
    for (transport, size) in with_at_least(2) {
        for op in Op::ALL {
            let members = faulty_group((transport, size), PATIENT, 0, (Fault::CorruptCount, 2));
            let results = together(members, |rank, mut member| {
                perform(op, rank, &mut member).unwrap();
                perform(op, rank, &mut member)
            });
            let what = format!("{transport:?} of {size}, {op}: {results:?}");
            let named = |result: &Result<(), Error>| matches!(result, Err(Error::Mismatch { rank: 0, .. }));
            assert!(results[1..].iter().any(named), "{what}");
            for result in results {
                let fair = match &result {
                    Ok(()) => op == Op::AllToAll,
                    Err(Error::Mismatch { .. } | Error::Aborted { cause: Cause::Mismatch(_), .. }) => true,
                    Err(_) => false,
                };
                assert!(fair, "{what}");
            }
        }
    }
}

#[test]
fn two_ranks_of_different_sizes_name_each_other_with_both_sizes() {
    for transport in [Transport::InProcess, Transport::Tcp] {
        let results = together(group(transport, 2, PATIENT), |rank, mut member| {
            member.all_reduce_sum(&mut vec![1.0; 10 + rank])
        });
        for (rank, result) in results.into_iter().enumerate() {
            let expected = Error::Mismatch {
                rank: 1 - rank as u32,
                collective: "all_reduce_sum",
                what: "total count",
                ours: (10 + rank).to_string(),
                theirs: (11 - rank).to_string(),
            };
            assert_eq!(result, Err(expected), "{transport:?}");
        }
    }
}

#[test]
fn two_ranks_in_different_operations_name_both() {
    for transport in [Transport::InProcess, Transport::Tcp] {
        for (first, second) in [(Op::AllReduce, Op::Barrier), (Op::AllGather, Op::Broadcast)] {
            let results = together(group(transport, 2, PATIENT), |rank, mut member| {
                perform([first, second][rank], rank, &mut member)
            });
            let Err(Error::Mismatch { rank: 1, what: "operation", ours, theirs, .. }) = &results[0] else {
                panic!("{transport:?}: {results:?}");
            };
            assert_eq!((ours.as_str(), theirs.as_str()), (first.name(), second.name()));
            assert!(matches!(&results[1], Err(Error::Mismatch { rank: 0, what: "operation", .. })));
        }
    }
}

#[test]
fn two_ranks_with_different_roots_find_out() {
    for transport in [Transport::InProcess, Transport::Tcp] {
        let results = together(group(transport, 2, PATIENT), |rank, mut member| {
            member.broadcast(rank as u32, &mut [0.0; 3])
        });
        for result in results {
            assert!(
                matches!(&result, Err(Error::Mismatch { what: "root", .. })),
                "{transport:?}: {result:?}"
            );
        }
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_after_the_deadline() {
    let deadline = Duration::from_millis(200);
    for (transport, size) in with_at_least(2) {
        let absent = size as usize - 1;
        let (done, all_done) = mpsc::channel();
        let all_done = std::sync::Mutex::new(all_done);
        let results = together(group(transport, size, deadline), |rank, mut member| {
            member.barrier().unwrap();
            if rank == absent {
                // Stays a member, but does not come, until the others have given up.
                let waiting = all_done.lock().unwrap();
                for _ in 0..absent {
                    waiting.recv().unwrap();
                }
                // What the others had sent before may still be enough for this operation, but not for the next.
                return (0..2).try_for_each(|_| member.all_reduce_sum(&mut [0.0; 9]));
            }
            let result = member.all_reduce_sum(&mut [0.0; 9]);
            done.send(()).unwrap();
            result
        });
        let what = format!("{transport:?} of {size}: {results:?}");
        let named = Error::Deadline {
            rank: absent as u32,
            collective: "all_reduce_sum",
            sequence: 2,
            after: deadline,
        };
        assert!(results.contains(&Err(named)), "{what}");
        for result in &results {
            assert_eq!(result.as_ref().unwrap_err().culprit(), Some(absent as u32), "{what}");
        }
    }
}

#[test]
fn a_rank_that_hangs_runs_the_others_into_their_deadline() {
    let fault = Fault::Hang(Duration::from_millis(600));
    for transport in [Transport::InProcess, Transport::Tcp] {
        let members = faulty_group((transport, 3), Duration::from_millis(150), 1, (fault, 2));
        let results = together(members, |_, mut member| {
            member.barrier().unwrap();
            member.barrier()
        });
        for result in &results {
            assert_eq!(result.as_ref().unwrap_err().culprit(), Some(1), "{transport:?}: {results:?}");
        }
    }
}

#[test]
fn a_late_rank_is_waited_for() {
    for (transport, size) in with_at_least(1) {
        let late = (Fault::Delay(Duration::from_millis(30)), 2);
        together(faulty_group((transport, size), PATIENT, 0, late), |_, mut member| {
            for _ in 0..3 {
                let mut buffer = [1.0; 3];
                member.all_reduce_sum(&mut buffer).unwrap();
                assert_eq!(buffer, [size as f32; 3]);
            }
        });
    }
}

#[test]
fn an_abort_wakes_every_blocked_rank() {
    for (transport, size) in with_at_least(1) {
        let last = size as usize - 1;
        let started = Instant::now();
        let results = together(group(transport, size, PATIENT), |rank, mut member| {
            member.barrier().unwrap();
            if rank == last {
                member.abort();
            }
            // A buffer far larger than the sockets hold, so the others block in the middle of their frames.
            member.all_reduce_sum(&mut vec![0.0; 1 << 20])
        });
        assert!(started.elapsed() < AT_ONCE, "{transport:?} of {size}: waited for a deadline");
        for result in results {
            assert!(
                matches!(&result, Err(Error::Aborted { cause: Cause::Asked, .. })),
                "{transport:?} of {size}: {result:?}"
            );
        }
    }
}

#[test]
fn an_abort_handle_ends_an_operation_that_is_blocked_in_another_thread() {
    let mut group: Vec<_> = tcp_group(3, PATIENT).into_iter().map(|joined| joined.collective).collect();
    let idle = group.pop().unwrap();
    let handle = group[0].abort_handle();
    let started = Instant::now();
    let results = std::thread::scope(|scope| {
        let blocked: Vec<_> = group.iter_mut().map(|member| scope.spawn(|| member.barrier())).collect();
        handle.abort();
        blocked.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(started.elapsed() < AT_ONCE);
    let aborted = Err(Error::Aborted { rank: 0, cause: Cause::Asked });
    assert_eq!(results, [aborted.clone(), aborted]);
    drop(idle);
}

#[test]
fn a_rank_that_gives_up_in_the_middle_of_its_frames_says_why() {
    let options = |rank| {
        let hurried = Duration::from_millis(1);
        let deadline = if rank == 2 { hurried } else { PATIENT };
        collectives::RendezvousOptions {
            within: PATIENT,
            tcp: TcpOptions { deadline, ..TcpOptions::default() },
            secret: None,
        }
    };
    let started = Instant::now();
    let results = together(tcp_group_with(3, options), |_, mut joined| {
        joined.collective.all_reduce_sum(&mut vec![1.0; 16 << 20])
    });
    assert!(started.elapsed() < AT_ONCE);
    assert!(matches!(results[2], Err(Error::Deadline { .. })), "{results:?}");
    for result in &results[..2] {
        assert!(matches!(result, Err(Error::Aborted { cause: Cause::Late(_), .. })), "{results:?}");
    }
}

/// An operation on a group of so many ranks.
type Call = fn(&mut Rank, usize) -> Result<(), Error>;

#[test]
fn arguments_that_do_not_fit_each_other_are_refused_with_the_right_value() {
    for (transport, size) in with_at_least(1) {
        let ranks = size as usize;
        let wrong: [(&str, Call); 5] = [
            ("counts", |member, ranks| member.all_gather(&[], &vec![0; ranks + 1], &mut [])),
            ("length of the output", |member, ranks| {
                member.all_gather(&[1.0], &vec![1; ranks], &mut vec![0.0; ranks + 1])
            }),
            ("length of the input", |member, ranks| {
                member.reduce_scatter_sum(&vec![0.0; ranks + 2], &vec![1; ranks], &mut [0.0])
            }),
            ("root", |member, ranks| member.broadcast(ranks as u32, &mut [0.0])),
            ("counts", |member, ranks| {
                let mut counts = vec![0; ranks];
                counts[0] = usize::MAX;
                counts.push(1);
                member.all_gather(&[], &counts, &mut [])
            }),
        ];
        for (what, call) in wrong {
            let results = together(group(transport, size, PATIENT), |_, mut member| call(&mut member, ranks));
            for result in results {
                let fair = match &result {
                    Err(Error::Argument { what: argument, .. }) => *argument == what,
                    Err(Error::Aborted { cause: Cause::Failed, .. }) => size > 1,
                    _ => false,
                };
                assert!(fair, "{transport:?} of {size}, {what}: {result:?}");
            }
        }
    }
}
