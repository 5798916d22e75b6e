//! Routed experts: rows are grouped by expert, each expert meets its rows once, results are added expert by expert
//! in ascending order, so a row's sum does not depend on the batch.

use ops::Error;
use types::DType;

use crate::backend::swiglu_rows;
use crate::element::{Elements, round_all_bf16};
use crate::matmul::matmul;
use crate::route::Routed;
use crate::tensor::Tensor;
use crate::threads::Threads;
use crate::weight::Weight;

/// One expert's share of a step.
struct Task {
    expert: usize,
    /// (row, routing weight)
    rows: Vec<(usize, f32)>,
    /// [rows, H], not yet weighted.
    out: Vec<f32>,
}

/// What every task reads.
struct Inputs<'a> {
    x: &'a Tensor,
    gate_up: Elements<'a>,
    down: Elements<'a>,
    /// I
    intermediate: usize,
    dtype: DType,
}

/// Where the weights of this rank's experts are.
pub(crate) struct Stack<'a> {
    pub(crate) gate_up: &'a Weight,
    pub(crate) down: &'a Weight,
    pub(crate) first_expert: usize,
}

/// Σ over chosen experts of weight · down(silu(gate) · up): [T, H] fp32.
pub(crate) fn routed_experts(
    threads: &Threads,
    x: &Tensor,
    routed: &Routed,
    stack: &Stack<'_>,
    dtype: DType,
) -> Result<Tensor, Error> {
    let (experts, double, hidden) = stack.gate_up.dims3("routed_experts")?;
    let (down_experts, down_hidden, intermediate) = stack.down.dims3("routed_experts")?;
    x.expect_width("routed_experts", hidden)?;
    if down_experts != experts || down_hidden != hidden || double != 2 * intermediate {
        let detail = format!(
            "gate_up {:?} and down {:?} do not belong together",
            stack.gate_up.dims(),
            stack.down.dims()
        );
        return Err(Error::Shape { op: "routed_experts", detail });
    }
    let mut tasks = group_by_expert(routed, stack.first_expert, experts);
    let work = routed.experts.len() * intermediate * hidden * 3;
    stack.gate_up.with("routed_experts", |gate_up| {
        stack.down.with("routed_experts", |down| {
            let inputs = Inputs { x, gate_up, down, intermediate, dtype };
            // Many experts: one thread each. A single one: the threads share its rows.
            if tasks.len() >= threads.count() {
                let alone = Threads::single();
                threads.each(&mut tasks, work, |task| run(&alone, &inputs, task));
            } else {
                tasks.iter_mut().for_each(|task| run(threads, &inputs, task));
            }
            combine(x.rows(), hidden, &tasks)
        })
    })?
}

fn group_by_expert(routed: &Routed, first_expert: usize, experts: usize) -> Vec<Task> {
    let mut by_expert: Vec<Vec<(usize, f32)>> = vec![Vec::new(); experts];
    for (i, (&expert, &weight)) in routed.experts.iter().zip(routed.weights.iter()).enumerate() {
        let local = (expert as usize).checked_sub(first_expert).filter(|&e| e < experts);
        if let Some(local) = local {
            by_expert[local].push((i / routed.top_k, weight));
        }
    }
    let chosen = by_expert.into_iter().enumerate().filter(|(_, rows)| !rows.is_empty());
    chosen.map(|(expert, rows)| Task { expert, rows, out: Vec::new() }).collect()
}

fn run(threads: &Threads, inputs: &Inputs<'_>, task: &mut Task) {
    let (hidden, intermediate) = (inputs.x.width(), inputs.intermediate);
    let count = task.rows.len();
    let mut gathered = Vec::with_capacity(count * hidden);
    for &(row, _) in &task.rows {
        gathered.extend_from_slice(inputs.x.row(row));
    }
    let size = 2 * intermediate * hidden;
    let mut gate_up = vec![0.0; count * 2 * intermediate];
    matmul(threads, &gathered, inputs.gate_up.slice(task.expert * size, size), &mut gate_up, hidden);
    if inputs.dtype == DType::BF16 {
        round_all_bf16(&mut gate_up);
    }
    let mut activated = vec![0.0; count * intermediate];
    swiglu_rows(&gate_up, intermediate, inputs.dtype, &mut activated);
    let size = hidden * intermediate;
    task.out = vec![0.0; count * hidden];
    matmul(threads, &activated, inputs.down.slice(task.expert * size, size), &mut task.out, intermediate);
}

fn combine(rows: usize, hidden: usize, tasks: &[Task]) -> Tensor {
    let mut sum = Tensor::zeros(rows, hidden);
    let out = sum.as_mut_slice();
    for task in tasks {
        for (&(row, weight), y) in task.rows.iter().zip(task.out.chunks_exact(hidden)) {
            for (o, &y) in out[row * hidden..(row + 1) * hidden].iter_mut().zip(y) {
                *o += weight * y;
            }
        }
    }
    sum
}
