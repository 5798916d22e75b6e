//! The two storage types, and how their elements become fp32.

use half::bf16;

/// A stored element that widens to fp32 without rounding.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    /// bf16 is the upper half of an f32; unlike `half`'s conversion this has no branch for NaN and vectorises.
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// A borrowed run of stored elements.
#[derive(Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    BF16(&'a [bf16]),
}

impl<'a> Elements<'a> {
    /// Elements `start..start + len`.
    pub(crate) fn slice(self, start: usize, len: usize) -> Self {
        match self {
            Self::F32(data) => Self::F32(&data[start..start + len]),
            Self::BF16(data) => Self::BF16(&data[start..start + len]),
        }
    }
}

/// Rounds a value to bf16 precision (nearest even), kept in fp32.
#[inline(always)]
fn round_bf16(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// Rounds every element to bf16 precision.
pub(crate) fn round_all_bf16(data: &mut [f32]) {
    for value in data {
        *value = round_bf16(*value);
    }
}
