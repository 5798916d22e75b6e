//! y = x · wᵀ with both operands contiguous along the summed dimension, so nothing is ever packed.
//!
//! Each output is summed over eight interleaved lanes, then the lanes are added in a fixed order. The order does not
//! depend on how many rows or outputs are computed at once, which makes results independent of the batch.
//! Cost: T·O·K multiply-adds and, for few rows, O·K weight elements read once: bound by memory bandwidth in decode.

use pulp::Arch;

use crate::element::{Element, Elements};
use crate::threads::Threads;

/// Lanes summed side by side: one 256-bit register.
const LANES: usize = 8;

/// Rows computed together when there are that many: x and w registers are used twice as often as loaded.
const ROW_TILE: usize = 4;
/// Outputs computed together for a tile of rows, and for a single row (where more hide the latency of the sums).
const OUT_TILE: usize = 2;
const OUT_TILE_SINGLE: usize = 8;

/// Weight elements kept in the first-level cache while a tile of them meets every row.
const WEIGHT_CACHE: usize = 8 << 10;

/// x [T, K] times w [O, K] transposed into y [T, O]. Every element of `y` is written.
pub(crate) fn matmul(threads: &Threads, x: &[f32], w: Elements<'_>, y: &mut [f32], inner: usize) {
    match w {
        Elements::F32(w) => matmul_of(threads, x, w, y, inner),
        Elements::BF16(w) => matmul_of(threads, x, w, y, inner),
    }
}

fn matmul_of<E: Element>(threads: &Threads, x: &[f32], w: &[E], y: &mut [f32], inner: usize) {
    let (rows, outs) = (x.len() / inner, w.len() / inner);
    let work = rows * outs * inner;
    if rows == 1 {
        threads.split(y, OUT_TILE_SINGLE, work, |first, y| {
            let w = &w[first * inner..(first + y.len()) * inner];
            Arch::new().dispatch(|| rows_times::<E, 1, OUT_TILE_SINGLE>(x, w, y, Shape { inner, outs: w.len() / inner }));
        });
        return;
    }
    // Threads share the rows; a prompt has plenty.
    threads.split(y, ROW_TILE * outs, work, |first, y| {
        let first_row = first / outs;
        let rows = y.len() / outs;
        let x = &x[first_row * inner..(first_row + rows) * inner];
        Arch::new().dispatch(|| blocked(x, w, y, Shape { inner, outs }));
    });
}

#[derive(Clone, Copy)]
struct Shape {
    inner: usize,
    outs: usize,
}

/// All rows against one cache-sized block of weights after the other.
#[inline(always)]
fn blocked<E: Element>(x: &[f32], w: &[E], y: &mut [f32], shape: Shape) {
    let Shape { inner, outs } = shape;
    let rows = x.len() / inner;
    let block = (WEIGHT_CACHE / inner).max(OUT_TILE) / OUT_TILE * OUT_TILE;
    let mut first = 0;
    while first < outs {
        let count = block.min(outs - first);
        let mut row = 0;
        while row + ROW_TILE <= rows {
            tile::<E, ROW_TILE, OUT_TILE>(&x[row * inner..], &w[first * inner..], &mut y[row * outs + first..], count, shape);
            row += ROW_TILE;
        }
        while row < rows {
            tile::<E, 1, OUT_TILE_SINGLE>(&x[row * inner..], &w[first * inner..], &mut y[row * outs + first..], count, shape);
            row += 1;
        }
        first += count;
    }
}

/// A few rows against all of `w`.
#[inline(always)]
fn rows_times<E: Element, const R: usize, const O: usize>(x: &[f32], w: &[E], y: &mut [f32], shape: Shape) {
    tile::<E, R, O>(x, w, y, shape.outs, shape);
}

/// R rows of x times `count` rows of w; y has rows of `shape.outs`.
#[inline(always)]
fn tile<E: Element, const R: usize, const O: usize>(x: &[f32], w: &[E], y: &mut [f32], count: usize, shape: Shape) {
    let Shape { inner, outs } = shape;
    let mut out = 0;
    while out + O <= count {
        let sums = dots::<E, R, O>(x, &w[out * inner..], inner);
        for (r, sums) in sums.iter().enumerate() {
            y[r * outs + out..r * outs + out + O].copy_from_slice(sums);
        }
        out += O;
    }
    while out < count {
        let sums = dots::<E, R, 1>(x, &w[out * inner..], inner);
        for (r, sums) in sums.iter().enumerate() {
            y[r * outs + out] = sums[0];
        }
        out += 1;
    }
}

/// R × O dot products of length `inner`.
#[inline(always)]
fn dots<E: Element, const R: usize, const O: usize>(x: &[f32], w: &[E], inner: usize) -> [[f32; O]; R] {
    let mut lanes = [[[0.0_f32; LANES]; O]; R];
    let xs: [&[f32]; R] = std::array::from_fn(|r| &x[r * inner..(r + 1) * inner]);
    let ws: [&[E]; O] = std::array::from_fn(|o| &w[o * inner..(o + 1) * inner]);
    let whole = inner / LANES * LANES;
    let mut k = 0;
    while k < whole {
        let wide: [[f32; LANES]; O] = std::array::from_fn(|o| {
            let w = &ws[o][k..k + LANES];
            std::array::from_fn(|l| w[l].widen())
        });
        for r in 0..R {
            let x = &xs[r][k..k + LANES];
            for o in 0..O {
                for l in 0..LANES {
                    lanes[r][o][l] = x[l].mul_add(wide[o][l], lanes[r][o][l]);
                }
            }
        }
        k += LANES;
    }
    std::array::from_fn(|r| {
        std::array::from_fn(|o| {
            let tail: f32 = (whole..inner).map(|k| xs[r][k] * ws[o][k].widen()).sum();
            add_lanes(lanes[r][o]) + tail
        })
    })
}

/// The lanes' sum, always in the same order.
#[inline(always)]
fn add_lanes(l: [f32; LANES]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

/// One dot product of fp32 with stored elements, in the same order as [`matmul`].
#[inline(always)]
pub(crate) fn dot<E: Element>(x: &[f32], w: &[E]) -> f32 {
    dots::<E, 1, 1>(x, w, x.len())[0][0]
}
