//! A router and its groups: started in order, restarted when they die, stopped in order.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::cell::RefCell;
use std::net::SocketAddr;
use std::time::Duration;

use cli::report::{Event, Line, Serving};
use cli::supervisor::cluster::{Cluster, Happening, Leader, Member, Size, run};
use cli::supervisor::{Backoff, Spec};
use support::{saying, shell, within_reason};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const WAIT: &str = "trap 'exit 0' TERM; while :; do read -r line; done";

/// As the router is told of it.
fn led(group: u32) -> Leader {
    Leader { group, address: leader(group) }
}

fn leader(index: u32) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9000 + u16::try_from(index).unwrap()))
}

fn serving() -> Serving {
    Serving { grpc: "127.0.0.1:50051".parse().unwrap(), http: None }
}

fn ready(rank: u32) -> String {
    let line = Line { pid: 1, rank: Some(rank), event: Event::Ready { elapsed_ms: 1 } };
    format!("echo '{}'", serde_json::to_string(&line).unwrap())
}

fn good_group(index: u32) -> String {
    format!("{}; {}; {WAIT}", saying(&Event::Listening { address: leader(index) }), ready(0))
}

fn good_router() -> String {
    format!("{}; {WAIT}", saying(&Event::Serving(serving())))
}

/// How often and with what each member was started.
#[derive(Default)]
struct Started {
    groups: RefCell<Vec<(u32, Option<SocketAddr>)>>,
    routers: RefCell<Vec<(Vec<Leader>, Option<Serving>)>>,
}

/// Runs a cluster of these scripts; told to stop when `enough` says so.
fn cluster(
    groups: u32,
    group: impl Fn(u32, usize) -> String,
    router: impl Fn(usize) -> String,
    mut enough: impl FnMut(&Happening) -> bool,
) -> (anyhow::Result<()>, Started) {
    let started = Started::default();
    let result = within_reason(async {
        let stop = CancellationToken::new();
        let cluster = Cluster {
            size: Size { groups, grace: Duration::from_secs(5), log_level: None },
            group: |index, listen| -> anyhow::Result<Spec> {
                let earlier = started.groups.borrow().iter().filter(|(of, _)| *of == index).count();
                started.groups.borrow_mut().push((index, listen));
                Ok(shell(&group(index, earlier), &[]))
            },
            router: |leaders: &[Leader], served| -> anyhow::Result<Spec> {
                let earlier = started.routers.borrow().len();
                started.routers.borrow_mut().push((leaders.to_vec(), served));
                Ok(shell(&router(earlier), &[]))
            },
        };
        let (_resize, sizes) = mpsc::channel(1);
        run(&cluster, &stop, sizes, |happening| {
            if enough(&happening) {
                stop.cancel();
            }
        })
        .await
    });
    (result, started)
}

#[test]
fn the_router_starts_once_all_leaders_listen_and_the_cluster_is_up_once_all_are_ready() {
    let (result, started) = cluster(
        2,
        |index, _| good_group(index),
        |_| good_router(),
        |happening| matches!(happening, Happening::Up(at) if *at == serving()),
    );
    result.unwrap();
    assert_eq!(started.routers.into_inner(), [(vec![led(0), led(1)], None)]);
}

#[test]
fn a_group_that_dies_before_it_was_ready_ends_the_cluster_with_its_error() {
    let failed = saying(&Event::Failed { error: "model.safetensors: truncated".into() });
    let (result, started) = cluster(
        2,
        |index, _| if index == 1 { format!("{failed}; exit 1") } else { good_group(index) },
        |_| good_router(),
        |_| false,
    );
    let error = result.unwrap_err().to_string();
    assert!(
        error.starts_with("group 1 (pid ") && error.ends_with("failed: model.safetensors: truncated"),
        "{error}"
    );
    assert_eq!(started.groups.into_inner().len(), 2);
}

#[test]
fn followers_that_are_ready_do_not_make_a_group_ready() {
    let (result, _) = cluster(1, |_, _| format!("{}; exit 1", ready(1)), |_| good_router(), |_| false);
    assert!(result.unwrap_err().to_string().starts_with("group 0"));
}

#[test]
fn a_group_that_dies_after_it_was_ready_is_restarted_at_the_same_address() {
    let dies = format!("{}; {}; exit 3", saying(&Event::Listening { address: leader(0) }), ready(0));
    let mut readies = 0;
    let (result, started) = cluster(
        1,
        |index, earlier| if earlier < 2 { dies.clone() } else { good_group(index) },
        |_| good_router(),
        |happening| {
            let Happening::Said { line, .. } = happening else { return false };
            readies += usize::from(matches!(line.event, Event::Ready { .. }));
            readies == 3
        },
    );
    result.unwrap();
    let at = Some(leader(0));
    assert_eq!(started.groups.into_inner(), [(0, None), (0, at), (0, at)]);
}

#[test]
fn a_router_that_dies_is_restarted_at_the_same_addresses() {
    let mut waits = Vec::new();
    let mut serves = 0;
    let (result, started) = cluster(
        1,
        |index, _| good_group(index),
        |earlier| {
            if earlier == 0 {
                format!("{}; kill -9 $$", saying(&Event::Serving(serving())))
            } else {
                good_router()
            }
        },
        |happening| {
            if let Happening::Restarting { member: Member::Router, after, why } = happening {
                assert!(why.contains("SIGKILL"), "{why}");
                waits.push(*after);
            }
            let Happening::Said { line, .. } = happening else { return false };
            serves += usize::from(matches!(line.event, Event::Serving(_)));
            serves == 2
        },
    );
    result.unwrap();
    assert_eq!(waits, [Backoff::FIRST]);
    assert_eq!(started.routers.into_inner()[1], (vec![led(0)], Some(serving())));
}

#[test]
fn waits_double_up_to_a_bound_and_health_forgives() {
    let mut backoff = Backoff::default();
    let waits: Vec<u128> = (0..9).map(|_| backoff.after(Duration::ZERO).as_millis()).collect();
    assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
    assert_eq!(backoff.after(Backoff::FORGIVEN_AFTER - Duration::from_millis(1)), Backoff::LONGEST);
    assert_eq!(backoff.after(Backoff::FORGIVEN_AFTER), Backoff::FIRST);
}
