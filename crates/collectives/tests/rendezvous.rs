//! How ranks find each other, and who is sent away.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use collectives::{
    Collective, Error, Field, GroupSecret, Joined, Member, PROTOCOL_VERSION, PlanChannel, Rendezvous,
    RendezvousOptions, join,
};
use common::{LOOPBACK, PATIENT, member, options};

fn door() -> (Rendezvous, String) {
    let door = Rendezvous::bind(LOOPBACK.parse().unwrap()).unwrap();
    let address = door.local_addr().to_string();
    (door, address)
}

fn within(span: Duration) -> RendezvousOptions {
    RendezvousOptions { within: span, ..options(PATIENT) }
}

fn works(mut joined: Joined) {
    let mut sum = [joined.collective.rank().index() as f32];
    joined.collective.all_reduce_sum(&mut sum).unwrap();
    let size = joined.collective.rank().size().get();
    assert_eq!(sum, [(size * (size - 1) / 2) as f32]);
    assert_eq!(matches!(joined.plan, PlanChannel::Leader(_)), joined.collective.rank().is_leader());
}

/// Runs rank 0 and one joiner that should not come together.
fn refused(leader: &Member, joiner: &Member) -> (Error, Error) {
    let (door, address) = door();
    thread::scope(|scope| {
        let joining = scope.spawn(|| join(&address, joiner, &options(PATIENT)).unwrap_err());
        (door.lead(leader, &options(PATIENT)).unwrap_err(), joining.join().unwrap())
    })
}

#[test]
fn a_group_of_one_is_complete_at_once() {
    let (door, _) = door();
    works(door.lead(&member(0, 1), &within(Duration::ZERO)).unwrap());
}

#[test]
fn ranks_may_come_before_rank_0_listens() {
    // An address of its own, so no other test can be given the port in between.
    let place: SocketAddr = "127.77.0.1:0".parse().unwrap();
    let address = TcpListener::bind(place).unwrap().local_addr().unwrap();
    thread::scope(|scope| {
        for rank in 1..4 {
            scope.spawn(move || {
                works(join(&address.to_string(), &member(rank, 4), &options(PATIENT)).unwrap())
            });
        }
        // Nothing waits for the joiners' first tries: whichever comes first, the group must form.
        thread::yield_now();
        works(Rendezvous::bind(address).unwrap().lead(&member(0, 4), &options(PATIENT)).unwrap());
    });
}

#[test]
fn a_larger_group_forms_and_works() {
    for joined in [6, 9].map(|size| common::tcp_group(size, PATIENT)) {
        common::together(joined, |_, joined| works(joined));
    }
}

#[test]
fn a_rank_that_disagrees_is_refused_with_both_values_at_both_ends() {
    let ours = member(0, 2);
    let hex = |byte: &str| byte.repeat(32);
    let cases = [
        (member(1, 3), Field::GroupSize, "2".to_owned(), "3".to_owned()),
        (
            Member { plan: "tensor=1 data=2".to_owned(), ..member(1, 2) },
            Field::Plan,
            "tensor=2".to_owned(),
            "tensor=1 data=2".to_owned(),
        ),
        (Member { config_hash: [8; 32], ..member(1, 2) }, Field::ConfigHash, hex("07"), hex("08")),
    ];
    for (joiner, field, leaders, joiners) in cases {
        // The plan text follows the size in this helper; keep only the difference under test.
        let joiner =
            if field == Field::GroupSize { Member { plan: ours.plan.clone(), ..joiner } } else { joiner };
        let (at_leader, at_joiner) = refused(&ours, &joiner);
        let (leader, other) = (leaders.clone(), joiners.clone());
        assert_eq!(at_leader, Error::Disagreement { rank: 1, field, ours: leader, theirs: other });
        assert_eq!(at_joiner, Error::Disagreement { rank: 0, field, ours: joiners, theirs: leaders });
    }
}

#[test]
fn ranks_with_one_secret_meet_and_others_are_refused() {
    let with = |text: &str| RendezvousOptions {
        secret: Some(GroupSecret::new(text.as_bytes())),
        ..options(PATIENT)
    };
    let meet = |leads: RendezvousOptions, joins: RendezvousOptions| {
        let (door, address) = door();
        thread::scope(|scope| {
            let joining = scope.spawn(move || join(&address, &member(1, 2), &joins));
            let led = door.lead(&member(0, 2), &leads);
            let joined = joining.join().unwrap();
            (led.map(drop), joined.map(drop))
        })
    };
    assert_eq!(meet(with("one"), with("one")), (Ok(()), Ok(())));
    for joins in [with("two"), options(PATIENT)] {
        let (at_leader, at_joiner) = meet(with("one"), joins);
        for error in [at_leader.unwrap_err(), at_joiner.unwrap_err()] {
            let Error::Disagreement { field, ours, theirs, .. } = error else { panic!("{error}") };
            assert_eq!(field, Field::ConfigHash);
            assert!(ours != theirs && [ours, theirs].iter().any(|hash| *hash != "07".repeat(32)));
        }
    }
}

