//! Groups behind a name: every address of it is one, and the name is asked for again and again.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use router::Config;
use router::discovery::{Known, Names, Resolve};
use tokio::sync::watch;

use crate::support::{Leader, TestRouter, all, answer, config, demo_files, from_ids, soon};

/// Answers as the test says, and tells how often it was asked.
#[derive(Debug)]
struct Scripted {
    answer: Mutex<Option<Vec<SocketAddr>>>,
    asked: watch::Sender<u32>,
}

impl Scripted {
    fn new(answer: &[&Leader]) -> Arc<Self> {
        let script = Self { answer: Mutex::default(), asked: watch::Sender::new(0) };
        script.say(answer);
        Arc::new(script)
    }

    fn say(&self, leaders: &[&Leader]) {
        let at = |leader: &&Leader| leader.address.trim_start_matches("http://").parse().unwrap();
        *self.answer.lock().unwrap() = Some(leaders.iter().map(at).collect());
    }

    /// Nobody answers.
    fn fail(&self) {
        *self.answer.lock().unwrap() = None;
    }

    /// Waits until it was asked so many more times, and the last but one of the answers has been taken.
    async fn asked(&self, times: u32) {
        let mut asked = self.asked.subscribe();
        let until = *asked.borrow() + times;
        soon(asked.wait_for(|asked| *asked >= until)).await.unwrap();
    }
}

impl Resolve for Scripted {
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        assert_eq!((host, port), ("groups", 7000));
        let answer = self.answer.lock().unwrap().clone();
        self.asked.send_modify(|asked| *asked += 1);
        Box::pin(async { answer.ok_or_else(|| io::Error::other("no such host")) })
    }
}

fn named(resolver: &Arc<Scripted>, hold: Duration) -> Config {
    let resolver: Arc<dyn Resolve> = Arc::clone(resolver) as _;
    let names = Names { interval: Duration::from_millis(5), hold, resolver };
    Config { names, ..config(&["dns+http://groups:7000"]) }
}

#[tokio::test]
async fn every_address_of_a_name_is_a_group_and_new_ones_join() {
    let (one, other) = (Leader::serving().await, Leader::serving().await);
    let script = Scripted::new(&[&one]);
    let router = TestRouter::start(named(&script, Duration::from_secs(3600)), demo_files()).await;
    router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    router.wait_for_groups(1).await;
    script.say(&[&one, &other]);
    router.wait_for_groups(2).await;
}

#[tokio::test]
async fn the_weight_of_a_name_is_that_of_each_of_its_addresses_which_have_no_own() {
    let (one, other) = (Leader::serving().await, Leader::serving().await);
    let script = Scripted::new(&[&one, &other]);
    let weighed = |weights: &[(&str, u32)]| {
        let weights = weights.iter().map(|(of, weight)| ((*of).to_owned(), *weight)).collect();
        Config { weights, ..named(&script, Duration::from_secs(3600)) }
    };
    let name = "dns+http://groups:7000";
    let router = TestRouter::start(weighed(&[]), demo_files()).await;
    router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    router.wait_for_groups(2).await;
    router.change(weighed(&[(name, 0), (&one.address, 1)])).await.unwrap();
    router.wait_for_groups(1).await;
    router.change(weighed(&[(name, 0)])).await.unwrap();
    router.wait_for_groups(0).await;
    router.change(weighed(&[(name, 3)])).await.unwrap();
    router.wait_for_groups(2).await;
}

#[tokio::test]
async fn a_name_that_flaps_or_fails_takes_no_group_away() {
    let (one, other) = (Leader::serving().await, Leader::serving().await);
    let script = Scripted::new(&[&one, &other]);
    let router = TestRouter::start(named(&script, Duration::from_secs(3600)), demo_files()).await;
    router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    router.wait_for_groups(2).await;
    for step in 0..4 {
        match step {
            0 => script.say(&[&one]),
            1 => script.say(&[&other]),
            2 => script.say(&[]),
            _ => script.fail(),
        }
        script.asked(2).await;
        router.wait_for_groups(2).await;
    }
}

#[tokio::test]
async fn an_address_that_stays_away_leaves_and_its_requests_are_finished() {
    let (mut one, other) = (Leader::serving().await, Leader::serving().await);
    let script = Scripted::new(&[&one]);
    let router = TestRouter::start(named(&script, Duration::from_millis(20)), demo_files()).await;
    router.wait_for(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    let mut client = router.client().await;
    let open = tokio::spawn(async move { client.generate(from_ids(&[5, 6])).await.unwrap().into_inner() });
    let request = one.next().await;
    script.say(&[&other]);
    let address = other.address.clone();
    let _other = other.play_always(answer("hi"));
    let mut client = router.client().await;
    // Until the old one has left, it counts too.
    loop {
        let info = soon(client.get_model_info(proto::v1::GetModelInfoRequest {})).await.unwrap().into_inner();
        if (info.groups, info.groups_ready) == (1, 1) {
            break;
        }
        tokio::task::yield_now().await;
    }
    all(&router, from_ids(&[7, 8])).await.unwrap();
    request.play(answer("yes")).await;
    let mut stream = soon(open).await.unwrap();
    while soon(stream.message()).await.unwrap().is_some() {}
    assert!(one.opened.try_recv().is_err(), "new requests go to {address}");
}

#[test]
fn an_address_counts_for_as_long_as_the_hold_after_its_last_answer() {
    let at = |port| SocketAddr::from(([10, 0, 0, 1], port));
    let start = Instant::now();
    let later = |seconds| start + Duration::from_secs(seconds);
    let hold = Duration::from_secs(60);
    let mut known = Known::default();
    let ports = |known: &Known| known.addresses().map(|address| address.port()).collect::<Vec<_>>();
    known.answered(&[at(1), at(2)], start, hold);
    known.answered(&[at(2), at(3)], later(30), hold);
    assert_eq!(ports(&known), [1, 2, 3]);
    known.answered(&[], later(60), hold);
    assert_eq!(ports(&known), [1, 2, 3]);
    known.answered(&[], later(61), hold);
    assert_eq!(ports(&known), [2, 3]);
    known.answered(&[at(1)], later(91), hold);
    assert_eq!(ports(&known), [1]);
}

#[tokio::test]
async fn a_name_without_a_port_is_refused() {
    let ended = router::serve(
        config(&["dns+http://groups"]),
        demo_files(),
        |_| {},
        tokio_util::sync::CancellationToken::new(),
    );
    let error = soon(ended).await.unwrap_err().to_string();
    assert!(error.contains("dns+http://name:port"), "{error}");
}
