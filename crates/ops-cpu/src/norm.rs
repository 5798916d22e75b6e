//! RMSNorm (T5 style) and mean-subtracting LayerNorm, both with a weight and no bias.

use ops::Norm;

use crate::element::{Element, Elements};
use crate::lanes::{Kernel, Lanes, dispatch};

/// Normalises rows of `x` [T, H] into `y`; `round` is applied where the contract rounds to the compute dtype.
pub(crate) fn norm(x: &[f32], weight: Elements<'_>, kind: Norm, rounds: bool, y: &mut [f32]) {
    match weight {
        Elements::F32(w) => rows(x, w, kind, rounds, y),
        Elements::BF16(w) => rows(x, w, kind, rounds, y),
    }
}

fn rows<E: Element>(x: &[f32], weight: &[E], kind: Norm, rounds: bool, y: &mut [f32]) {
    let width = weight.len();
    for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
        dispatch(Row { x, weight, kind, rounds, y });
    }
}

/// One row; its loops are left to the compiler.
struct Row<'a, E> {
    x: &'a [f32],
    weight: &'a [E],
    kind: Norm,
    rounds: bool,
    y: &'a mut [f32],
}

impl<E: Element> Kernel for Row<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) {
        let Self { x, weight, kind, rounds, y } = self;
        match kind {
            Norm::Rms { eps } => rms(x, weight, eps, rounds, y),
            Norm::Layer { eps } => layer(x, weight, eps, y),
        }
    }
}

#[inline(always)]
fn rms<E: Element>(x: &[f32], weight: &[E], eps: f32, rounds: bool, y: &mut [f32]) {
    let mean_square = sum(x, |v| v * v) / x.len() as f32;
    let factor = 1.0 / (mean_square + eps).sqrt();
    for i in 0..x.len() {
        let normed = x[i] * factor;
        // The reference casts the normalised value before the weight multiplies it.
        let normed = if rounds { half::bf16::from_f32(normed).to_f32() } else { normed };
        y[i] = normed * weight[i].widen();
    }
}

#[inline(always)]
fn layer<E: Element>(x: &[f32], weight: &[E], eps: f32, y: &mut [f32]) {
    let count = x.len() as f32;
    let mean = sum(x, |v| v) / count;
    let variance = sum(x, |v| (v - mean) * (v - mean)) / count;
    let factor = 1.0 / (variance + eps).sqrt();
    for i in 0..x.len() {
        y[i] = (x[i] - mean) * factor * weight[i].widen();
    }
}

/// Sum over eight interleaved lanes: more exact than left to right, and vectorised.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let (whole, rest) = x.as_chunks::<8>();
    for chunk in whole {
        for l in 0..8 {
            lanes[l] += f(chunk[l]);
        }
    }
    let tail: f32 = rest.iter().map(|&v| f(v)).sum();
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7])) + tail
}
