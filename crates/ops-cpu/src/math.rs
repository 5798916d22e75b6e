//! Functions of one number, written so that loops over them vectorise.

/// Magic constant whose addition rounds an f32 of small magnitude to the nearest integer.
const ROUND: f32 = 12_582_912.0;

/// e^x to about one unit in the last place (Cephes `expf`: range reduction by ln 2, degree-5 polynomial).
/// Values below -87 give the smallest normal numbers or zero, above 88 infinity-near values; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 88.3 { 88.3 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, 355/512 and the rest, so that n · ln2 is exact enough to subtract.
    let r = n.mul_add(-355.0 / 512.0, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    // `shifted` holds n in its low mantissa bits; moving them to the exponent multiplies by 2^n.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    y * scale
}

/// Logistic function.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x · sigmoid(x)
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_library_over_its_range() {
        for i in -8_700..8_800 {
            let x = i as f32 / 100.0;
            let (ours, reference) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / reference - 1.0).abs() < 3e-7, "exp({x}) = {ours}, not {reference}");
        }
    }

    #[test]
    fn extremes_do_not_become_nan() {
        assert!(exp(-1e30) < 1e-37);
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
        assert!(exp(1e30) > 1e38);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
    }
}
