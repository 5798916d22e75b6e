//! Activations: fp32 rows whose values are already rounded to the compute dtype, or partial sums that are not.

use ops::Error;

use crate::recycle::Recycled;

/// [rows, width] fp32, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    width: usize,
    data: Recycled<f32>,
}

impl Tensor {
    /// A tensor over `data`, which holds whole rows of `width`.
    ///
    /// # Errors
    /// When `data` does not.
    pub fn new(width: usize, data: Vec<f32>) -> Result<Self, Error> {
        if width == 0 || !data.len().is_multiple_of(width) {
            let detail = format!("{} elements are not rows of {width}", data.len());
            return Err(Error::Shape { op: "tensor", detail });
        }
        Ok(Self { width, data: data.into() })
    }

    pub(crate) fn zeros(rows: usize, width: usize) -> Self {
        let mut data = Recycled::with_room(rows * width);
        data.resize(rows * width, 0.0);
        Self { width, data }
    }

    /// Whole rows of `width`, one after the other, at most `room` elements.
    pub(crate) fn collect(width: usize, room: usize, rows: impl FnOnce(&mut Vec<f32>)) -> Self {
        let mut data = Recycled::with_room(room);
        rows(&mut data);
        debug_assert!(data.len().is_multiple_of(width), "whole rows");
        Self { width, data }
    }

    /// A copy of these whole rows of `width`.
    pub(crate) fn copied(width: usize, rows: &[f32]) -> Self {
        Self::collect(width, rows.len(), |data| data.extend_from_slice(rows))
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.data.len() / self.width
    }

    /// Elements in a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// All elements, row by row.
    #[must_use]
    pub fn as_slice(&self) -> &[f32] {
        &self.data
    }

    /// All elements, to be changed in place.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.data
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.width..(row + 1) * self.width]
    }

    pub(crate) fn expect_width(&self, op: &'static str, width: usize) -> Result<(), Error> {
        if self.width == width {
            return Ok(());
        }
        Err(Error::Shape { op, detail: format!("rows of {} where {width} is needed", self.width) })
    }

    pub(crate) fn expect_shape_of(&self, op: &'static str, other: &Self) -> Result<(), Error> {
        if self.width == other.width && self.data.len() == other.data.len() {
            return Ok(());
        }
        let (a, b) = ((self.rows(), self.width), (other.rows(), other.width));
        Err(Error::Shape { op, detail: format!("{a:?} and {b:?} differ") })
    }
}
