//! The cluster's secret is changed while requests run, and none of them fails.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proto::v1::cohort_client::CohortClient;
use proto::worker::CancelRequest;
use proto::worker::worker_client::WorkerClient;
use rustix::process::Signal;
use security::{Badge, Secret};
use tonic::Code;
use tonic::transport::Channel;

use crate::support::{Cluster, signal, tokens};

/// Processes that read the file: the supervisor, the router and two leaders.
const READERS: usize = 4;

fn lines_with(cluster: &Cluster, text: &str) -> usize {
    cluster.said().lines().filter(|line| line.contains(text)).count()
}

#[test]
fn a_secret_is_changed_in_three_steps_while_requests_run_and_none_of_them_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("secret");
    let (old, new) = (Secret::random().unwrap(), Secret::random().unwrap());
    let lines =
        |secrets: &[&Secret]| secrets.iter().map(|one| format!("{}\n", one.expose())).collect::<String>();
    fs::write(&path, lines(&[&old])).unwrap();
    let flag = format!("--cluster-secret-file={}", path.display());
    let mut cluster = Cluster::up(&["--groups=2", "--log-level=info", &flag]);
    cluster.wait("both groups in use", |cluster| {
        (lines_with(cluster, "a router uses this group") == 2).then_some(())
    });
    let enough = Arc::new(AtomicBool::new(false));
    let (server, until) = (cluster.server(), Arc::clone(&enough));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let asking = runtime.spawn(async move {
        let mut client = CohortClient::connect(server).await.unwrap();
        let mut answered = 0;
        while !until.load(Ordering::Relaxed) {
            client.generate_once(tokens(&[5, 600], 20)).await?;
            answered += 1;
        }
        Ok::<_, tonic::Status>(answered)
    });
    for (step, secrets) in [[&old, &new].as_slice(), &[&new, &old], &[&new]].into_iter().enumerate() {
        // At once: a file that is seen half written would be one more that is read.
        let next = dir.path().join("next");
        fs::write(&next, lines(secrets)).unwrap();
        fs::rename(&next, &path).unwrap();
        cluster.wait("every process has read the file", |cluster| {
            (lines_with(cluster, "the cluster's secret") == READERS * (step + 1)).then_some(())
        });
    }
    // A group that is started again belongs to the cluster as it is now.
    signal(cluster.rank(0), Signal::KILL);
    cluster.wait("the group is back", |cluster| {
        (lines_with(cluster, "a router uses this group") >= 3).then_some(())
    });
    enough.store(true, Ordering::Relaxed);
    let answered = cluster.block_on(asking).unwrap();
    assert!(answered.as_ref().is_ok_and(|answered| *answered > 0), "{answered:?}");
    let leader = cluster
        .processes()
        .into_iter()
        .find_map(|(_, line)| line.split("--workers=").nth(1)?.split([',', ' ']).next().map(str::to_owned));
    cluster.block_on(async {
        let channel = Channel::from_shared(leader.unwrap()).unwrap().connect().await.unwrap();
        let call = async |secret: &Secret| {
            let badge = Badge::new(Some(&secret.clone().into()));
            WorkerClient::with_interceptor(channel.clone(), badge).cancel(CancelRequest::default()).await
        };
        assert_eq!(call(&old).await.map(drop).unwrap_err().code(), Code::Unauthenticated);
        call(&new).await.unwrap();
    });
}
