//! Ops on rows: embedding, norms, products, sums.

use types::TokenId;

use super::{Bench, reference as r};
use crate::{Backend, Error, Norm};

/// (rows, in, out): one row, tiles and remainders of every kernel, widths that are no multiple of a vector.
const LINEAR_SHAPES: [(usize, usize, usize); 7] =
    [(1, 64, 48), (1, 250, 37), (3, 64, 9), (4, 128, 64), (5, 33, 7), (17, 256, 130), (64, 96, 31)];

pub(super) fn embed<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    let (vocab, width, rows) = (24, 40, 11);
    let table = bench.values(vocab * width);
    let ids: Vec<usize> = (0..rows).map(|_| bench.random.below(vocab)).collect();
    // Two vocabulary-parallel ranks' parts, one after the other: each token is in exactly one of them.
    for (first, count) in [(0, 16), (16, 8)] {
        let part = bench.weight(&[count, width], &table[first * width..(first + count) * width])?;
        bench.rows(width, &table[..rows * width])?;
        let tokens = ids.iter().map(|&id| TokenId(id as u32)).collect();
        let batch = crate::Batch { tokens, sequences: one_sequence(rows), logit_rows: vec![], fed: vec![] };
        bench.backend.begin_step(&batch)?;
        let out = bench.backend.embed(&part, TokenId(first as u32))?;
        let row = |&id: &usize| match (first..first + count).contains(&id) {
            true => table[id * width..(id + 1) * width].to_vec(),
            false => vec![0.0; width],
        };
        let expected: Vec<f32> = ids.iter().flat_map(row).collect();
        bench.compare(&format!("embed tokens {first}..{}", first + count), &out, &r::wide(&expected))?;
    }
    Ok(())
}

fn one_sequence(rows: usize) -> Vec<crate::BatchSequence> {
    let tables = [crate::BlockTable::default(), crate::BlockTable::default()];
    vec![crate::BatchSequence { rows: 0..rows, start: types::Position(0), tables }]
}

pub(super) fn norms<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    for kind in
        [Norm::Rms { eps: 1e-6 }, Norm::Layer { eps: 1e-5 }, Norm::Rms { eps: 0.5 }, Norm::Layer { eps: 0.5 }]
    {
        for (rows, width) in [(1, 64), (3, 67), (9, 256)] {
            // A mean far from zero tells the two kinds apart.
            let x: Vec<f32> = bench.values(rows * width).iter().map(|v| v + 2.0).collect();
            let x: Vec<f32> = x.into_iter().map(|v| half::bf16::from_f32(v).to_f32()).collect();
            let weight = bench.values(width);
            let (device_x, device_w) = (bench.rows(width, &x)?, bench.weight(&[width], &weight)?);
            let out = bench.backend.norm(&device_x, &device_w, kind)?;
            let expected = r::norm(&r::wide(&x), &r::wide(&weight), kind);
            bench.compare(&format!("{kind:?} of {rows}x{width}"), &out, &expected)?;
        }
    }
    Ok(())
}

pub(super) fn linears<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    for (rows, inner, outs) in LINEAR_SHAPES {
        let (x, w) = (bench.values(rows * inner), bench.values(outs * inner));
        let scaled: Vec<f32> = w.iter().map(|v| half::bf16::from_f32(v * 0.1).to_f32()).collect();
        let (device_x, device_w) = (bench.rows(inner, &x)?, bench.weight(&[outs, inner], &scaled)?);
        let expected = r::linear(&r::wide(&x), &r::wide(&scaled), inner);
        let out = bench.backend.linear(&device_x, &device_w)?;
        bench.compare(&format!("linear {rows}x{inner} to {outs}"), &out, &expected)?;
        let out = bench.backend.linear_partial(&device_x, &device_w)?;
        bench.compare(&format!("linear_partial {rows}x{inner} to {outs}"), &out, &expected)?;
    }
    Ok(())
}

pub(super) fn sums<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    let (rows, width) = (5, 48);
    let (a, b) = (bench.values(rows * width), bench.values(rows * width));
    for scale in [1.0_f32, 0.5] {
        let (device_a, device_b) = (bench.rows(width, &a)?, bench.rows(width, &b)?);
        let out = bench.backend.add_scaled(device_a, &device_b, scale)?;
        let expected: Vec<f64> =
            a.iter().zip(&b).map(|(a, b)| f64::from(*a) + f64::from(scale * b)).collect();
        bench.compare(&format!("add_scaled by {scale}"), &out, &expected)?;
    }
    let (device_a, device_b) = (bench.rows(width, &a)?, bench.rows(width, &b)?);
    let out = bench.backend.residual_add(device_a, &device_b)?;
    let expected: Vec<f64> = a.iter().zip(&b).map(|(a, b)| f64::from(*a) + f64::from(*b)).collect();
    bench.compare("residual_add", &out, &expected)
}

pub(super) fn logit_rows<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    let (rows, width) = (7, 16);
    let x = bench.values(rows * width);
    let batch = crate::Batch {
        tokens: vec![TokenId(0); rows],
        sequences: one_sequence(rows),
        logit_rows: vec![1, 2, 5, 6],
        fed: vec![],
    };
    let device = bench.rows_of(&batch, width, &x)?;
    let out = bench.backend.logit_rows(&device, 1..3)?;
    let expected: Vec<f32> =
        [2, 5].iter().flat_map(|&row: &usize| x[row * width..(row + 1) * width].to_vec()).collect();
    bench.compare("logit_rows", &out, &r::wide(&expected))
}
