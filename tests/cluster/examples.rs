//! The cluster files in `deploy/examples` are ones this version reads.

use crate::support::{ended, root};

#[test]
fn every_example_is_a_valid_configuration() {
    let mut checked = 0;
    for entry in std::fs::read_dir(root().join("deploy/examples")).unwrap() {
        let flag = format!("--config={}", entry.unwrap().path().display());
        let (status, said) = ended(&["config", "check", &flag]);
        assert!(status.success(), "{flag}: {said}");
        checked += 1;
    }
    assert!(checked >= 2, "{checked} examples");
}
