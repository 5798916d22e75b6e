//! Token-choice routing on the host.

use ops::{Error, Routing, Scoring};

use crate::math::{exp, sigmoid};
use crate::recycle::Recycled;
use crate::tensor::Tensor;

/// The experts of each row and their weights, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct Routed {
    /// Experts per row.
    pub top_k: usize,
    /// [T, k] expert numbers.
    pub experts: Recycled<u32>,
    /// [T, k] routing weights.
    pub weights: Recycled<f32>,
}

impl Routed {
    /// No rows yet, with room for `rows` of them.
    pub(crate) fn with_room(rows: usize, top_k: usize) -> Self {
        let room = rows * top_k;
        Self { top_k, experts: Recycled::with_room(room), weights: Recycled::with_room(room) }
    }
}

/// Chooses the k largest logits of each row (lowest expert on a tie), then scores the chosen.
pub(crate) fn route(logits: &Tensor, routing: Routing) -> Result<Routed, Error> {
    let Routing { top_k, scoring } = routing;
    if top_k == 0 || top_k > logits.width() {
        let detail = format!("top-{top_k} of {} experts", logits.width());
        return Err(Error::Shape { op: "route", detail });
    }
    let mut routed = Routed::with_room(logits.rows(), top_k);
    let mut order = Recycled::<u32>::with_room(logits.width());
    for row in 0..logits.rows() {
        let logits = logits.row(row);
        order.clear();
        order.extend(0..u32::try_from(logits.len()).unwrap_or(u32::MAX));
        let better = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if top_k < order.len() {
            order.select_nth_unstable_by(top_k - 1, better);
            order.truncate(top_k);
        }
        order.sort_unstable_by(better);
        routed.experts.extend_from_slice(&order);
        let first = routed.weights.len();
        routed.weights.extend(order.iter().map(|&e| logits[e as usize]));
        score(&mut routed.weights[first..], scoring);
    }
    Ok(routed)
}

/// Chosen logits, best first, to weights.
fn score(chosen: &mut [f32], scoring: Scoring) {
    match scoring {
        Scoring::Sigmoid { renormalize } => {
            chosen.iter_mut().for_each(|w| *w = sigmoid(*w));
            if renormalize {
                divide_by_sum(chosen);
            }
        }
        Scoring::Softmax => {
            let max = chosen[0];
            chosen.iter_mut().for_each(|w| *w = exp(*w - max));
            divide_by_sum(chosen);
        }
    }
}

fn divide_by_sum(weights: &mut [f32]) {
    // Sigmoids of very negative logits can all be (almost) zero; the guard is the reference ports' own.
    let sum = weights.iter().sum::<f32>().max(1e-12);
    weights.iter_mut().for_each(|w| *w /= sum);
}
