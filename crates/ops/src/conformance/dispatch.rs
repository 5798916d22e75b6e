//! Rows sent to the ranks that hold their experts and back: the whole way, with every rank played by one backend.

use super::{Bench, reference as r};
use crate::{Backend, Error, ExpertOwners, ExpertSlots, Routing, Scoring};
use types::TokenId;

const HIDDEN: usize = 24;
const INTERMEDIATE: usize = 16;
const EXPERTS: usize = 8;

/// The weights of all experts, on the host.
struct Stack {
    gate_up: Vec<f32>,
    down: Vec<f32>,
}

pub(super) fn cases<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    for ranks in [1, 2, 4, 8] {
        for (rows, top_k) in [(1, 1), (1, 8), (7, 3), (20, 8)] {
            let logits = bench.values(rows * EXPERTS);
            round_trip(bench, &logits, ranks, top_k)?;
        }
        // Every row to the same two experts: all other ranks get nothing.
        let skewed: Vec<f32> = (0..9 * EXPERTS).map(|i| if i % EXPERTS < 2 { 2.0 } else { -2.0 }).collect();
        round_trip(bench, &skewed, ranks, 2)?;
    }
    placed(bench)?;
    counted(bench)?;
    slices(bench)
}

/// Slots of a shuffled placement with copies: experts 2 and 5 are held twice and three times.
const HELD: [u32; 11] = [5, 0, 2, 7, 5, 1, 6, 2, 3, 4, 5];

/// Every row is worked on by the slot that follows from its token and position, from any row on.
fn placed<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    const ROWS: usize = 9;
    let slots = ExpertSlots::new(EXPERTS, &HELD)?;
    let routing = Routing { top_k: 3, scoring: Scoring::Sigmoid { renormalize: true } };
    let owners = ExpertOwners { ranks: HELD.len(), experts_each: 1 };
    let logits = bench.values(ROWS * EXPERTS);
    for first_row in [0, 4] {
        let device_logits = bench.rows(EXPERTS, &logits)?;
        let own = bench.backend.slice_rows(&device_logits, first_row..ROWS)?;
        let routed = bench.backend.route(&own, routing)?;
        let routed = bench.backend.place(routed, &slots, first_row)?;
        // With a slot to each rank, the counts of the packed rows say which slots were chosen.
        let x = bench.backend.buffer(ROWS - first_row, HIDDEN)?;
        let mut counts = Vec::new();
        bench.backend.pack(&x, &routed, owners, &mut counts)?;
        let mut expected = vec![0.0; HELD.len()];
        for (row, logits) in r::wide(&logits).chunks(EXPERTS).enumerate().skip(first_row) {
            // The bench numbers tokens and positions as the rows.
            let row = row as u32;
            for (expert, _) in r::route(logits, routing) {
                expected[slots.of_row(expert, TokenId(row), row) as usize] += 1.0;
            }
        }
        let got: Vec<f32> = counts.iter().map(|count| *count as f32).collect();
        bench.compare_values(&format!("slots from row {first_row}"), &got, &expected);
    }
    Ok(())
}

/// Choices are added to what was counted before, or the backend says that it does not count.
fn counted<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    let logits = bench.values(6 * EXPERTS);
    let routing = Routing { top_k: 3, scoring: Scoring::Softmax };
    let device_logits = bench.rows(EXPERTS, &logits)?;
    let routed = bench.backend.route(&device_logits, routing)?;
    let mut counts = [10; EXPERTS];
    if !bench.backend.count_choices(&routed, &mut counts)? {
        return Ok(());
    }
    let mut expected = vec![10.0; EXPERTS];
    for logits in r::wide(&logits).chunks(EXPERTS) {
        r::route(logits, routing).into_iter().for_each(|(expert, _)| expected[expert] += 1.0);
    }
    let got: Vec<f32> = counts.iter().map(|count| *count as f32).collect();
    bench.compare_values("choices counted", &got, &expected);
    Ok(())
}

/// Slices, possibly empty, added back where they were.
fn slices<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    let data = bench.values(5 * HIDDEN);
    let x = bench.rows(HIDDEN, &data)?;
    for rows in [0..5, 1..3, 4..5, 0..0, 5..5] {
        let part = bench.backend.slice_rows(&x, rows.clone())?;
        let wide = r::wide(&data);
        bench.compare(
            &format!("slice_rows {rows:?}"),
            &part,
            &wide[rows.start * HIDDEN..rows.end * HIDDEN],
        )?;
        let zero = bench.backend.upload(HIDDEN, &[0.0; 5 * HIDDEN])?;
        let sum = bench.backend.add_rows(zero, rows.start, &part, 0.5)?;
        let inside = |at: usize| rows.contains(&(at / HIDDEN));
        let expected: Vec<f64> =
            wide.iter().enumerate().map(|(at, v)| if inside(at) { v * 0.5 } else { 0.0 }).collect();
        bench.compare(&format!("add_rows {rows:?}"), &sum, &expected)?;
    }
    Ok(())
}

