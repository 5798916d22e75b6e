//! A leader takes calls of its own cluster only.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::time::Duration;

use proto::Failure;
use proto::worker::worker_client::WorkerClient;
use proto::worker::{CancelRequest, WatchRequest};
use security::{Badge, Secret, SharedSecret};
use support::{Rank, config};
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use worker::{Access, Config};

/// Longest wait for a file to be read again, which is done every second.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_secret_that_changes_in_its_file_is_taken_without_a_restart_and_the_old_one_for_as_long_as_it_stands_there()
 {
    let (old, new) = (Secret::random().unwrap(), Secret::random().unwrap());
    let file = tempfile::NamedTempFile::new().unwrap();
    let write = |lines: &[&Secret]| {
        let text: String = lines.iter().map(|secret| format!("{}\n", secret.expose())).collect();
        std::fs::write(file.path(), text).unwrap();
    };
    write(&[&old]);
    let access = Access { secret: Some(SharedSecret::open(file.path()).unwrap()), ..Access::default() };
    let leader = Rank::start(Config { access, ..config(0, 1) });
    let address = leader.listening();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let taken = async |secret: &Secret| {
            let badge = Badge::new(Some(&secret.clone().into()));
            let mut client = WorkerClient::with_interceptor(channel.clone(), badge);
            client.cancel(CancelRequest::default()).await.is_ok()
        };
        let until = async |secret: &Secret, wanted: bool| {
            let changes = async { while taken(secret).await != wanted {} };
            tokio::time::timeout(PATIENCE, changes).await.expect("the file is read again");
        };
        let old_badge = Badge::new(Some(&old.clone().into()));
        let mut watcher = WorkerClient::with_interceptor(channel.clone(), old_badge);
        let mut states = watcher.watch(WatchRequest::default()).await.unwrap().into_inner();
        assert!(taken(&old).await && !taken(&new).await);
        write(&[&old, &new]);
        until(&new, true).await;
        assert!(taken(&old).await, "both are taken");
        write(&[&new]);
        until(&old, false).await;
        assert!(taken(&new).await);
        // What was open before goes on.
        assert!(states.message().await.unwrap().is_some());
    });
    leader.ready();
    leader.shutdown.cancel();
    leader.end().unwrap();
}

#[test]
fn only_those_who_show_the_cluster_s_secret_reach_a_leader() {
    let random = || SharedSecret::from(Secret::random().unwrap());
    let (secret, other) = (random(), random());
    let access = Access { secret: Some(secret.clone()), ..Access::default() };
    let leader = Rank::start(Config { access, ..config(0, 1) });
    let address = leader.listening();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        for stranger in [None, Some(&other)] {
            let mut client = WorkerClient::with_interceptor(channel.clone(), Badge::new(stranger));
            let watched = client.watch(WatchRequest::default()).await.map(drop).unwrap_err();
            let cancelled = client.cancel(CancelRequest::default()).await.map(drop).unwrap_err();
            for status in [watched, cancelled] {
                assert_eq!(status.code(), Code::Unauthenticated, "{status}");
                let failure = Failure::from_status(&status).unwrap().to_string();
                assert!(failure.contains("cluster.secret_file"), "{failure}");
            }
        }
        let mut member = WorkerClient::with_interceptor(channel.clone(), Badge::new(Some(&secret)));
        let state = member.watch(WatchRequest::default()).await.unwrap().into_inner().message().await;
        assert!(state.unwrap().is_some());
        // Probes are nobody's members.
        HealthClient::new(channel).check(HealthCheckRequest { service: "live".to_owned() }).await.unwrap();
    });
    leader.ready();
    leader.shutdown.cancel();
    leader.end().unwrap();
}
