//! Tensors on the host, on their way from a checkpoint to a backend.

use half::bf16;
use types::{Bytes, DType};

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
