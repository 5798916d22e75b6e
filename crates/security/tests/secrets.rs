//! The secret of a cluster.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use security::Secret;

#[test]
fn a_random_secret_is_itself_and_nothing_else() {
    let (one, other) = (Secret::random().unwrap(), Secret::random().unwrap());
    assert!(one.is(one.expose().as_bytes()));
    assert!(!one.is(other.expose().as_bytes()) && !one.is(b""));
    assert_eq!(Secret::parse(&format!(" {}\n", one.expose())).unwrap(), one);
}

#[test]
fn two_lines_are_one_that_is_shown_and_two_that_are_taken() {
    let (old, new) = ("o".repeat(32), "n".repeat(32));
    let both = Secret::parse(&format!("{new}\n{old}\n")).unwrap();
    assert_eq!(both.expose(), new);
    assert!(both.is(new.as_bytes()) && both.is(old.as_bytes()) && !both.is(b"other"));
    assert_eq!(Secret::parse(&both.expose_all()).unwrap(), both);
    let one = Secret::parse(&new).unwrap();
    assert!(one != both && !one.is(old.as_bytes()));
    assert!(Secret::parse(&format!("{new}\n{old}\n{old}")).unwrap_err().contains("two on a line each"));
    assert!(Secret::parse(&format!("{new}\nshort")).unwrap_err().contains("not 5"));
}

#[test]
fn no_formatter_shows_it() {
    let secret = Secret::random().unwrap();
    assert!(!format!("{secret:?}").contains(secret.expose()));
}

#[test]
fn what_could_be_guessed_or_not_sent_is_refused_without_being_shown() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("secret");
    for (text, why) in [("hunter2", "32 to 512 characters, not 7"), (&"ü".repeat(40), "ASCII")] {
        std::fs::write(&path, text).unwrap();
        let error = Secret::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("secret: ") && error.contains(why) && !error.contains(text), "{error}");
    }
}
