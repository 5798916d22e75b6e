//! Eight fp32 numbers at a time: AVX2 with FMA where the processor has it, plain arrays elsewhere. Both fuse the
//! multiply and add, so they give the same bits.

use half::bf16;

use crate::element::{Element, Elements};

/// Numbers in a vector.
pub(crate) const LANES: usize = 8;

/// The instructions a kernel is compiled for.
pub(crate) trait Lanes: Copy {
    /// Eight numbers.
    type Vector: Copy;

    fn zero(self) -> Self::Vector;
    fn load(self, values: &[f32; LANES]) -> Self::Vector;
    fn load_bf16(self, values: &[bf16; LANES]) -> Self::Vector;
    fn splat(self, value: f32) -> Self::Vector;
    /// a · b + c, rounded once.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    fn store(self, vector: Self::Vector) -> [f32; LANES];
}

/// A piece of work that is compiled once for each kind of [`Lanes`]. `run` must be `#[inline(always)]`, and so must
/// everything hot it calls: only then is it compiled for the instructions found.
pub(crate) trait Kernel {
    fn run<L: Lanes>(self, lanes: L);
}

/// Runs `kernel` with the widest instructions this processor has.
pub(crate) fn dispatch(kernel: impl Kernel) {
    #[cfg(target_arch = "x86_64")]
    if let Some(v3) = pulp::x86::V3::try_new() {
        return pulp::Simd::vectorize(v3, Compiled { kernel, lanes: v3 });
    }
    kernel.run(Plain);
}

/// A kernel and the instructions it is to be compiled for.
struct Compiled<K, L> {
    kernel: K,
    lanes: L,
}

impl<K: Kernel, L: Lanes> pulp::NullaryFnOnce for Compiled<K, L> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.kernel.run(self.lanes);
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for pulp::x86::V3 {
    type Vector = pulp::f32x8;

    #[inline(always)]
    fn zero(self) -> pulp::f32x8 {
        self.splat_f32x8(0.0)
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> pulp::f32x8 {
        pulp::cast(*values)
    }

    /// bf16 is the upper half of an f32.
    #[inline(always)]
    fn load_bf16(self, values: &[bf16; LANES]) -> pulp::f32x8 {
        let wide = self.convert_u16x8_to_u32x8(pulp::cast(*values));
        pulp::cast(self.shl_const_u32x8::<16>(wide))
    }

    #[inline(always)]
    fn splat(self, value: f32) -> pulp::f32x8 {
        self.splat_f32x8(value)
    }

    #[inline(always)]
    fn mul_add(self, a: pulp::f32x8, b: pulp::f32x8, c: pulp::f32x8) -> pulp::f32x8 {
        self.mul_add_f32x8(a, b, c)
    }

    #[inline(always)]
    fn store(self, vector: pulp::f32x8) -> [f32; LANES] {
        pulp::cast(vector)
    }
}

/// Any processor.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl Lanes for Plain {
    type Vector = [f32; LANES];

    fn zero(self) -> [f32; LANES] {
        [0.0; LANES]
    }

    fn load(self, values: &[f32; LANES]) -> [f32; LANES] {
        *values
    }

    fn load_bf16(self, values: &[bf16; LANES]) -> [f32; LANES] {
        values.map(Element::widen)
    }

    fn splat(self, value: f32) -> [f32; LANES] {
        [value; LANES]
    }

    fn mul_add(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|l| a[l].mul_add(b[l], c[l]))
    }

    fn store(self, vector: [f32; LANES]) -> [f32; LANES] {
        vector
    }
}

/// Stored elements that load as fp32 lanes.
pub(crate) trait Loadable: Element {
    fn load<L: Lanes>(lanes: L, values: &[Self; LANES]) -> L::Vector;
}

impl Loadable for f32 {
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, values: &[Self; LANES]) -> L::Vector {
        lanes.load(values)
    }
}

impl Loadable for bf16 {
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, values: &[Self; LANES]) -> L::Vector {
        lanes.load_bf16(values)
    }
}

/// Eight elements from `start` on.
#[inline(always)]
pub(crate) fn eight<E: Loadable, L: Lanes>(lanes: L, values: &[E], start: usize) -> L::Vector {
    match values[start..].first_chunk::<LANES>() {
        Some(chunk) => E::load(lanes, chunk),
        None => unreachable!("callers stay {LANES} elements before the end"),
    }
}

/// The lanes' sum, always in the same order.
#[inline(always)]
pub(crate) fn add_lanes(l: [f32; LANES]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

/// Widens stored elements to fp32.
pub(crate) fn widen_into(elements: Elements<'_>, out: &mut [f32]) {
    match elements {
        Elements::F32(data) => out.copy_from_slice(data),
        Elements::BF16(data) => out.iter_mut().zip(data).for_each(|(o, &e)| *o = e.widen()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul::dot;

    struct Both<'a> {
        x: &'a [f32],
        w: &'a [bf16],
        out: &'a mut f32,
    }

    impl Kernel for Both<'_> {
        #[inline(always)]
        fn run<L: Lanes>(self, lanes: L) {
            *self.out = dot(lanes, self.x, self.w);
        }
    }

    #[test]
    fn the_plain_lanes_and_the_processors_give_the_same_bits() {
        for length in [1, 8, 13, 64, 250] {
            let x: Vec<f32> = (0..length).map(|i| (i as f32 * 0.37).sin()).collect();
            let w: Vec<bf16> = (0..length).map(|i| bf16::from_f32((i as f32 * 0.11).cos())).collect();
            let (mut found, mut plain) = (0.0, 0.0);
            dispatch(Both { x: &x, w: &w, out: &mut found });
            Both { x: &x, w: &w, out: &mut plain }.run(Plain);
            assert_eq!(found.to_bits(), plain.to_bits(), "length {length}");
        }
    }
}
