//! Groups of several ranks that share one card: every way to share a model out gives the reference's log-probabilities
//! and tokens. What they say to each other goes through the hosts; `cards.rs` has a card for each rank.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

#[path = "../../model/tests/golden/mod.rs"]
mod golden;
mod group;
mod support;

use golden::{CASES, load};
use group::{On, PATIENCE, WAYS, check};
use support::skipped;
use types::{Bytes, DType};

#[test]
fn ranks_that_share_a_card_agree_with_the_reference_in_every_plan() {
    if skipped() {
        return;
    }
    let on = On { cards: false, dtype: DType::F32, one_shot: Bytes(0), patience: PATIENCE };
    for name in CASES {
        let golden = load(name);
        for way in WAYS {
            if !way.is_legal(&golden.config) {
                println!("{name}: {way:?} is not legal");
                continue;
            }
            println!("{name}, {way:?}: log-probabilities within {:.1e}", check(&golden, way, on));
        }
    }
}
