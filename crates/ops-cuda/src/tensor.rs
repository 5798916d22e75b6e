//! What the op set's operands are on a card.

use std::cell::OnceCell;
use std::rc::Rc;

use half::bf16;
use ops::{Error, HostTensor};
use types::DType;

use crate::arena::Piece;
use crate::device::Device;
use crate::kernels::{Address, RouteParams};
use crate::memory::Resident;

/// Activations [rows, width] in the arena, fp32 or bf16.
#[derive(Debug)]
pub struct Tensor {
    piece: Piece,
    rows: usize,
    width: usize,
    dtype: DType,
}

impl Tensor {
    pub(crate) fn new(device: &Rc<Device>, rows: usize, width: usize, dtype: DType) -> Result<Self, Error> {
        Ok(Self { piece: Piece::new(device, rows * width * dtype.bytes())?, rows, width, dtype })
    }

    /// A result that a recording always leaves in the same place, if that is free.
    pub(crate) fn again(device: &Rc<Device>, kept: &Kept) -> Option<Self> {
        let &Kept { place: (offset, bytes), rows, width, dtype } = kept;
        Some(Self { piece: Piece::at(device, offset, bytes)?, rows, width, dtype })
    }

    /// The first `width` of its elements as one row.
    pub(crate) fn into_row(self, width: usize) -> Self {
        Self { rows: 1, width: width.min(self.elements()), ..self }
    }

    /// What [`Tensor::again`] needs to know.
    pub(crate) const fn kept(&self) -> Kept {
        Kept { place: self.piece.place(), rows: self.rows, width: self.width, dtype: self.dtype }
    }

    pub(crate) fn address(&self) -> Address {
        self.piece.address()
    }

    pub(crate) const fn device(&self) -> &Rc<Device> {
        self.piece.device()
    }

    pub(crate) const fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) const fn width(&self) -> usize {
        self.width
    }

    pub(crate) const fn dtype(&self) -> DType {
        self.dtype
    }

    /// What kernels call the dtype.
    pub(crate) fn is_f32(&self) -> u32 {
        u32::from(self.dtype == DType::F32)
    }

    pub(crate) const fn elements(&self) -> usize {
        self.rows * self.width
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.elements() * self.dtype.bytes()
    }

    pub(crate) fn expect(&self, op: &'static str, width: usize, dtype: DType) -> Result<(), Error> {
        if self.width == width && self.dtype == dtype {
            return Ok(());
        }
        let detail = format!("rows of {} {} where {width} {dtype} are needed", self.width, self.dtype);
        Err(Error::Shape { op, detail })
    }
}

/// Where a recording leaves its result.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept {
    place: (u64, u64),
    rows: usize,
    width: usize,
    dtype: DType,
}

/// A resident weight: [out, in], [H], or expert matrices [E, out, in], in the compute dtype.
#[derive(Debug)]
pub struct Weight {
    memory: Resident,
    dims: Vec<usize>,
}

impl Weight {
    /// Room for `dims`, not yet written.
    pub(crate) fn reserve(device: &Device, dims: &[usize], dtype: DType) -> Result<Self, Error> {
        let elements: usize = dims.iter().product();
        Ok(Self { memory: device.resident("weights", elements * dtype.bytes())?, dims: dims.to_vec() })
    }

    /// Copies `host` to the card, rounded to `dtype` when it is wider.
    pub(crate) fn load(device: &Device, host: &HostTensor, dtype: DType) -> Result<Self, Error> {
        let weight = Self::reserve(device, host.shape(), dtype)?;
        let to = weight.address();
        match (host, dtype) {
            (HostTensor::F32 { data, .. }, DType::F32) => device.upload(to, data)?,
            (HostTensor::BF16 { data, .. }, DType::BF16) => device.upload(to, data)?,
            (HostTensor::F32 { data, .. }, DType::BF16) => {
                let narrow: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
                device.upload(to, &narrow)?;
            }
            (HostTensor::BF16 { data, .. }, DType::F32) => {
                let wide: Vec<f32> = data.iter().map(|v| v.to_f32()).collect();
                device.upload(to, &wide)?;
            }
        }
        Ok(weight)
    }

    pub(crate) const fn address(&self) -> Address {
        self.memory.address()
    }

    pub(crate) const fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    pub(crate) fn dims(&self) -> &[usize] {
        &self.dims
    }

    pub(crate) fn dims1(&self, op: &'static str) -> Result<usize, Error> {
        match *self.dims {
            [width] => Ok(width),
            _ => Err(self.wrong(op, "[H]")),
        }
    }

    pub(crate) fn dims2(&self, op: &'static str) -> Result<(usize, usize), Error> {
        match *self.dims {
            [outs, inner] => Ok((outs, inner)),
            _ => Err(self.wrong(op, "[out, in]")),
        }
    }

    pub(crate) fn dims3(&self, op: &'static str) -> Result<(usize, usize, usize), Error> {
        match *self.dims {
            [experts, outs, inner] => Ok((experts, outs, inner)),
            _ => Err(self.wrong(op, "[E, out, in]")),
        }
    }

    fn wrong(&self, op: &'static str, form: &str) -> Error {
        Error::Shape { op, detail: format!("the weight has the shape {:?}, and {form} is needed", self.dims) }
    }
}

/// The experts chosen for each row and their weights, on the card.
#[derive(Debug)]
pub struct Routed {
    /// [T, k] u32
    pub(crate) experts: Piece,
    /// [T, k] fp32
    pub(crate) weights: Piece,
    pub(crate) rows: usize,
    pub(crate) top_k: usize,
    /// The choice is still to be made: `experts` and `weights` say nothing before.
    pub(crate) left: Option<LeftChoice>,
    /// `experts`, once the host has asked for them.
    pub(crate) on_host: OnceCell<Vec<u32>>,
}

/// What a choice that the router left is made of.
#[derive(Debug)]
pub(crate) struct LeftChoice {
    /// [T, E] fp32
    pub(crate) logits: Tensor,
    pub(crate) route: RouteParams,
}

/// Refuses operands of an element-wise op that do not match.
pub(crate) fn same_shape(op: &'static str, a: &Tensor, b: &Tensor) -> Result<(), Error> {
    if (a.rows(), a.width()) == (b.rows(), b.width()) {
        return Ok(());
    }
    let detail = format!("{}x{} and {}x{}", a.rows(), a.width(), b.rows(), b.width());
    Err(Error::Shape { op, detail })
}

/// Kernels take sizes as u32; a larger one is refused, not cut.
pub(crate) fn size(op: &'static str, value: usize) -> Result<u32, Error> {
    u32::try_from(value)
        .map_err(|_| Error::Shape { op, detail: format!("{value} is more than a kernel counts to") })
}
