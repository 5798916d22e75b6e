//! Processes die: clients get a status, the group comes back, nothing stays behind.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tonic::Code;

use crate::support::{Cluster, runs, signal, tokens};

/// How long anything may stay behind after its supervisor was killed.
const ORPHAN_MAX: Duration = Duration::from_secs(2);

fn killed_rank_ends_its_group(rank: u32, plan: &[&str]) {
    let mut cluster = Cluster::up(&[plan, &["--resume-grace=0"]].concat());
    let mut client = cluster.client();
    let victim = cluster.rank(rank);
    let status = cluster.block_on(async {
        let mut stream = client.generate(tokens(&[5, 600], 2000)).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap();
        signal(victim, Signal::KILL);
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("a stream without an end"),
                Err(status) => return status,
            }
        }
    });
    assert!(matches!(status.code(), Code::Aborted | Code::Unavailable), "{status:?}");
    cluster.wait_for_line(&format!("rank {rank}"));
    // The supervisor starts the group again, and it serves.
    let answer =
        cluster.wait("an answer after the restart", |cluster| cluster.generate(tokens(&[5, 600], 3)).ok());
    assert_eq!(answer.token_ids.len(), 3);
    assert!(!runs(victim));
}

#[test]
fn a_killed_follower_ends_its_group_with_a_status_and_the_group_comes_back() {
    killed_rank_ends_its_group(1, &["--tensor-parallel=2"]);
}

#[test]
fn a_killed_leader_ends_its_group_with_a_status_and_the_group_comes_back() {
    killed_rank_ends_its_group(0, &["--tensor-parallel=2"]);
}

#[test]
fn a_killed_rank_of_a_sub_group_ends_all_of_them_with_a_status_and_they_come_back() {
    // The only request runs in the first sub-group; rank 3 is in the second and has no rows.
    let plan = ["--tensor-parallel=2", "--data-parallel=2", "--experts=expert"];
    killed_rank_ends_its_group(3, &plan);
}

#[test]
fn a_rank_that_dies_while_nothing_runs_is_noticed() {
    let mut cluster = Cluster::up(&["--tensor-parallel=2"]);
    let (leader, follower) = (cluster.rank(0), cluster.rank(1));
    signal(follower, Signal::KILL);
    cluster.wait("the leader's end", |_| (!runs(leader)).then_some(()));
    cluster.wait("an answer after the restart", |cluster| cluster.generate(tokens(&[5, 600], 3)).ok());
    assert!(cluster.said().contains("rank 1"), "{}", cluster.said());
}

#[test]
fn a_killed_router_comes_back_at_the_same_address() {
    let mut cluster = Cluster::up(&["--tensor-parallel=1"]);
    let router = cluster.processes().into_iter().find(|(_, line)| line.contains(" router ")).unwrap().0;
    signal(router, Signal::KILL);
    cluster.wait("the router's end", |_| (!runs(router)).then_some(()));
    let again = cluster.wait("an answer", |cluster| {
        let address = cluster.server();
        let request = tokens(&[5, 600], 3);
        cluster.block_on(async {
            let mut client = proto::v1::cohort_client::CohortClient::connect(address).await.ok()?;
            client.generate_once(request).await.ok()
        })
    });
    assert_eq!(again.into_inner().token_ids.len(), 3);
}

/// A rank that hangs keeps its connections; only the deadline of the collective finds it.
#[test]
fn a_rank_that_hangs_is_named_by_the_step_deadline_and_the_group_comes_back() {
    let mut cluster = Cluster::up(&["--tensor-parallel=2", "--step-timeout=1", "--resume-grace=0"]);
    let mut client = cluster.client();
    let victim = cluster.rank(1);
    let status = cluster.block_on(async {
        let mut stream = client.generate(tokens(&[5, 600], 2000)).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap();
        signal(victim, Signal::STOP);
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("a stream without an end"),
                Err(status) => return status,
            }
        }
    });
    assert!(status.message().contains("rank 1"), "{status:?}");
    let answer =
        cluster.wait("an answer after the restart", |cluster| cluster.generate(tokens(&[5, 600], 3)).ok());
    assert_eq!(answer.token_ids.len(), 3);
    assert!(!runs(victim), "the hanging rank is still there");
}

/// Nobody waits for it in a collective: only its silence tells.
#[test]
fn a_leader_that_hangs_while_nothing_runs_is_replaced() {
    let mut cluster = Cluster::up(&["--tensor-parallel=1"]);
    let victim = cluster.rank(0);
    signal(victim, Signal::STOP);
    cluster.wait("the end of the hanging leader", |_| (!runs(victim)).then_some(()));
    cluster.wait_for_line("gave no sign of life");
    let answer =
        cluster.wait("an answer after the restart", |cluster| cluster.generate(tokens(&[5, 600], 3)).ok());
    assert_eq!(answer.token_ids.len(), 3);
}

/// Kills one supervisor and expects everything below it gone in time.
fn leaves_nothing_behind(victim: u32, below: &[(u32, String)]) {
    signal(victim, Signal::KILL);
    let since = Instant::now();
    loop {
        let left: Vec<_> = below.iter().filter(|(pid, _)| runs(*pid)).collect();
        if left.is_empty() {
            return;
        }
        assert!(since.elapsed() < ORPHAN_MAX, "still there after {ORPHAN_MAX:?}: {left:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_killed_supervisor_leaves_no_process_behind() {
    let cluster = Cluster::up(&["--tensor-parallel=2", "--groups=2"]);
    let below = cluster.processes();
    let ranks = below.iter().filter(|(_, line)| line.contains(" worker ")).count();
    assert_eq!((below.len(), ranks), (7, 4), "two groups of two ranks and a router: {below:?}");
    let up = parent_of(below[0].0);
    leaves_nothing_behind(up, &below);
}

#[test]
fn a_killed_supervisor_leaves_no_process_behind_while_requests_run() {
    let cluster = Cluster::up(&["--tensor-parallel=2"]);
    let mut client = cluster.client();
    let below = cluster.processes();
    let up = parent_of(below[0].0);
    let status = cluster.block_on(async {
        let mut stream = client.generate(tokens(&[5, 600], 2000)).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap();
        leaves_nothing_behind(up, &below);
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("a stream without an end"),
                Err(status) => return status,
            }
        }
    });
    assert_ne!(status.code(), Code::Ok);
}

fn parent_of(pid: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("PPid:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
