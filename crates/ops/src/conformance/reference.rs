//! The ops in f64, as plainly as they can be said.

use crate::{Norm, Routing, Scoring, Window};

pub(super) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

pub(super) fn norm(x: &[f64], weight: &[f64], kind: Norm) -> Vec<f64> {
    let width = weight.len();
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks(width) {
        let (mean, eps) = match kind {
            Norm::Rms { eps } => (0.0, eps),
            Norm::Layer { eps } => (row.iter().sum::<f64>() / width as f64, eps),
        };
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
        let factor = 1.0 / (variance + f64::from(eps)).sqrt();
        out.extend(row.iter().zip(weight).map(|(v, w)| (v - mean) * factor * w));
    }
    out
}

/// x [T, K] · w [O, K] transposed
pub(super) fn linear(x: &[f64], w: &[f64], inner: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    x.chunks(inner).flat_map(|x| w.chunks(inner).map(move |w| dot(x, w))).collect()
}

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// silu(gate) · up over rows [2I]
pub(super) fn swiglu(gate_up: &[f64], width: usize) -> Vec<f64> {
    let row =
        |row: &[f64]| -> Vec<f64> { (0..width).map(|i| row[i] * sigmoid(row[i]) * row[width + i]).collect() };
    gate_up.chunks(2 * width).flat_map(row).collect()
}

/// (expert, weight) of the chosen, best first.
pub(super) fn route(logits: &[f64], routing: Routing) -> Vec<(usize, f64)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(routing.top_k);
    let score = |&e: &usize| match routing.scoring {
        Scoring::Sigmoid { .. } => sigmoid(logits[e]),
        Scoring::Softmax => logits[e].exp(),
    };
    let scores: Vec<f64> = order.iter().map(score).collect();
    let sum = match routing.scoring {
        Scoring::Sigmoid { renormalize: false } => 1.0,
        Scoring::Sigmoid { renormalize: true } | Scoring::Softmax => scores.iter().sum(),
    };
    order.into_iter().zip(scores.into_iter().map(|s| s / sum)).collect()
}

/// Turns a head's pairs (2i, 2i+1) by position · theta^(-2i/D).
pub(super) fn rope(head: &mut [f64], position: u32, theta: f64) {
    let width = head.len() as f64;
    for i in 0..head.len() / 2 {
        let angle = f64::from(position) * theta.powf(-((2 * i) as f64) / width);
        let (sin, cos) = angle.sin_cos();
        let (a, b) = (head[2 * i], head[2 * i + 1]);
        head[2 * i] = a * cos - b * sin;
        head[2 * i + 1] = b * cos + a * sin;
    }
}

/// One query head against the keys and values of all positions up to its own.
pub(super) fn attend(q: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>], window: Window) -> Vec<f64> {
    let first = match window {
        Window::All => 0,
        Window::Keys(n) => keys.len().saturating_sub(n as usize),
    };
    let scale = 1.0 / (q.len() as f64).sqrt();
    let scores = keys[first..].iter().map(|k| scale * q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>());
    let weights: Vec<f64> = scores.map(f64::exp).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; q.len()];
    for (weight, value) in weights.iter().zip(&values[first..]) {
        out.iter_mut().zip(value).for_each(|(o, v)| *o += weight / sum * v);
    }
    out
}
