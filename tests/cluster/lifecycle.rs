//! Orders to stop under load, a second order, and what is left of a group that failed.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use futures::future::join_all;
use proto::v1::GenerateResponse;
use rustix::process::Signal;
use tonic::{Status, Streaming};

use crate::support::{Cluster, cohort, runs, signal, tokens};

const STREAMS: u32 = 50;
const OUTPUT: u32 = 60;

/// `streams` streams of `output` tokens, each of which has begun.
async fn begun(cluster: &Cluster, streams: u32, output: u32) -> Vec<Streaming<GenerateResponse>> {
    // A connection of its own for each, as callers have.
    let server = &cluster.server();
    let open = (0..streams).map(|index| async move {
        let mut client = proto::v1::cohort_client::CohortClient::connect(server.clone()).await.unwrap();
        let mut stream = client.generate(tokens(&[5, 600 + index], output)).await.unwrap().into_inner();
        assert_eq!(stream.message().await.unwrap().unwrap().token_ids.len(), 1);
        stream
    });
    join_all(open).await
}

/// The tokens of a stream behind its first.
async fn rest(mut stream: Streaming<GenerateResponse>) -> Result<usize, Status> {
    let mut received = 0;
    while let Some(message) = stream.message().await? {
        received += message.token_ids.len();
    }
    Ok(received)
}

/// Fifty streams, an order to stop, and not one of them fails.
fn none_fails(cluster: &Cluster, order: impl FnOnce()) {
    let ended = cluster.block_on(async {
        let streams = begun(cluster, STREAMS, OUTPUT).await;
        order();
        join_all(streams.into_iter().map(rest)).await
    });
    let failed: Vec<_> =
        ended.iter().filter(|end| !matches!(end, Ok(received) if *received == OUTPUT as usize - 1)).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

fn serves_again(cluster: &mut Cluster) {
    let answer =
        cluster.wait("an answer after the restart", |cluster| cluster.generate(tokens(&[5, 600], 3)).ok());
    assert_eq!(answer.token_ids.len(), 3);
}

#[test]
fn sigterm_under_fifty_streams_fails_none_when_the_grace_suffices() {
    let cluster = Cluster::up(&["--tensor-parallel=2", "--drain-grace=60", "--router-drain-grace=60"]);
    none_fails(&cluster, || cluster.signal(Signal::TERM));
    let (status, said) = cluster.end();
    assert_eq!(status.code(), Some(0), "{said}");
}

#[test]
fn sigterm_for_one_of_two_groups_fails_none_of_fifty_streams() {
    // With no grace at all, so that what runs there must go on in the other.
    let cluster = Cluster::up(&["--groups=2", "--drain-grace=0", "--resume-grace=60"]);
    let group = cluster.processes().into_iter().find(|(_, line)| line.contains(" group ")).unwrap().0;
    none_fails(&cluster, || signal(group, Signal::TERM));
}

#[test]
fn a_second_sigterm_ends_a_cluster_at_once() {
    let mut cluster = Cluster::up(&["--tensor-parallel=2", "--drain-grace=60", "--router-drain-grace=60"]);
    let below = cluster.processes();
    let streams = cluster.block_on(begun(&cluster, 12, 2000));
    cluster.signal(Signal::TERM);
    cluster.wait_for_line("stopping; open requests finish first");
    cluster.signal(Signal::TERM);
    let ended = cluster.block_on(join_all(streams.into_iter().map(rest)));
    assert!(ended.iter().any(Result::is_err), "they were all finished: {ended:?}");
    let (status, said) = cluster.end();
    assert_eq!(status.code(), Some(130), "{said}");
    // Their lifelines are cut; the last of them ends a moment later.
    let left = || below.iter().filter(|(pid, _)| runs(*pid)).collect::<Vec<_>>();
    let gone = (0..400).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        left().is_empty()
    });
    assert!(gone, "{:?}", left());
}

