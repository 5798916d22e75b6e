//! The card draws the reference sampler's tokens, in both dtypes, at widths that vectors fit and do not.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

mod support;

use std::time::Instant;

use ops::conformance::{AnyAsk, Random, agrees};
use ops::sample::{Ask, Choice, Plain, Recipe};
use ops::{Backend, Batch, BatchSequence, BlockTable, HostTensor};
use ops_cuda::CudaBackend;
use support::{backend, skipped};
use types::{DType, Position, TokenId};

const SEED: u64 = 20_261_124;

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

fn drawn(
    card: &mut CudaBackend,
    logits: &<CudaBackend as Backend>::Tensor,
    shape: (usize, f32),
    asks: &[Ask<'_>],
) -> Vec<Choice> {
    let drawing = card.draw(logits, shape, (0, asks)).unwrap();
    card.collect(drawing).unwrap()
}

fn check(dtype: DType) {
    if skipped() {
        return;
    }
    let mut random = Random::new(SEED);
    let mut card = backend(dtype).unwrap();
    let mut compared = 0;
    for (width, rows, scale) in [
        (7, 40, 1.0),
        (37, 9, 1.0),
        (4096, 70, 0.3),
        (4099, 12, 0.0625),
        (32_000, 24, 1.0),
        (262_144, 16, 0.25),
    ] {
        for spread in [0.02, 0.3, 2.0, 8.0] {
            let mut data: Vec<f32> = (0..rows * width).map(|_| random.normal() * spread / scale).collect();
            // A row with one token, a row of equals, one with a logit that is none.
            data[width..2 * width].fill(f32::NEG_INFINITY);
            data[width + 5] = 1.0;
            data[2 * width..3 * width].fill(0.5);
            data[3 * width + 6] = f32::NAN;
            let asks: Vec<AnyAsk> = (0..rows).map(|_| AnyAsk::new(&mut random, width)).collect();
            let mut asks: Vec<Ask<'_>> = asks.iter().map(AnyAsk::ask).collect();
            asks[4] = Ask::Nothing;
            asks[5] = Ask::GREEDY;
            let logits = on_card(&mut card, width, &data);
            let mut kept = card.read(&logits).unwrap();
            kept.iter_mut().for_each(|value| *value *= scale);
            let begun = Instant::now();
            let choices = drawn(&mut card, &logits, (width, scale), &asks);
            let took = begun.elapsed();
            assert_eq!(choices, drawn(&mut card, &logits, (width, scale), &asks), "the same again");
            for (row, (choice, ask)) in choices.iter().zip(&asks).enumerate() {
                let expected = agrees(choice, (row, &kept[row * width..][..width]), ask);
                let place = format!("seed {SEED}, {dtype} width {width} spread {spread} row {row}");
                assert_eq!(expected, Ok(()), "{place}: {choice:?} by {ask:?}");
                compared += 1;
            }
            println!("{dtype} width {width:>6} spread {spread:<4}: {rows} rows as the host's, {took:?}");
        }
    }
    println!("{dtype}: {compared} rows");
}

/// More rows with rules than are in scratch memory at once, and a history that the card does not take.
#[test]
fn many_adjusted_rows_are_drawn_in_rounds_and_a_long_history_is_left_to_the_host() {
    if skipped() {
        return;
    }
    let mut random = Random::new(SEED);
    let mut card = backend(DType::BF16).unwrap();
    let (width, rows) = (65_536, 150);
    let data: Vec<f32> = (0..rows * width).map(|_| random.normal()).collect();
    let logits = on_card(&mut card, width, &data);
    let kept = card.read(&logits).unwrap();
    let banned: Vec<Vec<TokenId>> = kept
        .chunks_exact(width)
        .map(|row| {
            let best = (0..width).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)));
            vec![TokenId(best.unwrap() as u32)]
        })
        .collect();
    let mut asks: Vec<Ask<'_>> =
        banned.iter().map(|banned| Ask::Token(Recipe { banned, ..Recipe::plain(Plain::GREEDY) })).collect();
    let seen = (0..40_000).map(|token| (TokenId(token), 1)).collect();
    let penalties = ops::sample::Penalties { repetition: 1.0, frequency: 0.1, presence: 0.0, seen };
    asks[7] = Ask::Token(Recipe { penalties: Some(penalties), ..Recipe::plain(Plain::GREEDY) });
    assert_eq!(card.left_to_host(&asks, width), [7]);
    let choices = drawn(&mut card, &logits, (width, 1.0), &asks);
    for (row, (choice, ask)) in choices.iter().zip(&asks).enumerate() {
        if row == 7 {
            assert_eq!(*choice, Choice::Left);
        } else {
            assert_eq!(agrees(choice, (row, &kept[row * width..][..width]), ask), Ok(()), "row {row}");
        }
    }
}

#[test]
fn the_card_draws_the_hosts_tokens_in_f32() {
    check(DType::F32);
}

#[test]
fn the_card_draws_the_hosts_tokens_in_bf16() {
    check(DType::BF16);
}
