//! The plan channel between the leader and its followers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::time::{Duration, Instant};

use collectives::{Error, Joined, PLAN_BYTES_MAX, PlanChannel, PlanReceiver, PlanSender};
use common::{PATIENT, Random, tcp_group};

/// The leader's end and the followers' ends, with the collectives kept alive beside them.
fn channel(size: u32) -> (PlanSender, Vec<PlanReceiver>, Vec<collectives::Tcp>) {
    let mut leader = None;
    let mut followers = Vec::new();
    let mut collectives = Vec::new();
    for Joined { collective, plan } in tcp_group(size, PATIENT) {
        collectives.push(collective);
        match plan {
            PlanChannel::Leader(sender) => leader = Some(sender),
            PlanChannel::Follower(receiver) => followers.push(receiver),
        }
    }
    (leader.unwrap(), followers, collectives)
}

#[test]
fn every_follower_gets_every_plan_in_order() {
    let seed = 77;
    println!("seed {seed}");
    let plans: Vec<Vec<u8>> = {
        let mut random = Random(seed);
        // Empty, small, and larger than a socket holds.
        let lengths = [0, 1, 100, 5_000_000, 3, 0, 70_000];
        lengths.map(|len| (0..len).map(|_| random.next() as u8).collect()).into()
    };
    let (mut leader, followers, _collectives) = channel(4);
    std::thread::scope(|scope| {
        for mut follower in followers {
            let plans = &plans;
            scope.spawn(move || {
                let mut buf = vec![1, 2, 3];
                for plan in plans {
                    follower.recv(&mut buf).unwrap();
                    assert!(buf == *plan, "a plan of {} bytes came as {}", plan.len(), buf.len());
                }
            });
        }
        for plan in &plans {
            leader.send(plan).unwrap();
        }
    });
}

#[test]
fn a_leader_that_leaves_ends_the_wait_of_its_followers_at_once() {
    let (mut leader, followers, _collectives) = channel(3);
    let started = Instant::now();
    leader.send(b"last").unwrap();
    std::thread::scope(|scope| {
        for mut follower in followers {
            scope.spawn(move || {
                let mut buf = Vec::new();
                follower.recv(&mut buf).unwrap();
                assert_eq!(buf, b"last");
                let lost = Err(Error::PeerLost { rank: 0, collective: "step plan" });
                assert_eq!(follower.recv(&mut buf), lost);
                assert_eq!(follower.recv(&mut buf), lost);
            });
        }
        drop(leader);
    });
    assert!(started.elapsed() < PATIENT / 2);
}

#[test]
fn a_follower_that_hangs_up_waits_no_more_and_is_seen_to_be_gone() {
    let (leader, mut followers, _collectives) = channel(2);
    let mut follower = followers.pop().unwrap();
    let hang_up = follower.hang_up().unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(move || follower.recv(&mut Vec::new()));
        hang_up.hang_up();
        assert_eq!(waits.join().unwrap(), Err(Error::PeerLost { rank: 0, collective: "step plan" }));
    });
    assert_eq!(leader.watch().unwrap().wait(PATIENT), Ok(Some(1)));
}

#[test]
fn an_idle_leader_notices_which_follower_is_lost() {
    let (mut leader, mut followers, _collectives) = channel(3);
    let watch = leader.watch().unwrap();
    assert_eq!(leader.lost(), None);
    assert_eq!(watch.wait(Duration::ZERO), Ok(None));
    drop(followers.pop());
    assert_eq!(watch.wait(PATIENT), Ok(Some(2)));
    assert_eq!(leader.lost(), Some(2));
}

#[test]
fn sending_to_a_lost_follower_names_it_and_the_channel_stays_failed() {
    let (mut leader, mut followers, _collectives) = channel(3);
    let watch = leader.watch().unwrap();
    drop(followers.pop());
    assert_eq!(watch.wait(PATIENT), Ok(Some(2)));
    // The system may still take the first frame after the close.
    let error = (0..1000).find_map(|_| leader.send(&[0; 4096]).err());
    assert_eq!(error, Some(Error::PeerLost { rank: 2, collective: "step plan" }));
    assert_eq!(leader.send(b"again").err(), error);
}

#[test]
fn a_watch_ends_when_the_leader_goes() {
    let (leader, _followers, _collectives) = channel(2);
    let watch = leader.watch().unwrap();
    drop(leader);
    assert_eq!(watch.wait(PATIENT), Ok(Some(1)));
}

#[test]
fn a_plan_above_the_limit_is_refused_and_the_channel_goes_on() {
    let (mut leader, mut followers, _collectives) = channel(2);
    let error = leader.send(&vec![0; PLAN_BYTES_MAX + 1]).unwrap_err();
    assert!(matches!(error, Error::TooLarge { bytes, max, .. } if bytes == max + 1), "{error}");
    leader.send(b"small").unwrap();
    let mut buf = Vec::new();
    followers[0].recv(&mut buf).unwrap();
    assert_eq!(buf, b"small");
}

#[test]
fn a_follower_that_never_reads_is_named_after_the_deadline() {
    let group = tcp_group(2, Duration::from_millis(100));
    let mut plans: Vec<_> = group.into_iter().map(|joined| joined.plan).collect();
    let follower = plans.pop();
    let Some(PlanChannel::Leader(mut leader)) = plans.pop() else { panic!("rank 0 leads") };
    let error = (0..64).find_map(|_| leader.send(&vec![0; 4 << 20]).err());
    assert!(matches!(error, Some(Error::Deadline { rank: 1, collective: "step plan", .. })), "{error:?}");
    drop(follower);
}