#[test]
fn who_repeats_a_hello_without_the_secret_does_not_get_into_the_mesh() {
    let secret = Some(GroupSecret::new(b"one"));
    let (door, address) = door();
    let leading = thread::spawn(move || {
        let within = Duration::from_secs(2);
        let options = RendezvousOptions { secret, within, ..options(PATIENT) };
        door.lead(&member(0, 2), &options).map(drop)
    });
    // The hash of the refusal is all it takes to be welcomed …
    let first = join(&address, &member(1, 2), &options(PATIENT));
    let Error::Disagreement { theirs, .. } = first.map(drop).unwrap_err() else { panic!("not refused") };
    assert_eq!(theirs.len(), 64);
    let refused = leading.join().unwrap().unwrap_err();
    assert!(matches!(refused, Error::Disagreement { rank: 1, .. }), "{refused}");
    // … and not enough to open a connection of the mesh.
    let hash: Vec<u8> =
        (0..32).map(|at| u8::from_str_radix(&theirs[2 * at..2 * at + 2], 16).unwrap()).collect();
    let repeated = Member { config_hash: hash.try_into().unwrap(), ..member(1, 2) };
    let (door, address) = self::door();
    let leading = thread::spawn(move || {
        let within = Duration::from_secs(2);
        let options = RendezvousOptions { secret, within, ..options(PATIENT) };
        door.lead(&member(0, 2), &options).map(drop)
    });
    assert!(join(&address, &repeated, &options(Duration::from_secs(5))).is_err());
    assert_eq!(leading.join().unwrap(), Err(Error::Absent { ranks: vec![1], after: Duration::from_secs(2) }));
}

/// The first bytes of a message of this protocol.
fn message(version: u16, kind: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"COHO".to_vec();
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A hello as a rank of this version would send it.
fn hello(rank: u32, size: u32, mesh: &str) -> Vec<u8> {
    let plan = text(&format!("tensor={size}"));
    let parts = [&rank.to_le_bytes()[..], &size.to_le_bytes()[..], &[7; 32], &plan, &text(mesh)];
    message(PROTOCOL_VERSION, 0, &parts.concat())
}

#[test]
fn rank_0_refuses_another_protocol_version() {
    let (door, address) = door();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&message(9, 0, &[&1u32.to_le_bytes()[..], b"unknown future"].concat())).unwrap();
    let error = door.lead(&member(0, 2), &options(PATIENT)).unwrap_err();
    let (ours, theirs) = (PROTOCOL_VERSION.to_string(), "9".to_owned());
    assert_eq!(error, Error::Disagreement { rank: 1, field: Field::ProtocolVersion, ours, theirs });
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let body = [&[1][..], &text(&PROTOCOL_VERSION.to_string()), &text("9")].concat();
    assert_eq!(answer, message(PROTOCOL_VERSION, 2, &body));
}

#[test]
fn a_rank_understands_the_refusal_of_another_protocol_version() {
    let listener = TcpListener::bind(LOOPBACK).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        let joining = scope.spawn(|| join(&address, &member(1, 2), &options(PATIENT)).unwrap_err());
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 12]).unwrap();
        let body = [&[1][..], &text("9"), &text("1")].concat();
        stream.write_all(&message(9, 2, &body)).unwrap();
        let (ours, theirs) = ("1".to_owned(), "9".to_owned());
        let expected = Error::Disagreement { rank: 0, field: Field::ProtocolVersion, ours, theirs };
        assert_eq!(joining.join().unwrap(), expected);
    });
}

#[test]
fn two_processes_with_one_rank_are_refused_and_the_others_are_told() {
    let (door, address) = door();
    let address = &address;
    thread::scope(|scope| {
        let joiners: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| join(address, &member(1, 3), &options(PATIENT)).unwrap_err()))
            .collect();
        let duplicate = Error::DuplicateRank { rank: 1 };
        assert_eq!(door.lead(&member(0, 3), &options(PATIENT)).unwrap_err(), duplicate);
        let errors: Vec<_> = joiners.into_iter().map(|joiner| joiner.join().unwrap()).collect();
        assert!(errors.contains(&duplicate), "{errors:?}");
        assert!(errors.contains(&Error::GaveUp { reason: duplicate.to_string() }), "{errors:?}");
    });
}

#[test]
fn a_rank_the_group_does_not_have_is_refused() {
    for rank in [0, 2, u32::MAX] {
        let (door, address) = door();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&hello(rank, 2, LOOPBACK)).unwrap();
        let error = door.lead(&member(0, 2), &options(PATIENT)).unwrap_err();
        assert_eq!(error, Error::RankOutOfRange { rank, size: 2 });
    }
}

#[test]
fn ranks_that_never_come_are_listed_and_those_that_came_are_told() {
    let (door, address) = door();
    let short = within(Duration::from_millis(300));
    thread::scope(|scope| {
        let joining = scope.spawn(|| join(&address, &member(2, 4), &short).unwrap_err());
        let error = door.lead(&member(0, 4), &short).unwrap_err();
        assert_eq!(error, Error::Absent { ranks: vec![1, 3], after: short.within });
        assert_eq!(joining.join().unwrap(), Error::GaveUp { reason: error.to_string() });
    });
}

