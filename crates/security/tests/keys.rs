//! The file of API keys and what a key may use.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::time::{Duration, Instant};

use security::{KeyFile, Keys, Limits, generate_key, key_line};

fn file(lines: &[(&str, &str, Limits)]) -> String {
    lines.iter().map(|(name, key, limits)| key_line(name, key, limits).unwrap() + "\n").collect()
}

#[test]
fn a_printed_line_lets_its_key_in_and_no_other() {
    let (key, other) = (generate_key().unwrap(), generate_key().unwrap());
    assert_ne!(key, other);
    let limits = Limits {
        requests_per_minute: Some(60),
        tokens_per_minute: Some(1000),
        concurrency: Some(2),
        priority_min: Some(-3),
    };
    let text = file(&[("alice", &key, limits), ("two-words", &other, Limits::default())]);
    assert!(!text.contains(&key), "{text}");
    assert_eq!(key_line("two words", &key, &limits), None);
    let keys = Keys::parse(&text, None).unwrap();
    let alice = keys.find(&key).unwrap();
    assert_eq!((alice.name(), alice.limits()), ("alice", &limits));
    assert_eq!(keys.find(&other).unwrap().name(), "two-words");
    for wrong in ["", "cohort-", &key[1..], &format!("{key} "), &"x".repeat(1 << 20)] {
        assert!(keys.find(wrong).is_none(), "{wrong:?}");
    }
}

#[test]
fn a_mistake_in_the_file_is_named_with_its_key() {
    let digest = "ab".repeat(32);
    let table = [
        ("a = 1".to_owned(), "is no file of API keys"),
        ("a = {}".to_owned(), "missing field `sha256`"),
        ("a = { sha256 = 'ab' }".to_owned(), "key \"a\": sha256 must be 64 hexadecimal digits"),
        (format!("a = {{ sha256 = '{digest}', rpm = 1 }}"), "unknown field `rpm`"),
        (
            format!("\na = {{ sha256 = '{digest}', concurrency = 'x' }}"),
            "line 2: invalid type: string \"x\", expected u32",
        ),
        (
            format!("a = {{ sha256 = '{digest}', requests_per_minute = 0 }}"),
            "key \"a\": requests_per_minute must be at least 1",
        ),
        (
            format!("a = {{ sha256 = '{digest}', priority_min = 101 }}"),
            "key \"a\": priority_min must be between -100 and 100, not 101",
        ),
        (
            format!("a = {{ sha256 = '{digest}' }}\nb = {{ sha256 = '{digest}' }}"),
            "keys \"a\" and \"b\" are the same key",
        ),
    ];
    for (text, why) in table {
        let error = Keys::parse(&text, None).unwrap_err();
        assert!(error.contains(why), "{text}: {error}");
    }
}

#[test]
fn requests_above_a_minute_s_worth_wait_until_it_is_filled_again() {
    let limits = Limits { requests_per_minute: Some(2), ..Limits::default() };
    let key = generate_key().unwrap();
    let keys = Keys::parse(&file(&[("a", &key, limits)]), None).unwrap();
    let (meter, start) = (keys.find(&key).unwrap(), Instant::now());
    for _ in 0..2 {
        meter.enter(start).unwrap();
    }
    let limited = meter.enter(start).unwrap_err();
    assert_eq!((limited.what, limited.max), ("requests a minute", 2));
    assert_eq!(limited.retry_after.as_secs(), 30);
    assert!(meter.enter(start + Duration::from_secs(29)).is_err());
    meter.enter(start + Duration::from_secs(31)).unwrap();
    assert!(meter.enter(start + Duration::from_secs(31)).is_err());
}

#[test]
fn tokens_may_end_in_debt_which_is_worked_off_before_the_next_request() {
    let limits = Limits { tokens_per_minute: Some(60), ..Limits::default() };
    let key = generate_key().unwrap();
    let keys = Keys::parse(&file(&[("a", &key, limits)]), None).unwrap();
    let (meter, start) = (keys.find(&key).unwrap(), Instant::now());
    meter.enter(start).unwrap().spend_tokens(90, start);
    let limited = meter.enter(start).unwrap_err();
    assert_eq!((limited.what, limited.max, limited.retry_after.as_secs()), ("tokens a minute", 60, 31));
    meter.enter(start + Duration::from_secs(32)).unwrap();
}

#[test]
fn requests_at_once_are_counted_until_they_end() {
    let limits = Limits { concurrency: Some(1), ..Limits::default() };
    let key = generate_key().unwrap();
    let keys = Keys::parse(&file(&[("a", &key, limits)]), None).unwrap();
    let (meter, now) = (keys.find(&key).unwrap(), Instant::now());
    let first = meter.enter(now).unwrap();
    let limited = meter.enter(now).unwrap_err();
    assert_eq!((limited.what, limited.max), ("requests at once", 1));
    drop(first);
    meter.enter(now).unwrap();
}

#[test]
fn what_a_key_has_used_outlives_a_change_of_the_file() {
    let key = generate_key().unwrap();
    let limits = |max| Limits { requests_per_minute: Some(max), ..Limits::default() };
    let old = Keys::parse(&file(&[("a", &key, limits(1))]), None).unwrap();
    let now = Instant::now();
    old.find(&key).unwrap().enter(now).unwrap();
    let new = Keys::parse(&file(&[("renamed", &key, limits(1))]), Some(&old)).unwrap();
    assert_eq!(new.find(&key).unwrap().name(), "renamed");
    assert!(new.find(&key).unwrap().enter(now).is_err());
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = KeyFile::open("/nonexistent/keys.toml".as_ref()).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/keys.toml") && error.contains("No such file"), "{error}");
}
