//! Element types: what is on disk, what the model computes in, and the conversions between them.

use bytemuck::Pod;
use half::{bf16, f16};
use safetensors::Dtype;

// Safetensors is little endian, and elements of equal type are read straight into place.
const _: () = assert!(cfg!(target_endian = "little"), "weights are read without swapping bytes");

/// An element type weights may be read into: f32 or bf16.
pub trait Element: Pod + Send + Sync {
    /// The same type on disk, which needs no conversion.
    const STORED: Dtype;

    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const STORED: Dtype = Dtype::F32;

    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const STORED: Dtype = Dtype::BF16;

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Bytes of one element of a stored type, or `None` for types that weights are not read from.
pub(crate) const fn stored_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::BF16 | Dtype::F16 => Some(2),
        _ => None,
    }
}

/// Converts `bytes`, elements of `dtype`, into `out`; their counts are equal.
pub(super) fn convert<T: Element>(dtype: Dtype, bytes: &[u8], out: &mut [T]) {
    match dtype {
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        other => unreachable!("weights of type {other} are refused before they are read"),
    }
}

fn each<T: Element, const N: usize>(bytes: &[u8], out: &mut [T], value: impl Fn([u8; N]) -> f32) {
    let (elements, rest) = bytes.as_chunks::<N>();
    assert!(rest.is_empty() && elements.len() == out.len(), "one element read for each wanted");
    for (out, element) in out.iter_mut().zip(elements) {
        *out = T::from_f32(value(*element));
    }
}
