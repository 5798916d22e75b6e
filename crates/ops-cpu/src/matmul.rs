//! y = x · wᵀ with both operands contiguous along the summed dimension, so nothing is ever packed.
//!
//! Each output is summed over eight interleaved lanes, then the lanes are added in a fixed order. The order does not
//! depend on how many rows or outputs are computed at once, which makes results independent of the batch.
//! Cost: T·O·K multiply-adds and, for few rows, O·K weight elements read once: bound by memory bandwidth in decode.

use crate::element::Elements;
use crate::lanes::{Kernel, LANES, Lanes, Loadable, add_lanes, dispatch, eight};
use crate::threads::Threads;

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

fn matmul_of<E: Loadable>(threads: &Threads, x: &[f32], w: &[E], y: &mut [f32], inner: usize) {
    let (rows, outs) = (x.len() / inner, w.len() / inner);
    let work = rows * outs * inner;
    if rows == 1 {
        threads.split(y, OUT_TILE_SINGLE, work, |first, y| {
            let w = &w[first * inner..(first + y.len()) * inner];
            dispatch(OneRow { x, w, y, inner });
        });
        return;
    }
    if threads.count() > 1 && rows < ROW_TILE * threads.count() {
        return few_rows(threads, x, w, y, inner);
    }
    // Threads share the rows; a prompt has plenty.
    threads.split(y, ROW_TILE * outs, work, |first, y| {
        let first_row = first / outs;
        let rows = y.len() / outs;
        let x = &x[first_row * inner..(first_row + rows) * inner];
        dispatch(ManyRows { x, w, y, inner });
    });
}

/// Too few rows to share out: the threads share the outputs. Each computes its own columns of y, which are then put
/// in their places; the order of every sum is the same as ever.
fn few_rows<E: Loadable>(threads: &Threads, x: &[f32], w: &[E], y: &mut [f32], inner: usize) {
    let (rows, outs) = (x.len() / inner, w.len() / inner);
    // [O, T]: a thread's outputs are contiguous.
    let mut columns = vec![0.0; y.len()];
    threads.split(&mut columns, OUT_TILE_SINGLE * rows, y.len() * inner, |first, columns| {
        let (first, count) = (first / rows, columns.len() / rows);
        let mut own = vec![0.0; columns.len()];
        dispatch(ManyRows { x, w: &w[first * inner..(first + count) * inner], y: &mut own, inner });
        for (out, column) in columns.chunks_exact_mut(rows).enumerate() {
            for row in 0..rows {
                column[row] = own[row * count + out];
            }
        }
    });
    for (out, column) in columns.chunks_exact(rows).enumerate() {
        for row in 0..rows {
            y[row * outs + out] = column[row];
        }
    }
}

/// One row against all of `w`.
struct OneRow<'a, E> {
    x: &'a [f32],
    w: &'a [E],
    y: &'a mut [f32],
    inner: usize,
}

impl<E: Loadable> Kernel for OneRow<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { x, w, y, inner } = self;
        let outs = y.len();
        tile::<L, E, 1, OUT_TILE_SINGLE>((lanes, x), w, y, Shape { inner, outs, count: outs });
    }
}

/// All rows against one cache-sized block of weights after the other.
struct ManyRows<'a, E> {
    x: &'a [f32],
    w: &'a [E],
    y: &'a mut [f32],
    inner: usize,
}

impl<E: Loadable> Kernel for ManyRows<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { x, w, y, inner } = self;
        let (rows, outs) = (x.len() / inner, w.len() / inner);
        let block = (WEIGHT_CACHE / inner).max(OUT_TILE) / OUT_TILE * OUT_TILE;
        let mut first = 0;
        while first < outs {
            let shape = Shape { inner, outs, count: block.min(outs - first) };
            let w = &w[first * inner..];
            let mut row = 0;
            while row + ROW_TILE <= rows {
                tile::<L, E, ROW_TILE, OUT_TILE>(
                    (lanes, &x[row * inner..]),
                    w,
                    &mut y[row * outs + first..],
                    shape,
                );
                row += ROW_TILE;
            }
            while row < rows {
                tile::<L, E, 1, OUT_TILE_SINGLE>(
                    (lanes, &x[row * inner..]),
                    w,
                    &mut y[row * outs + first..],
                    shape,
                );
                row += 1;
            }
            first += shape.count;
        }
    }
}

#[derive(Clone, Copy)]
struct Shape {
    /// Length of the sums.
    inner: usize,
    /// Width of a row of y.
    outs: usize,
    /// Rows of w to meet.
    count: usize,
}

/// R rows of x times the first `count` rows of w.
#[inline(always)]
fn tile<L: Lanes, E: Loadable, const R: usize, const O: usize>(
    (lanes, x): (L, &[f32]),
    w: &[E],
    y: &mut [f32],
    shape: Shape,
) {
    let Shape { inner, outs, count } = shape;
    let mut out = 0;
    while out + O <= count {
        let sums = dots::<L, E, R, O>(lanes, x, &w[out * inner..], inner);
        for r in 0..R {
            y[r * outs + out..r * outs + out + O].copy_from_slice(&sums[r]);
        }
        out += O;
    }
    while out < count {
        let sums = dots::<L, E, R, 1>(lanes, x, &w[out * inner..], inner);
        for r in 0..R {
            y[r * outs + out] = sums[r][0];
        }
        out += 1;
    }
}

/// R × O dot products of length `inner`. Loops and not iterators with closures, which might not be inlined.
#[inline(always)]
fn dots<L: Lanes, E: Loadable, const R: usize, const O: usize>(
    lanes: L,
    x: &[f32],
    w: &[E],
    inner: usize,
) -> [[f32; O]; R] {
    let mut sums = [[lanes.zero(); O]; R];
    let (x, w) = (&x[..R * inner], &w[..O * inner]);
    let whole = inner / LANES * LANES;
    let mut k = 0;
    while k < whole {
        let mut ws = [lanes.zero(); O];
        for o in 0..O {
            ws[o] = eight(lanes, w, o * inner + k);
        }
        for r in 0..R {
            let x = eight(lanes, x, r * inner + k);
            for o in 0..O {
                sums[r][o] = lanes.mul_add(x, ws[o], sums[r][o]);
            }
        }
        k += LANES;
    }
    let mut out = [[0.0; O]; R];
    for r in 0..R {
        for o in 0..O {
            let mut tail = 0.0;
            for k in whole..inner {
                tail += x[r * inner + k] * w[o * inner + k].widen();
            }
            out[r][o] = add_lanes(lanes.store(sums[r][o])) + tail;
        }
    }
    out
}

/// One dot product of fp32 with stored elements, in the same order as [`matmul`].
#[inline(always)]
pub(crate) fn dot<L: Lanes, E: Loadable>(lanes: L, x: &[f32], w: &[E]) -> f32 {
    dots::<L, E, 1, 1>(lanes, x, w, x.len())[0][0]
}
