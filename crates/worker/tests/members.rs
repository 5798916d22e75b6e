//! A leader takes calls of its own cluster only.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use proto::Failure;
use proto::worker::worker_client::WorkerClient;
use proto::worker::{CancelRequest, WatchRequest};
use security::{Badge, Secret};
use support::{Rank, config};
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use worker::{Access, Config};

#[test]
fn only_those_who_show_the_cluster_s_secret_reach_a_leader() {
    let (secret, other) = (Secret::random().unwrap(), Secret::random().unwrap());
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
