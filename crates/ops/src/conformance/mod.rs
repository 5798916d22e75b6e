//! The op set's specification as a program: seeded inputs, an f64 reference written for clarity, and a tolerance for
//! each op. Every backend runs the whole suite; a backend that passes computes what the model means.
//!
//! Inputs reach the device through [`Backend::embed`]: an embedding table whose rows are the test's rows.

mod attention;
mod dispatch;
mod draw;
mod mlp;
mod random;
mod reference;
mod rows;

use types::{Position, TokenId};

use crate::{Backend, Batch, BatchSequence, BlockTable, Error, HostTensor};

pub use draw::{AnyAsk, agrees};
pub use random::Random;

/// One comparison that did not hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Mismatch {
    /// The case, with its sizes.
    pub case: String,
    /// First element that is off.
    pub element: usize,
    /// What the backend computed there.
    pub got: f64,
    /// What the reference computed there.
    pub expected: f64,
    /// How far it may be off.
    pub allowed: f64,
}

/// What a run of the suite found.
#[derive(Debug, Default)]
pub struct Report {
    /// Comparisons made.
    pub compared: usize,
    /// Comparisons that did not hold.
    pub mismatches: Vec<Mismatch>,
}

/// Relative and absolute distance allowed between a backend and the f64 reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Times the magnitude of the reference's value.
    pub relative: f64,
    /// Added to it.
    pub absolute: f64,
}

impl Tolerance {
    /// fp32 storage and accumulation: sums of up to a few thousand products.
    pub const F32: Self = Self { relative: 2e-5, absolute: 2e-5 };
    /// bf16 storage: an ulp (2^-8) for the result's rounding, and the roundings of the intermediates (gate_up, silu, its
    /// product) carried through sums of up to a hundred weights.
    pub const BF16: Self = Self { relative: 1.0 / 128.0, absolute: 4e-2 };
}

/// Runs every case on a backend made by `make`, with inputs drawn from `seed`.
///
/// # Errors
/// When an op of the backend fails on valid inputs.
pub fn run<B: Backend>(
    make: impl FnOnce() -> Result<B, Error>,
    tolerance: Tolerance,
    seed: u64,
) -> Result<Report, Error> {
    let mut bench = Bench::new(make()?, tolerance, seed);
    bench.alone()?;
    dispatch::cases(&mut bench)?;
    Ok(bench.report)
}

/// As [`run`], without the ops that only a rank among others needs: those that lay rows out for an all-to-all.
///
/// # Errors
/// As [`run`].
pub fn run_alone<B: Backend>(
    make: impl FnOnce() -> Result<B, Error>,
    tolerance: Tolerance,
    seed: u64,
) -> Result<Report, Error> {
    let mut bench = Bench::new(make()?, tolerance, seed);
    bench.alone()?;
    Ok(bench.report)
}

/// A backend on the test bench.
struct Bench<B> {
    backend: B,
    random: Random,
    tolerance: Tolerance,
    report: Report,
}

impl<B: Backend> Bench<B> {
    fn new(backend: B, tolerance: Tolerance, seed: u64) -> Self {
        Self { backend, random: Random::new(seed), tolerance, report: Report::default() }
    }

    fn alone(&mut self) -> Result<(), Error> {
        rows::embed(self)?;
        rows::norms(self)?;
        rows::linears(self)?;
        rows::sums(self)?;
        rows::logit_rows(self)?;
        draw::draws(self)?;
        mlp::swiglu(self)?;
        mlp::routes(self)?;
        mlp::routers(self)?;
        mlp::experts(self)?;
        attention::cases(self)
    }

    /// Values the compute dtype holds exactly, so that storing inputs loses nothing.
    fn values(&mut self, count: usize) -> Vec<f32> {
        let values = (0..count).map(|_| half::bf16::from_f32(self.random.normal()).to_f32());
        values.collect()
    }

    fn weight(&mut self, shape: &[usize], data: &[f32]) -> Result<B::Weight, Error> {
        self.backend.weight(HostTensor::F32 { shape: shape.to_vec(), data: data.to_vec() })
    }

    fn expert_weight(&mut self, shape: &[usize], data: &[f32]) -> Result<B::Experts, Error> {
        self.backend.experts(HostTensor::F32 { shape: shape.to_vec(), data: data.to_vec() })
    }

    /// Puts rows on the device, as one sequence from position 0 with logits for the last row.
    fn rows(&mut self, width: usize, data: &[f32]) -> Result<B::Tensor, Error> {
        let rows = data.len() / width;
        let batch = Batch {
            tokens: (0..rows).map(|i| TokenId(i as u32)).collect(),
            sequences: vec![BatchSequence {
                rows: 0..rows,
                start: Position(0),
                tables: [BlockTable::default(), BlockTable::default()],
            }],
            logit_rows: vec![rows as u32 - 1],
            ..Batch::default()
        };
        self.rows_of(&batch, width, data)
    }

    /// Puts rows on the device as the rows of `batch`.
    fn rows_of(&mut self, batch: &Batch, width: usize, data: &[f32]) -> Result<B::Tensor, Error> {
        let numbered =
            Batch { tokens: (0..batch.tokens.len()).map(|i| TokenId(i as u32)).collect(), ..batch.clone() };
        let table = self.weight(&[data.len() / width, width], data)?;
        self.backend.begin_step(&numbered)?;
        let rows = self.backend.embed(&table, TokenId(0))?;
        self.backend.round(rows)
    }

    fn compare(&mut self, case: &str, tensor: &B::Tensor, expected: &[f64]) -> Result<(), Error> {
        let got = self.backend.read(tensor)?;
        self.compare_values(case, &got, expected);
        Ok(())
    }

    fn compare_values(&mut self, case: &str, got: &[f32], expected: &[f64]) {
        self.report.compared += 1;
        let Tolerance { relative, absolute } = self.tolerance;
        let mut mismatch = None;
        if got.len() != expected.len() {
            mismatch = Some((usize::MAX, got.len() as f64, expected.len() as f64, 0.0));
        }
        for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
            let allowed = absolute + relative * expected.abs();
            let off = (f64::from(got) - expected).abs();
            if mismatch.is_none() && (off.is_nan() || off > allowed) {
                mismatch = Some((i, f64::from(got), expected, allowed));
            }
        }
        if let Some((element, got, expected, allowed)) = mismatch {
            self.report.mismatches.push(Mismatch { case: case.to_owned(), element, got, expected, allowed });
        }
    }
}