fn round_trip<B: Backend>(
    bench: &mut Bench<B>,
    logits: &[f32],
    ranks: usize,
    top_k: usize,
) -> Result<(), Error> {
    let routing = Routing { top_k, scoring: Scoring::Sigmoid { renormalize: true } };
    let owners = ExpertOwners { ranks, experts_each: EXPERTS / ranks };
    let data = bench.values(logits.len() / EXPERTS * HIDDEN);
    let mut small = |count: usize| -> Vec<f32> {
        bench.values(count).iter().map(|v| half::bf16::from_f32(v * 0.2).to_f32()).collect()
    };
    let stack = Stack {
        gate_up: small(EXPERTS * 2 * INTERMEDIATE * HIDDEN),
        down: small(EXPERTS * HIDDEN * INTERMEDIATE),
    };
    let case = format!("{} rows to {ranks} ranks, top {top_k}", logits.len() / EXPERTS);
    let device_logits = bench.rows(EXPERTS, logits)?;
    let routed = bench.backend.route(&device_logits, routing)?;
    let x = bench.rows(HIDDEN, &data)?;
    let mut counts = Vec::new();
    let rows = bench.backend.pack(&x, &routed, owners, &mut counts)?;
    let expected = expected_counts(logits, routing, owners);
    let as_f32: Vec<f32> = counts.iter().map(|count| *count as f32).collect();
    bench.compare_values(&format!("counts of {case}"), &as_f32, &expected);
    let mut returned = Vec::new();
    let mut first = 0;
    for (rank, count) in counts.iter().enumerate() {
        let received = bench.backend.slice_rows(&rows, first..first + count)?;
        first += count;
        let (x, chosen) = bench.backend.unpack(&received, HIDDEN)?;
        let held = rank * owners.experts_each;
        let (up, down) = held_weights(bench, &stack, held..held + owners.experts_each)?;
        let done = bench.backend.routed_experts(&x, &chosen, &up, &down, held)?;
        returned.extend(bench.backend.read(&done)?);
    }
    let returned = bench.backend.upload(HIDDEN, &returned)?;
    let sum = bench.backend.combine(&returned, &routed, owners)?;
    bench.compare(&case, &sum, &expected_sum(&data, logits, routing, &stack))
}

fn held_weights<B: Backend>(
    bench: &mut Bench<B>,
    stack: &Stack,
    held: std::ops::Range<usize>,
) -> Result<(B::Experts, B::Experts), Error> {
    let part = |data: &[f32], size: usize| data[held.start * size..held.end * size].to_vec();
    let (up, down) =
        (part(&stack.gate_up, 2 * INTERMEDIATE * HIDDEN), part(&stack.down, HIDDEN * INTERMEDIATE));
    Ok((
        bench.expert_weight(&[held.len(), 2 * INTERMEDIATE, HIDDEN], &up)?,
        bench.expert_weight(&[held.len(), HIDDEN, INTERMEDIATE], &down)?,
    ))
}

fn expected_counts(logits: &[f32], routing: Routing, owners: ExpertOwners) -> Vec<f64> {
    let mut counts = vec![0.0; owners.ranks];
    for logits in r::wide(logits).chunks(EXPERTS) {
        let chosen = r::route(logits, routing);
        for (rank, count) in counts.iter_mut().enumerate() {
            if chosen.iter().any(|(expert, _)| owners.owner(*expert) == rank) {
                *count += 1.0;
            }
        }
    }
    counts
}

fn expected_sum(data: &[f32], logits: &[f32], routing: Routing, stack: &Stack) -> Vec<f64> {
    let (up_size, down_size) = (2 * INTERMEDIATE * HIDDEN, HIDDEN * INTERMEDIATE);
    let mut expected = Vec::new();
    for (x, logits) in r::wide(data).chunks(HIDDEN).zip(r::wide(logits).chunks(EXPERTS)) {
        let mut sum = vec![0.0; HIDDEN];
        for (expert, weight) in r::route(logits, routing) {
            let up = r::wide(&stack.gate_up[expert * up_size..(expert + 1) * up_size]);
            let down = r::wide(&stack.down[expert * down_size..(expert + 1) * down_size]);
            let activated = r::swiglu(&r::linear(x, &up, HIDDEN), INTERMEDIATE);
            let part = r::linear(&activated, &down, INTERMEDIATE);
            sum.iter_mut().zip(part).for_each(|(s, p)| *s += weight * p);
        }
        expected.extend(sum);
    }
    expected
}
