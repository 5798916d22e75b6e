//! Step plans as bytes: what is written is read again, and nothing else is.

mod support;

use engine::{Config, Error, PLAN_VERSION, StepPlan};
use proptest::prelude::*;
use support::random::Random;
use support::{Driver, config, request};
use types::{BlockSize, TokenId};

/// The plans of a busy run, released slots and dropped blocks among them.
fn plans(seed: u64) -> Vec<StepPlan> {
    let mut random = Random::new(seed);
    let mut driver = Driver::new(Config { blocks: [14, 12], ..config() });
    for seq in 1..=8 {
        driver.submit(seq, request(seq as u32, random.range(1, 20), random.range(1, 20)));
    }
    let mut plans = Vec::new();
    while let Some(step) = driver.plan() {
        driver.answer(&step, |_| TokenId(50));
        plans.push(step.plan);
    }
    plans
}

fn encoded(plan: &StepPlan) -> Vec<u8> {
    let mut bytes = Vec::new();
    plan.encode(&mut bytes);
    bytes
}

/// `body` with a right checksum.
fn sealed(mut body: Vec<u8>) -> Vec<u8> {
    let checksum = crc32fast::hash(&body);
    body.extend(checksum.to_le_bytes());
    body
}

#[test]
fn a_plan_survives_its_encoding() {
    for plan in plans(1) {
        assert_eq!(StepPlan::decode(&encoded(&plan)), Ok(plan));
    }
}

#[test]
fn encoding_appends_behind_what_is_there() {
    let plan = plans(2).remove(0);
    let mut bytes = vec![1, 2, 3];
    plan.encode(&mut bytes);
    assert_eq!(bytes[..3], [1, 2, 3]);
    assert_eq!(StepPlan::decode(&bytes[3..]), Ok(plan));
}

#[test]
fn every_flipped_bit_is_noticed() {
    let plan = plans(3).remove(3);
    let bytes = encoded(&plan);
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(StepPlan::decode(&damaged), Err(Error::PlanChecksum { .. })), "bit {bit}");
    }
}

#[test]
fn every_truncation_is_noticed_even_with_a_right_checksum() {
    let bytes = encoded(&plans(4)[2]);
    for len in 0..bytes.len() {
        assert!(StepPlan::decode(&bytes[..len]).is_err(), "{len} bytes");
    }
    let body = &bytes[..bytes.len() - 4];
    for len in 0..body.len() {
        assert!(StepPlan::decode(&sealed(body[..len].to_vec())).is_err(), "{len} bytes, sealed");
    }
}

#[test]
fn bytes_after_the_end_are_refused() {
    let bytes = encoded(&plans(5)[0]);
    let mut body = bytes[..bytes.len() - 4].to_vec();
    body.push(0);
    assert_eq!(StepPlan::decode(&sealed(body)), Err(Error::PlanTrailing { extra: 1 }));
}

#[test]
fn another_version_or_format_is_refused() {
    let newer = sealed(vec![b'C', b'P', PLAN_VERSION + 1, 1, 0, 0]);
    let expected = PLAN_VERSION;
    assert_eq!(StepPlan::decode(&newer), Err(Error::PlanVersion { got: PLAN_VERSION + 1, expected }));
    let foreign = StepPlan::decode(&sealed(b"GET / HTTP/1.1".to_vec())).unwrap_err().to_string();
    assert!(foreign.contains("magic number"), "{foreign}");
}

#[test]
fn counts_beyond_the_bytes_there_are_are_refused() {
    let head = || vec![b'C', b'P', PLAN_VERSION, 1];
    let huge = [0xff, 0xff, 0xff, 0xff, 0x0f];
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("released slots", [head(), huge.to_vec()].concat()),
        ("sequences", [head(), vec![0], huge.to_vec()].concat()),
        ("number of rows", [head(), vec![0, 1, 0, 0, 0, 0, 0, 0, 0]].concat()),
        ("end position", [head(), vec![0, 1, 0], huge.to_vec(), vec![1, 0, 0, 0, 0]].concat()),
        ("logit rows", [head(), vec![0, 1, 0, 0, 1, 2, 0, 0, 0, 5]].concat()),
        ("new full blocks", [head(), vec![0, 1, 0, 0, 1, 1, 0], huge.to_vec(), vec![0]].concat()),
        ("a token or row", [head(), vec![0, 1, 0, 0, 2, 1, 0, 0, 0, 5]].concat()),
        ("step number", [vec![b'C', b'P', PLAN_VERSION], vec![0xff; 11]].concat()),
    ];
    for (field, body) in cases {
        let error = StepPlan::decode(&sealed(body)).unwrap_err().to_string();
        assert!(error.contains(field), "`{error}` should name {field}");
    }
}

#[test]
fn steady_decode_of_256_sequences_stays_small() {
    let roomy = Config {
        block_size: BlockSize::new(16).unwrap(),
        blocks: [1 << 16, 1 << 16],
        window_keys: 4096,
        context_tokens_max: 1 << 18,
        vocab_size: 1 << 18,
        step_tokens_max: 1 << 20,
        logit_rows_max: 256,
        running_max: 256,
        waiting_requests_max: 256,
        waiting_tokens_max: 1 << 24,
        ..config()
    };
    let mut driver = Driver::new(roomy);
    for seq in 1..=256 {
        driver.submit(seq, request(seq as u32, 600, 40));
    }
    driver.step();
    let step = driver.plan().unwrap();
    assert_eq!(step.plan.sequence_count(), 256);
    let bytes = encoded(&step.plan).len();
    driver.answer(&step, |_| TokenId(200_000));
    let worst = (0..16).map(|_| {
        let step = driver.plan().unwrap();
        driver.answer(&step, |_| TokenId(200_000));
        encoded(&step.plan).len()
    });
    let worst = worst.max().unwrap().max(bytes);
    assert!(worst <= 8 << 10, "{worst} bytes");
    let [first, ahead] = [driver.plan().unwrap(), driver.plan().unwrap()];
    assert!(ahead.plan.follows_on());
    let ahead = encoded(&ahead.plan).len();
    assert!(
        ahead <= encoded(&first.plan).len().max(worst),
        "a row takes no more than a token: {ahead} bytes"
    );
}

proptest! {
    #[test]
    fn garbage_is_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = StepPlan::decode(&bytes);
        let mut body = vec![b'C', b'P', PLAN_VERSION];
        body.extend(&bytes);
        let _ = StepPlan::decode(&sealed(body));
        let _ = StepPlan::decode(&sealed(bytes));
    }

    #[test]
    fn a_changed_byte_under_a_right_checksum_gives_another_plan_or_an_error(
        seed in 0_u64..4, at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        for plan in plans(seed).into_iter().take(4) {
            let bytes = encoded(&plan);
            let mut body = bytes[..bytes.len() - 4].to_vec();
            let at = at.index(body.len());
            prop_assume!(body[at] != byte);
            body[at] = byte;
            if let Ok(other) = StepPlan::decode(&sealed(body)) {
                prop_assert_ne!(other, plan);
            }
        }
    }
}