#[test]
fn a_rank_0_that_never_comes_is_named() {
    let address = TcpListener::bind("127.77.0.2:0").unwrap().local_addr().unwrap();
    let short = within(Duration::from_millis(100));
    let error = join(&address.to_string(), &member(1, 2), &short).unwrap_err();
    assert_eq!(error, Error::Absent { ranks: vec![0], after: short.within });
}

#[test]
fn a_rank_that_goes_away_while_waiting_is_named_at_once() {
    let (door, address) = door();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&hello(2, 3, LOOPBACK)).unwrap();
    drop(stream);
    let started = Instant::now();
    let error = door.lead(&member(0, 3), &options(PATIENT)).unwrap_err();
    assert_eq!(error, Error::PeerLost { rank: 2, collective: "rendezvous" });
    assert!(started.elapsed() < PATIENT / 2);
}

#[test]
fn strays_that_say_nothing_or_nonsense_do_not_disturb_the_group() {
    let (door, address) = door();
    let silent = TcpStream::connect(&address).unwrap();
    let half: Vec<u8> = hello(1, 2, LOOPBACK)[..20].to_vec();
    let too_long = [&b"COHO\x01\0\0\0"[..], &u32::MAX.to_le_bytes()].concat();
    let malformed = message(PROTOCOL_VERSION, 0, b"short");
    let unknown = message(PROTOCOL_VERSION, 99, b"");
    let strange_token = message(PROTOCOL_VERSION, 3, &[&[0; 16][..], &1u32.to_le_bytes(), &[0]].concat());
    let words = [b"GET / HTTP/1.1\r\n\r\n".to_vec(), half, too_long, malformed, unknown, strange_token];
    let strays: Vec<TcpStream> = words
        .iter()
        .map(|word| {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.write_all(word).unwrap();
            stream
        })
        .collect();
    drop(TcpStream::connect(&address).unwrap());
    let started = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| works(join(&address, &member(1, 2), &options(PATIENT)).unwrap()));
        works(door.lead(&member(0, 2), &options(PATIENT)).unwrap());
    });
    assert!(started.elapsed() < PATIENT / 2);
    drop((silent, strays));
}

#[test]
fn a_connection_without_the_groups_token_does_not_enter_the_mesh() {
    let (door, address) = door();
    thread::scope(|scope| {
        let leading = scope.spawn(|| door.lead(&member(0, 2), &options(PATIENT)));
        let mut joiner = TcpStream::connect(&address).unwrap();
        joiner.write_all(&hello(1, 2, LOOPBACK)).unwrap();
        // Prefix, token, and the table with this rank's one address.
        let mut welcome = vec![0; 12 + 16 + 4 + text(LOOPBACK).len()];
        joiner.read_exact(&mut welcome).unwrap();
        let connect = |token: &[u8], purpose: u8| {
            let mut stream = TcpStream::connect(&address).unwrap();
            let body = [token, &1u32.to_le_bytes(), &[purpose]].concat();
            stream.write_all(&message(PROTOCOL_VERSION, 3, &body)).unwrap();
            stream
        };
        let mut stray = connect(&[0; 16], 0);
        assert_eq!(stray.read(&mut [0]).unwrap(), 0, "a wrong token closes the connection");
        let token = &welcome[12..28];
        let mut data = connect(token, 0);
        let rest = [connect(token, 1), connect(token, 2)];
        let mut barrier = [0; 40];
        data.read_exact(&mut barrier).unwrap();
        assert_eq!(&barrier[..4], b"CHRT");
        data.write_all(&barrier).unwrap();
        leading.join().unwrap().unwrap();
        drop(rest);
    });
}

#[test]
fn a_port_in_use_is_an_error_that_names_the_address() {
    let (door, address) = door();
    let error = Rendezvous::bind(door.local_addr()).unwrap_err();
    assert!(matches!(&error, Error::Io { kind: std::io::ErrorKind::AddrInUse, .. }), "{error}");
    assert!(error.to_string().contains(&address), "{error}");
}

#[test]
fn only_rank_0_leads_and_only_others_join() {
    let (door, address) = door();
    assert!(matches!(join(&address, &member(0, 2), &options(PATIENT)), Err(Error::RankOutOfRange { .. })));
    assert!(matches!(door.lead(&member(1, 2), &options(PATIENT)), Err(Error::RankOutOfRange { .. })));
}

#[test]
fn a_plan_too_long_for_a_hello_is_refused_before_anything_is_sent() {
    let (door, address) = door();
    let long = |rank| Member { plan: "x".repeat(1025), ..member(rank, 2) };
    assert!(matches!(join(&address, &long(1), &options(PATIENT)), Err(Error::TooLarge { bytes: 1025, .. })));
    assert!(matches!(door.lead(&long(0), &options(PATIENT)), Err(Error::TooLarge { max: 1024, .. })));
}
