//! Tensors on the host, on their way from a checkpoint to a backend.

use std::sync::Arc;

use half::bf16;
use types::{Bytes, DType};

use crate::Error;

/// A dense row-major tensor in host memory, handed to a backend by value so that nothing is held twice.
#[derive(Debug, Clone, PartialEq)]
pub enum HostTensor {
    /// fp32 elements.
    F32 {
        /// Sizes, outermost first.
        shape: Vec<usize>,
        /// `shape.product()` elements.
        data: Vec<f32>,
    },
    /// bf16 elements.
    BF16 {
        /// Sizes, outermost first.
        shape: Vec<usize>,
        /// `shape.product()` elements.
        data: Vec<bf16>,
    },
}

impl HostTensor {
    /// Zeros of `dtype`.
    #[must_use]
    pub fn zeros(dtype: DType, shape: &[usize]) -> Self {
        let count = shape.iter().product();
        match dtype {
            DType::F32 => Self::F32 { shape: shape.to_vec(), data: vec![0.0; count] },
            DType::BF16 => Self::BF16 { shape: shape.to_vec(), data: vec![bf16::ZERO; count] },
        }
    }

    /// Sizes, outermost first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::F32 { shape, .. } | Self::BF16 { shape, .. } => shape,
        }
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        match self {
            Self::F32 { .. } => DType::F32,
            Self::BF16 { .. } => DType::BF16,
        }
    }

    /// Memory held by the elements.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let count: usize = self.shape().iter().product();
        Bytes((count * self.dtype().bytes()) as u64)
    }
}

/// Host memory that a device lends for a part of a weight (page-locked, say); it goes back when dropped.
pub trait HostBytes: Send {
    /// All of it, aligned for any element type.
    fn as_mut_slice(&mut self) -> &mut [u8];
}

/// Lends memory to the threads that read weights.
pub trait HostMemory: Send + Sync {
    /// [`WeightParts::part_bytes_max`] bytes, whatever was in them before; waits until some are back when all are lent.
    fn take(&self) -> Box<dyn HostBytes>;
}

/// Consecutive elements of a weight, in the dtype it is kept in.
pub struct HostPart {
    /// Number of the first element within the weight.
    pub first: usize,
    /// Bytes of the elements, at the beginning of `memory`.
    pub bytes: usize,
    /// Where they are.
    pub memory: Box<dyn HostBytes>,
}

/// A device that takes weights part by part out of host memory that it lends: what was read is copied while the next
/// part is read, no weight is ever whole in host memory, and nothing is copied twice there. One weight at a time.
///
/// At most one part is with the reader and two are with the device, so a device that lends three never lets the reader
/// wait for itself.
pub trait WeightParts {
    /// [`crate::Backend::Weight`].
    type Weight;
    /// [`crate::Backend::Experts`].
    type Experts;

    /// Bytes of a part at most.
    fn part_bytes_max(&self) -> usize;

    /// The memory parts come in; asked once before the first weight.
    ///
    /// # Errors
    /// When the host has no such memory left.
    fn memory(&mut self) -> Result<Arc<dyn HostMemory>, Error>;

    /// Begins a weight of this shape, of the dtype that weights are kept in. Every element is written by one part.
    ///
    /// # Errors
    /// When the device's memory runs out.
    fn begin(&mut self, shape: &[usize]) -> Result<(), Error>;

    /// Takes a part of the weight that was begun.
    ///
    /// # Errors
    /// When it reaches beyond the weight, or on a device failure.
    fn write(&mut self, part: HostPart) -> Result<(), Error>;

    /// Ends the weight that was begun: [out, in] or [H].
    ///
    /// # Errors
    /// When elements are missing.
    fn end_weight(&mut self) -> Result<Self::Weight, Error>;

    /// Ends the weight that was begun: [E, out, in].
    ///
    /// # Errors
    /// As [`WeightParts::end_weight`]; when the shape is another.
    fn end_experts(&mut self) -> Result<Self::Experts, Error>;

    /// After the last weight: all parts have arrived, and the memory may go.
    ///
    /// # Errors
    /// On a device failure.
    fn finish(&mut self) -> Result<(), Error>;
}
