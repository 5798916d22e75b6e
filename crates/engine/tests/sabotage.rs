//! The simulation finds bugs: with each one switched on, some seed fails.

mod support;

use std::panic::catch_unwind;

use engine::Sabotage;
use support::sim::run;

/// Seeds within which every bug must show.
const SEEDS: u64 = 60;

#[test]
fn every_bug_is_caught() {
    // The panics are what is wanted; their messages would only hide the ones that are not.
    std::panic::set_hook(Box::new(|_| {}));
    let caught = |bug| (0..SEEDS).find(|&seed| catch_unwind(|| run(seed, 500, Some(bug))).is_err());
    let found = Sabotage::ALL.map(|bug| (bug, caught(bug)));
    let _ = std::panic::take_hook();
    println!("bug and first seed that fails: {found:?}");
    let missed: Vec<_> = found.iter().filter(|(_, seed)| seed.is_none()).map(|(bug, _)| bug).collect();
    assert!(missed.is_empty(), "not caught within {SEEDS} seeds: {missed:?}");
}
