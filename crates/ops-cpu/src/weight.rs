//! Resident weights: contiguous candle tensors in bf16 or fp32.

use candle_core::{CpuStorage, DType as CandleDType, Device, Storage, Tensor as CandleTensor};
use ops::{Error, HostTensor};
use types::DType;

use crate::element::Elements;

/// A resident weight of one, two or three dimensions.
#[derive(Debug, Clone)]
pub struct Weight {
    tensor: CandleTensor,
}

impl Weight {
    /// Takes `host` over, narrowed to bf16 when that is the compute dtype.
    pub(crate) fn new(host: HostTensor, compute: DType) -> Result<Self, Error> {
        let wanted = match (host.dtype(), compute) {
            (DType::F32, DType::F32) => CandleDType::F32,
            (DType::BF16, _) | (_, DType::BF16) => CandleDType::BF16,
        };
        let tensor = match host {
            HostTensor::F32 { shape, data } => CandleTensor::from_vec(data, shape, &Device::Cpu),
            HostTensor::BF16 { shape, data } => CandleTensor::from_vec(data, shape, &Device::Cpu),
        };
        let tensor = tensor.and_then(|t| t.to_dtype(wanted)).map_err(|e| device_error("weight", &e))?;
        Ok(Self { tensor })
    }

    pub(crate) fn dims(&self) -> &[usize] {
        self.tensor.dims()
    }

    /// `[out, in]`, or an error for any other rank.
    pub(crate) fn dims2(&self, op: &'static str) -> Result<(usize, usize), Error> {
        match *self.dims() {
            [rows, columns] => Ok((rows, columns)),
            ref other => Err(Error::Shape { op, detail: format!("a matrix is needed, not {other:?}") }),
        }
    }

    /// `[experts, out, in]`, or an error for any other rank.
    pub(crate) fn dims3(&self, op: &'static str) -> Result<(usize, usize, usize), Error> {
        match *self.dims() {
            [experts, rows, columns] => Ok((experts, rows, columns)),
            ref other => {
                Err(Error::Shape { op, detail: format!("expert matrices are needed, not {other:?}") })
            }
        }
    }

    /// Runs `f` on the elements, in place.
    pub(crate) fn with<R>(&self, op: &'static str, f: impl FnOnce(Elements<'_>) -> R) -> Result<R, Error> {
        let (storage, layout) = self.tensor.storage_and_layout();
        debug_assert!(layout.is_contiguous() && layout.start_offset() == 0);
        match &*storage {
            Storage::Cpu(CpuStorage::F32(data)) => Ok(f(Elements::F32(data))),
            Storage::Cpu(CpuStorage::BF16(data)) => Ok(f(Elements::BF16(data))),
            _ => Err(Error::Device { op, reason: "a weight is neither f32 nor bf16 on the CPU".into() }),
        }
    }
}

fn device_error(op: &'static str, error: &candle_core::Error) -> Error {
    Error::Device { op, reason: error.to_string() }
}
