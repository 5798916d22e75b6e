//! What probes see of a leader, and how ranks on other machines find it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::net::SocketAddr;

use proto::worker::AcknowledgeRequest;
use proto::worker::worker_client::WorkerClient;
use support::{Rank, config};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use worker::{Config, Report};

/// The health a leader reports for a name.
fn health(runtime: &Runtime, address: SocketAddr, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.to_owned() };
    runtime.block_on(async {
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        HealthClient::new(channel).check(request).await.unwrap().into_inner().status()
    })
}

/// Says what a router makes of a leader.
fn acknowledge(runtime: &Runtime, address: SocketAddr, refusal: &str) {
    let request = AcknowledgeRequest { router_id: "a router".to_owned(), refusal: refusal.to_owned() };
    runtime.block_on(async {
        let mut client = WorkerClient::connect(format!("http://{address}")).await.unwrap();
        client.acknowledge(request).await.unwrap();
    });
}

fn wait_until_serving(runtime: &Runtime, address: SocketAddr) {
    runtime.block_on(async {
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let request = HealthCheckRequest { service: String::new() };
        let mut states = HealthClient::new(channel).watch(request).await.unwrap().into_inner();
        while states.message().await.unwrap().unwrap().status() != ServingStatus::Serving {}
    });
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn rendezvous(leader: &Rank) -> SocketAddr {
    leader.wait(|report| if let Report::Rendezvous(address) = report { Some(*address) } else { None })
}

#[test]
fn a_leader_that_waits_for_its_ranks_is_live_and_not_ready() {
    let leader = Rank::start(config(0, 2));
    let (address, meeting) = (leader.listening(), rendezvous(&leader));
    let runtime = runtime();
    assert_eq!(health(&runtime, address, "live"), ServingStatus::Serving);
    assert_eq!(health(&runtime, address, ""), ServingStatus::NotServing);
    let follower = Rank::start(Config { rendezvous: meeting, ..config(1, 2) });
    leader.ready();
    for name in ["live", "cohort.worker.v1.Worker"] {
        assert_eq!(health(&runtime, address, name), ServingStatus::Serving, "{name:?}");
    }
    assert_eq!(health(&runtime, address, ""), ServingStatus::NotServing, "no router has come");
    acknowledge(&runtime, address, "it serves another model");
    assert_eq!(health(&runtime, address, ""), ServingStatus::NotServing, "it was refused");
    acknowledge(&runtime, address, "");
    wait_until_serving(&runtime, address);
    acknowledge(&runtime, address, "another router knows it not");
    assert_eq!(health(&runtime, address, ""), ServingStatus::Serving, "the first one uses it still");
    leader.shutdown.cancel();
    leader.end().unwrap();
    follower.end().unwrap();
}

#[test]
fn a_follower_finds_its_leader_by_name() {
    let leader = Rank::start(config(0, 2));
    let meeting = Some(format!("localhost:{}", rendezvous(&leader).port()));
    let follower = Rank::start(Config { leader: meeting, ..config(1, 2) });
    leader.ready();
    leader.shutdown.cancel();
    leader.end().unwrap();
    follower.end().unwrap();
}
