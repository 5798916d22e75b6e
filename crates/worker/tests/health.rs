//! What probes see of a leader, and how ranks on other machines find it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::net::SocketAddr;

use proto::worker::worker_client::WorkerClient;
use proto::worker::{AcknowledgeRequest, WatchRequest, WorkerState};
use support::{Rank, config};
use tokio::runtime::Runtime;
use tonic::Streaming;
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

/// A router that watches a leader until it is dropped.
struct Router<'a> {
    runtime: &'a Runtime,
    name: &'static str,
    client: WorkerClient<Channel>,
    _states: Streaming<WorkerState>,
}

impl<'a> Router<'a> {
    fn comes(runtime: &'a Runtime, address: SocketAddr, name: &'static str) -> Self {
        runtime.block_on(async {
            let mut client = WorkerClient::connect(format!("http://{address}")).await.unwrap();
            let request = WatchRequest { router_id: name.to_owned() };
            let _states = client.watch(request).await.unwrap().into_inner();
            Self { runtime, name, client, _states }
        })
    }

    /// Says what it makes of the leader.
    fn says(&mut self, refusal: &str) {
        let request = AcknowledgeRequest { router_id: self.name.to_owned(), refusal: refusal.to_owned() };
        self.runtime.block_on(self.client.acknowledge(request)).unwrap();
    }
}

fn wait_until(runtime: &Runtime, address: SocketAddr, wanted: ServingStatus) {
    runtime.block_on(async {
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let request = HealthCheckRequest { service: String::new() };
        let mut states = HealthClient::new(channel).watch(request).await.unwrap().into_inner();
        while states.message().await.unwrap().unwrap().status() != wanted {}
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
    let mut router = Router::comes(&runtime, address, "one");
    router.says("it serves another model");
    assert_eq!(health(&runtime, address, ""), ServingStatus::NotServing, "it was refused");
    router.says("");
    wait_until(&runtime, address, ServingStatus::Serving);
    let mut other = Router::comes(&runtime, address, "other");
    other.says("this router knows it not");
    assert_eq!(health(&runtime, address, ""), ServingStatus::Serving, "the first one uses it still");
    drop((router, other));
    leader.shutdown.cancel();
    leader.end().unwrap();
    follower.end().unwrap();
}

#[test]
fn a_leader_is_ready_for_as_long_as_a_router_that_uses_it_is_there() {
    let leader = Rank::start(config(0, 1));
    let address = leader.listening();
    leader.ready();
    let runtime = runtime();
    let using = |name| {
        let mut router = Router::comes(&runtime, address, name);
        router.says("");
        router
    };
    let one = using("one");
    wait_until(&runtime, address, ServingStatus::Serving);
    // Its connection is made anew before the old one has ended.
    let again = using("one");
    drop(one);
    let other = using("other");
    drop(again);
    assert_eq!(health(&runtime, address, ""), ServingStatus::Serving, "the other one is there");
    drop(other);
    wait_until(&runtime, address, ServingStatus::NotServing);
    assert_eq!(health(&runtime, address, "cohort.worker.v1.Worker"), ServingStatus::Serving);
    // One that only looks does not use it; one that uses it makes it ready again.
    let _looks = Router::comes(&runtime, address, "new");
    assert_eq!(health(&runtime, address, ""), ServingStatus::NotServing, "it has not said so yet");
    let _uses = using("another");
    wait_until(&runtime, address, ServingStatus::Serving);
    leader.shutdown.cancel();
    leader.end().unwrap();
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
