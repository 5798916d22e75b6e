//! SiLU gates, routing and experts.

use super::{Bench, reference as r};
use crate::{Backend, Error, Routing, Scoring};

const SCORINGS: [Scoring; 3] =
    [Scoring::Sigmoid { renormalize: true }, Scoring::Sigmoid { renormalize: false }, Scoring::Softmax];

pub(super) fn swiglu<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    for (rows, width) in [(1, 5), (6, 48)] {
        let x = bench.values(rows * 2 * width);
        let device = bench.rows(2 * width, &x)?;
        let out = bench.backend.swiglu(&device)?;
        bench.compare(&format!("swiglu {rows}x{width}"), &out, &r::swiglu(&r::wide(&x), width))?;
    }
    Ok(())
}

/// A routed set shows itself through experts that return their own number.
pub(super) fn routes<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    for scoring in SCORINGS {
        for (rows, experts, top_k) in [(1, 8, 3), (9, 16, 4), (4, 4, 4)] {
            let routing = Routing { top_k, scoring };
            let logits = bench.values(rows * experts);
            run(
                bench,
                routing,
                &logits,
                &Sizes { rows, experts, hidden: 16, intermediate: 8, first: 0, local: experts },
            )?;
        }
    }
    // Equal logits: the lowest experts win.
    let routing = Routing { top_k: 2, scoring: Scoring::Softmax };
    run(
        bench,
        routing,
        &[0.5; 6],
        &Sizes { rows: 1, experts: 6, hidden: 16, intermediate: 8, first: 0, local: 6 },
    )
}

pub(super) fn experts<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    for (rows, hidden, intermediate) in [(1, 64, 48), (5, 40, 24), (33, 64, 20)] {
        for scoring in SCORINGS {
            let logits = bench.values(rows * 8);
            let routing = Routing { top_k: 3, scoring };
            run(
                bench,
                routing,
                &logits,
                &Sizes { rows, experts: 8, hidden, intermediate, first: 0, local: 8 },
            )?;
            // An expert-parallel rank: choices elsewhere are skipped.
            run(
                bench,
                routing,
                &logits,
                &Sizes { rows, experts: 8, hidden, intermediate, first: 2, local: 3 },
            )?;
        }
    }
    // Every token to the same experts, and none to others.
    let logits: Vec<f32> = (0..20 * 8).map(|i| if i % 8 < 2 { 3.0 - (i % 8) as f32 } else { -3.0 }).collect();
    let routing = Routing { top_k: 2, scoring: SCORINGS[0] };
    run(
        bench,
        routing,
        &logits,
        &Sizes { rows: 20, experts: 8, hidden: 32, intermediate: 16, first: 0, local: 8 },
    )
}

/// The router's product and choice in one op. Its logits are small multiples of 1/8, which every storage holds exactly, and
/// many are equal: so the choice is the same everywhere.
pub(super) fn routers<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    let hidden = 16;
    for scoring in SCORINGS {
        for (rows, experts, top_k) in [(1, 8, 3), (2, 40, 8), (5, 16, 4), (9, 150, 5), (1, 150, 40)] {
            let whole = |v: &f32, most: f32| (v.clamp(-1.0, 1.0) * most).round();
            let x: Vec<f32> = bench.values(rows * hidden).iter().map(|v| whole(v, 2.0)).collect();
            let values = bench.values(experts * hidden);
            let weight: Vec<f32> = values.iter().map(|v| whole(v, 4.0) / 8.0).collect();
            let logits: Vec<f32> = r::wide(&x)
                .chunks(hidden)
                .flat_map(|x| r::linear(x, &r::wide(&weight), hidden))
                .map(|l| l as f32)
                .collect();
            let sizes = Sizes { rows, experts, hidden: 16, intermediate: 8, first: 0, local: experts };
            for sizes in [Sizes { first: 1, local: 5, ..sizes }, sizes] {
                let (x, weight) = (bench.rows(hidden, &x)?, bench.weight(&[experts, hidden], &weight)?);
                let routed = bench.backend.router(&x, &weight, Routing { top_k, scoring })?;
                compare(bench, routed, (Routing { top_k, scoring }, &logits), &sizes)?;
            }
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    experts: usize,
    hidden: usize,
    intermediate: usize,
    first: usize,
    local: usize,
}

fn run<B: Backend>(bench: &mut Bench<B>, routing: Routing, logits: &[f32], s: &Sizes) -> Result<(), Error> {
    let device_logits = bench.rows(s.experts, logits)?;
    let routed = bench.backend.route(&device_logits, routing)?;
    compare(bench, routed, (routing, logits), s)
}

/// Experts of random weights on random rows: `routed` must be what `routing` makes of `logits`.
fn compare<B: Backend>(
    bench: &mut Bench<B>,
    routed: B::Routed,
    (routing, logits): (Routing, &[f32]),
    s: &Sizes,
) -> Result<(), Error> {
    let x = bench.values(s.rows * s.hidden);
    let scaled =
        |v: Vec<f32>| -> Vec<f32> { v.iter().map(|v| half::bf16::from_f32(v * 0.2).to_f32()).collect() };
    let gate_up = scaled(bench.values(s.experts * 2 * s.intermediate * s.hidden));
    let down = scaled(bench.values(s.experts * s.hidden * s.intermediate));
    let (up_size, down_size) = (2 * s.intermediate * s.hidden, s.hidden * s.intermediate);
    let local = |data: &[f32], size: usize| data[s.first * size..(s.first + s.local) * size].to_vec();
    let device_up =
        bench.expert_weight(&[s.local, 2 * s.intermediate, s.hidden], &local(&gate_up, up_size))?;
    let device_down = bench.expert_weight(&[s.local, s.hidden, s.intermediate], &local(&down, down_size))?;
    let device_x = bench.rows(s.hidden, &x)?;
    let out = bench.backend.routed_experts(&device_x, &routed, &device_up, &device_down, s.first)?;

    let mut expected = Vec::new();
    for (x, logits) in r::wide(&x).chunks(s.hidden).zip(r::wide(logits).chunks(s.experts)) {
        let mut sum = vec![0.0; s.hidden];
        for (e, weight) in r::route(logits, routing) {
            if !(s.first..s.first + s.local).contains(&e) {
                continue;
            }
            let up = r::wide(&gate_up[e * up_size..(e + 1) * up_size]);
            let down = r::wide(&down[e * down_size..(e + 1) * down_size]);
            let activated = r::swiglu(&r::linear(x, &up, s.hidden), s.intermediate);
            let y = r::linear(&activated, &down, s.intermediate);
            sum.iter_mut().zip(y).for_each(|(s, y)| *s += weight * y);
        }
        expected.extend(sum);
    }
    let case = format!(
        "experts {:?} {} rows, {} of {} experts, {}x{}",
        routing, s.rows, s.local, s.experts, s.hidden, s.intermediate
    );
    bench.compare(&case, &out, &expected)
}
