//! The W3C trace context, and who is traced.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use trace::{Kind, Parent, Sampling, Span};

const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const UNSAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

#[test]
fn headers_are_read_and_written_as_they_were() {
    let parent = Parent::read(Some(SAMPLED), Some("garden=plum,b=2")).unwrap();
    assert!(parent.is_sampled());
    assert_eq!(parent.traceparent(), SAMPLED);
    assert_eq!(parent.tracestate().unwrap(), "garden=plum,b=2");
    let parent = Parent::read(Some(UNSAMPLED), None).unwrap();
    assert!(!parent.is_sampled());
    assert_eq!((parent.traceparent(), parent.tracestate()), (UNSAMPLED.to_owned(), None));
}

#[test]
fn what_is_no_traceparent_is_nobody() {
    let zeros = "00-00000000000000000000000000000000-00f067aa0ba902b7-01";
    let capitals = "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01";
    for wrong in
        ["", "x", "00-1-2-01", zeros, capitals, &SAMPLED[..54], "ff-4bf92f3577b34da6a3ce929d0e0e4736"]
    {
        assert_eq!(Parent::read(Some(wrong), None), None, "{wrong}");
    }
    assert_eq!(Parent::read(None, Some("a=b")), None);
    // A state that is too long or none at all costs the state, not the trace.
    let long = format!("a={}", "b".repeat(600));
    for state in [long.as_str(), "no state"] {
        assert_eq!(Parent::read(Some(SAMPLED), Some(state)).unwrap().tracestate(), None, "{state}");
    }
}

#[test]
fn the_short_form_holds_the_same() {
    for header in [SAMPLED, UNSAMPLED] {
        let parent = Parent::read(Some(header), None).unwrap();
        let read = Parent::from_bytes(&parent.to_bytes()).unwrap();
        assert_eq!(read.traceparent(), header);
    }
    assert_eq!(Parent::from_bytes(&[0; trace::PARENT_BYTES]), None);
}

#[test]
fn callers_decide_where_they_are_followed_and_the_ratio_elsewhere() {
    let (yes, no) = (Parent::read(Some(SAMPLED), None), Parent::read(Some(UNSAMPLED), None));
    for (ratio, drawn) in [(0.0, false), (1.0, true)] {
        let follow = Sampling { ratio, follow_callers: true };
        assert_eq!(
            [follow.takes(None), follow.takes(yes.as_ref()), follow.takes(no.as_ref())],
            [drawn, true, false]
        );
        let alone = Sampling { ratio, follow_callers: false };
        assert!([None, yes.as_ref(), no.as_ref()].into_iter().all(|caller| alone.takes(caller) == drawn));
    }
    // 4,000 draws with a chance of a quarter: 1,000 ± 27; ten times that is never seen.
    let quarter = Sampling { ratio: 0.25, follow_callers: true };
    let taken = (0..4000).filter(|_| quarter.takes(None)).count();
    assert!((726..=1274).contains(&taken), "{taken}");
}

#[test]
fn where_nothing_is_exported_a_span_is_nothing() {
    let span = Span::begin("request", Kind::Server, Parent::read(Some(SAMPLED), None).as_ref());
    assert!(!span.is_on());
    assert_eq!(span.parent(), None);
    assert!(!span.child("part", Kind::Internal).is_on());
    span.set("key", 1);
    span.fail("KIND", "why");
}
