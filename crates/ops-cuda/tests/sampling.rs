//! The card draws the reference sampler's tokens, in both dtypes, at widths that vectors fit and do not.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

mod support;

use ops::conformance::Random;
use ops::sample::{Choice, Logits, Plain};
use ops::{Backend, Batch, BatchSequence, BlockTable, HostTensor};
use ops_cuda::CudaBackend;
use support::{backend, skipped};
use types::{DType, Position, TokenId};

const SEED: u64 = 20_261_124;
/// How far from a boundary, in probability, card and host may see a uniform number or a filter on different sides: the
/// card takes weights of many tokens in fp32.
const TOLERANCE: f64 = 1e-5;

/// Logits [rows, width] on the card, in its dtype.
fn on_card(card: &mut CudaBackend, width: usize, data: &[f32]) -> <CudaBackend as Backend>::Tensor {
    let rows = data.len() / width;
    let table = card.weight(HostTensor::F32 { shape: vec![rows, width], data: data.to_vec() }).unwrap();
    let tables = [BlockTable::default(), BlockTable::default()];
    let sequences = vec![BatchSequence { rows: 0..rows, start: Position(0), tables }];
    let tokens = (0..rows as u32).map(TokenId).collect();
    card.begin_step(&Batch { tokens, sequences, ..Batch::default() }).unwrap();
    let x = card.embed(&table, TokenId(0)).unwrap();
    card.round(x).unwrap()
}

fn any_draw(random: &mut Random, width: usize) -> Plain {
    let k = [1, 2, 40, 1000, width as u32 / 2, width as u32 * 2][random.below(6)];
    Plain {
        temperature: [0.0, 0.05, 0.7, 1.0, 3.0][random.below(5)],
        top_k: (random.below(2) == 1).then_some(k),
        top_p: [1.0, 1.0, 0.95, 0.5, 0.01][random.below(5)],
        min_p: [0.0, 0.0, 0.05, 1.0][random.below(4)],
        at: random.unit(),
    }
}

/// Whether the host draws `token` too, with numbers moved by no more than the tolerance.
fn agrees(token: TokenId, logits: &Logits<'_>, how: &Plain) -> bool {
    let moves = [0.0, -TOLERANCE, TOLERANCE];
    moves.iter().any(|at| {
        moves.iter().any(|top_p| {
            let at = (how.at + at).clamp(0.0, 1.0 - f64::EPSILON);
            let top_p = if how.top_p < 1.0 { (f64::from(how.top_p) + top_p) as f32 } else { 1.0 };
            logits.draw(&Plain { at, top_p, ..*how }) == token
        })
    })
}

fn check(dtype: DType) {
    if skipped() {
        return;
    }
    let mut random = Random::new(SEED);
    let mut card = backend(dtype).unwrap();
    let (mut drawn, mut same) = (0, 0);
    for (width, rows, scale) in [(37, 9, 1.0), (4099, 12, 0.0625), (32_000, 24, 1.0), (262_144, 16, 1.0)] {
        for spread in [0.3, 2.0, 8.0] {
            let mut data: Vec<f32> = (0..rows * width).map(|_| random.normal() * spread / scale).collect();
            // A row with one token, a row of equals, one with a logit that is none.
            data[width..2 * width].fill(f32::NEG_INFINITY);
            data[width + 5] = 1.0;
            data[2 * width..3 * width].fill(0.5);
            data[3 * width + 7] = f32::NAN;
            let mut how: Vec<_> = (0..rows).map(|_| Some(any_draw(&mut random, width))).collect();
            how[4] = None;
            how[5] = Some(Plain::GREEDY);
            let logits = on_card(&mut card, width, &data);
            let mut kept = card.read(&logits).unwrap();
            kept.iter_mut().for_each(|value| *value *= scale);
            let drawings = [0, rows].map(|first| card.draw(&logits, (width, scale), (first, &how)).unwrap());
            let [choices, again] = drawings.map(|drawing| card.collect(drawing).unwrap());
            assert_eq!(choices, again, "the same again");
            for (row, choice) in choices.into_iter().enumerate() {
                let place =
                    format!("seed {SEED}, {dtype} width {width} spread {spread} row {row} {:?}", how[row]);
                match (how[row], Logits::new(row, &kept[row * width..][..width])) {
                    (None, _) => assert_eq!(choice, Choice::Left, "{place}"),
                    (Some(_), Err(_)) => assert_eq!(choice, Choice::NotANumber, "{place}"),
                    (Some(how), Ok(logits)) => {
                        let Choice::Token(token) = choice else { panic!("{place}: {choice:?}") };
                        assert!(agrees(token, &logits, &how), "{place}: {token:?}, {:?}", logits.draw(&how));
                        drawn += 1;
                        same += usize::from(token == logits.draw(&how));
                    }
                }
            }
        }
    }
    println!("{dtype}: {drawn} tokens drawn, {same} the very same as the host's, all within {TOLERANCE:e}");
}

#[test]
fn the_card_draws_the_hosts_tokens_in_f32() {
    check(DType::F32);
}

#[test]
fn the_card_draws_the_hosts_tokens_in_bf16() {
    check(DType::BF16);
}
