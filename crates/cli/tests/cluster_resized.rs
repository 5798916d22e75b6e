//! Groups are added to a running cluster and taken away again.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::cell::RefCell;
use std::net::SocketAddr;
use std::time::Duration;

use cli::report::{Event, Line, Serving};
use cli::supervisor::cluster::{Cluster, Happening, Leader, Member, Size, run};
use cli::supervisor::{Order, Spec};
use support::{saying, shell, within_reason};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// As the router is told of it.
fn led(group: u32) -> Leader {
    Leader { group, address: leader(group) }
}

fn leader(index: u32) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9000 + u16::try_from(index).unwrap()))
}

fn said(rank: Option<u32>, event: Event) -> String {
    serde_json::to_string(&Line { pid: 1, rank, event }).unwrap()
}

const WAIT: &str = "trap 'exit 0' TERM; while :; do read -r line; done";

fn group(index: u32) -> String {
    let ready = said(Some(0), Event::Ready { elapsed_ms: 1 });
    format!("{}; echo '{ready}'; {WAIT}", saying(&Event::Listening { address: leader(index) }))
}

/// Answers every order, and tells its test of it by a phase that no router has.
fn router() -> String {
    let serving = Event::Serving(Serving { grpc: "127.0.0.1:1".parse().unwrap(), http: None });
    let configured = said(None, Event::Configured { error: None });
    format!("{}; trap 'exit 0' TERM; while :; do read -r line && echo '{configured}'; done", saying(&serving))
}

fn size(groups: u32) -> Size {
    Size { groups, grace: Duration::from_secs(5), log_level: None }
}

/// What became of a cluster of so many groups: everything that started or left, and the lists the router was given.
fn resized(
    groups: u32,
    script: impl Fn(u32, usize) -> String,
    mut next: impl FnMut(&Happening, &dyn Fn(u32)) -> bool,
) -> (Vec<String>, Vec<Vec<Leader>>) {
    let (log, lists) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
    let starts = RefCell::new(Vec::new());
    within_reason(async {
        let stop = CancellationToken::new();
        let cluster = Cluster {
            size: size(groups),
            group: |index, _| -> anyhow::Result<Spec> {
                let earlier = starts.borrow().iter().filter(|of| **of == index).count();
                starts.borrow_mut().push(index);
                Ok(shell(&script(index, earlier), &[]))
            },
            router: |leaders: &[Leader], _| -> anyhow::Result<Spec> {
                lists.borrow_mut().push(leaders.to_vec());
                Ok(shell(&router(), &[]))
            },
        };
        let (resize, sizes) = mpsc::channel(8);
        run(&cluster, &stop, sizes, |happening| {
            match &happening {
                Happening::Started { member, .. } => log.borrow_mut().push(format!("{member} started")),
                Happening::Left(index) => log.borrow_mut().push(format!("group {index} left")),
                Happening::Restarting { member, .. } => log.borrow_mut().push(format!("{member} again")),
                Happening::Said { .. } | Happening::Up(_) => {}
            }
            if next(&happening, &|groups| resize.try_send(size(groups)).unwrap()) {
                stop.cancel();
            }
        })
        .await
        .unwrap();
    });
    (log.into_inner(), lists.into_inner())
}

fn configured(happening: &Happening) -> bool {
    matches!(happening, Happening::Said { member: Member::Router, line } if matches!(line.event, Event::Configured { .. }))
}

#[test]
fn a_group_that_is_added_starts_and_the_router_is_told_its_address() {
    let mut answers = 0;
    let (log, lists) = resized(
        1,
        |index, _| group(index),
        |happening, resize| {
            if matches!(happening, Happening::Up(_)) {
                resize(2);
            }
            answers += u32::from(configured(happening));
            // To the new size, and to the new leader's address.
            answers == 2
        },
    );
    assert_eq!(log, ["group 0 started", "router started", "group 1 started"]);
    assert_eq!(lists.last().unwrap(), &[led(0), led(1)]);
}

#[test]
fn groups_that_are_taken_away_end_after_the_router_has_heard_of_it() {
    let mut order = Vec::new();
    let (log, lists) = resized(
        3,
        |index, _| group(index),
        |happening, resize| {
            if matches!(happening, Happening::Up(_)) {
                resize(1);
            }
            if configured(happening) {
                order.push("told");
            }
            if matches!(happening, Happening::Left(_)) {
                order.push("left");
            }
            order.iter().filter(|what| **what == "left").count() == 2
        },
    );
    assert_eq!(order, ["told", "left", "left"]);
    assert_eq!(lists.last().unwrap(), &[led(0)]);
    assert!(!log.iter().any(|line| line.ends_with("again")), "{log:?}");
}

#[test]
fn a_group_that_is_wanted_again_at_once_stays() {
    let mut answers = 0;
    let (log, lists) = resized(
        2,
        |index, _| group(index),
        |happening, resize| {
            if matches!(happening, Happening::Up(_)) {
                resize(1);
                resize(2);
            }
            answers += u32::from(configured(happening));
            answers == 2
        },
    );
    assert!(!log.iter().any(|line| line.ends_with("left")), "{log:?}");
    assert_eq!(lists.last().unwrap(), &[led(0), led(1)]);
}

#[test]
fn a_group_that_is_added_and_fails_is_tried_again_and_does_not_end_the_cluster() {
    let (log, lists) = resized(
        1,
        |index, earlier| if index == 1 && earlier == 0 { "exit 1".to_owned() } else { group(index) },
        |happening, resize| {
            if matches!(happening, Happening::Up(_)) {
                resize(2);
            }
            let ready = |line: &Line| matches!(line.event, Event::Ready { .. });
            matches!(happening, Happening::Said { member: Member::Group(1), line } if ready(line))
        },
    );
    assert_eq!(
        log,
        ["group 0 started", "router started", "group 1 started", "group 1 again", "group 1 started"]
    );
    assert_eq!(lists.last().unwrap(), &[led(0), led(1)]);
}

#[test]
fn an_order_is_one_line() {
    let order = Order::Configure { argv: vec!["router".into(), "--model-name=a\nb".into()] };
    let line = order.to_line();
    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
    assert_eq!(serde_json::from_slice::<Order>(&line).unwrap(), order);
}