/// HTTP/2 from its bytes: a library would hide the frame that this is about. The first GOAWAY on a connection, after
/// `then`, and its error code.
fn goaway(cluster: &Cluster, then: impl FnOnce()) -> [u8; 4] {
    const SETTINGS: u8 = 4;
    const GOAWAY: u8 = 7;
    let mut connection = TcpStream::connect(cluster.server().trim_start_matches("http://")).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    connection.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    connection.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).unwrap();
    let mut next = || {
        let mut head = [0; 9];
        connection.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        connection.read_exact(&mut payload).unwrap();
        (head[3], payload)
    };
    // The server is there.
    assert_eq!(next().0, SETTINGS);
    then();
    let goaway = std::iter::repeat_with(next).find(|(kind, _)| *kind == GOAWAY).unwrap().1;
    goaway[4..8].try_into().unwrap()
}

#[test]
fn an_order_to_stop_sends_goaway_on_open_connections() {
    let cluster = Cluster::up(&["--tensor-parallel=1"]);
    assert_eq!(goaway(&cluster, || cluster.signal(Signal::TERM)), [0; 4], "no error");
    assert_eq!(cluster.end().0.code(), Some(0));
}

#[test]
fn a_connection_that_is_old_enough_gets_goaway_and_its_streams_are_finished() {
    let cluster = Cluster::up(&["--connection-age-max=0.05"]);
    assert_eq!(goaway(&cluster, || {}), [0; 4], "no error");
    // Many times as long as a connection may live.
    let mut client = cluster.client();
    let received = cluster.block_on(async {
        let stream = client.generate(tokens(&[5, 600], 400)).await.unwrap().into_inner();
        rest(stream).await.unwrap()
    });
    assert_eq!(received, 400);
}

#[test]
fn a_killed_group_process_takes_its_ranks_along_and_the_group_comes_back() {
    let mut cluster = Cluster::up(&["--tensor-parallel=2", "--resume-grace=60"]);
    let group = cluster.processes().into_iter().find(|(_, line)| line.contains(" group ")).unwrap().0;
    let ranks = [cluster.rank(0), cluster.rank(1)];
    signal(group, Signal::KILL);
    cluster.wait("the ranks' end", |_| (!ranks.iter().any(|rank| runs(*rank))).then_some(()));
    serves_again(&mut cluster);
}

#[test]
fn the_last_steps_of_a_group_are_shown_while_it_serves_and_written_down_when_it_fails() {
    let place = tempfile::tempdir().unwrap();
    let fault_dir = format!("--fault-dir={}", place.path().display());
    // Whoever asks a group past its router shows the cluster's secret, which only the user of the cluster finds.
    let run_dir = tempfile::tempdir().unwrap();
    let runtime = [("XDG_RUNTIME_DIR", run_dir.path().to_str().unwrap())];
    let mut cluster = Cluster::up_with(&runtime, &["--tensor-parallel=2", "--resume-grace=60", &fault_dir]);
    cluster.generate(tokens(&[5, 600], 20)).unwrap();
    let router = cluster.processes().into_iter().find(|(_, line)| line.contains(" router ")).unwrap().1;
    let leader = router.split("--workers=").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    let show = |flags: &[&str]| {
        let mut asking = cohort(&[&["debug", "steps"], flags].concat());
        let shown = asking.envs(runtime).output().unwrap();
        assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
        String::from_utf8(shown.stdout).unwrap()
    };
    // It is the only one here, so it need not be named.
    let table = show(&["--last=5"]);
    assert_eq!(table, show(&["--last=5", "--worker", &leader]));
    let stranger = cohort(&["debug", "steps", "--worker", &leader]).output().unwrap();
    assert!(!stranger.status.success(), "without the secret");
    assert_eq!(table.lines().count(), 6, "{table}");
    assert!(table.lines().next().unwrap().contains("step µs"), "{table}");
    let lines: Vec<serde_json::Value> =
        show(&["--last=19", "--json"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 19);
    assert!(lines.iter().all(|step| step["decode_rows"] == 1 && step["step_us"].is_u64()), "{lines:?}");

    signal(cluster.rank(1), Signal::KILL);
    let (head, written) = cluster.wait("the last steps", |_| {
        let mut files = std::fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().path());
        let text = std::fs::read_to_string(files.next()?).unwrap();
        let head: serde_json::Value = serde_json::from_str(text.lines().next()?).ok()?;
        let all = text.ends_with('\n') && head["steps"] == text.lines().count() - 1;
        all.then_some((head, text))
    });
    assert!(head["fault"].as_str().unwrap().contains("rank 1"), "{head}");
    assert!(written.lines().count() > 20, "{written}");
    serves_again(&mut cluster);
}
