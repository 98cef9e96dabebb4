//! Inner loops of the CPU backend, compiled once per instruction set: f32 matrix products, exp, widening.

use multiversion::{multiversion, target::match_target};

/// Columns of the register tile: two registers of AVX-512, four of AVX2, eight of NEON.
///
/// Shorter rows are unrolled before they are vectorised, which spills every accumulator (measured: 5 GFLOP/s).
const COLS: usize = 32;

/// A row-major matrix: row `i` starts at `data[i * stride]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat<'a> {
    /// Elements.
    pub(crate) data: &'a [f32],
    /// From a row to the next.
    pub(crate) stride: usize,
}

impl<'a> Mat<'a> {
    /// A matrix whose rows follow one another `stride` elements apart.
    pub(crate) fn new(data: &'a [f32], stride: usize) -> Self {
        Self { data, stride }
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..]
    }
}

/// `C += A B`: A is `[m, k]`, B is `[k, n]`, C is `[m, n]` with row stride `c_stride`.
///
/// Each element of C is summed over `k` in order, so a row's result does not depend on the rows beside it.
/// Fastest where `n` is a multiple of 32.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn gemm(a: Mat<'_>, b: Mat<'_>, c: &mut [f32], c_stride: usize, [m, n, k]: [usize; 3]) {
    let c = Out { data: c, stride: c_stride };
    // Eight accumulator registers hide the latency of a fused multiply-add on every core we know.
    match_target! {
        "x86_64+avx512f+avx512vl+fma" => rows_of::<4>(a, b, c, [m, n, k]),
        _ => rows_of::<2>(a, b, c, [m, n, k]),
    }
}

/// `C += Aᵀ B`: A is `[k, m]`, otherwise as [`gemm`].
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn gemm_tn(a: Mat<'_>, b: Mat<'_>, c: &mut [f32], c_stride: usize, [m, n, k]: [usize; 3]) {
    let c = Out { data: c, stride: c_stride };
    match_target! {
        "x86_64+avx512f+avx512vl+fma" => columns_of::<4>(a, b, c, [m, n, k]),
        _ => columns_of::<2>(a, b, c, [m, n, k]),
    }
}

/// The matrix a product is added to.
struct Out<'a> {
    data: &'a mut [f32],
    stride: usize,
}

/// `R` rows of A at a time, then one by one.
#[inline(always)]
fn rows_of<const R: usize>(a: Mat<'_>, b: Mat<'_>, mut c: Out<'_>, [m, n, k]: [usize; 3]) {
    let whole = m - m % R;
    for (j, skip) in strips(n) {
        for i in (0..whole).step_by(R) {
            let rows: [&[f32]; R] = std::array::from_fn(|r| &a.row(i + r)[..k]);
            let acc = tile::<R>(|p| std::array::from_fn(|r| rows[r][p]), b, j, k);
            add(&acc, &mut c, [i, j], skip);
        }
        for i in whole..m {
            let row = &a.row(i)[..k];
            let acc = tile::<1>(|p| [row[p]], b, j, k);
            add(&acc, &mut c, [i, j], skip);
        }
    }
    if n < COLS {
        narrow(|i, p| a.row(i)[p], b, &mut c, [m, n, k]);
    }
}

/// `R` columns of A at a time, then one by one.
#[inline(always)]
fn columns_of<const R: usize>(a: Mat<'_>, b: Mat<'_>, mut c: Out<'_>, [m, n, k]: [usize; 3]) {
    let whole = m - m % R;
    for (j, skip) in strips(n) {
        for i in (0..whole).step_by(R) {
            let column = |p| {
                let a = &a.row(p)[i..i + R];
                std::array::from_fn(|r| a[r])
            };
            add(&tile::<R>(column, b, j, k), &mut c, [i, j], skip);
        }
        for i in whole..m {
            add(&tile::<1>(|p| [a.row(p)[i]], b, j, k), &mut c, [i, j], skip);
        }
    }
    if n < COLS {
        narrow(|i, p| a.row(p)[i], b, &mut c, [m, n, k]);
    }
}

/// Strips of [`COLS`] columns, as (first, columns done before); the last overlaps the one before it.
#[inline(always)]
fn strips(n: usize) -> impl Iterator<Item = (usize, usize)> {
    let ragged = n > COLS && !n.is_multiple_of(COLS);
    let whole = (0..n / COLS).map(|s| (s * COLS, 0));
    whole.chain(ragged.then(|| (n.saturating_sub(COLS), COLS - n % COLS)))
}

/// `R` rows by [`COLS`] columns of the product, in registers; `a` gives the `R` factors of step `p`.
#[inline(always)]
fn tile<const R: usize>(a: impl Fn(usize) -> [f32; R], b: Mat<'_>, j: usize, k: usize) -> [[f32; COLS]; R] {
    let mut acc = [[0.0_f32; COLS]; R];
    for p in 0..k {
        let a = a(p);
        let b = &b.row(p)[j..j + COLS];
        for r in 0..R {
            for x in 0..COLS {
                acc[r][x] = a[r].mul_add(b[x], acc[r][x]);
            }
        }
    }
    acc
}

/// Adds a register tile, but for its first `skip` columns, at row and column `[i, j]`.
#[inline(always)]
fn add<const R: usize>(acc: &[[f32; COLS]; R], c: &mut Out<'_>, [i, j]: [usize; 2], skip: usize) {
    for (r, acc) in acc.iter().enumerate() {
        let c = &mut c.data[(i + r) * c.stride + j..][..COLS];
        for (c, x) in c[skip..].iter_mut().zip(&acc[skip..]) {
            *c += x;
        }
    }
}

/// The product where it is narrower than a register tile.
#[inline(always)]
fn narrow(a: impl Fn(usize, usize) -> f32, b: Mat<'_>, c: &mut Out<'_>, [m, n, k]: [usize; 3]) {
    for i in 0..m {
        let mut acc = [0.0_f32; COLS];
        for p in 0..k {
            let factor = a(i, p);
            for (acc, &b) in acc[..n].iter_mut().zip(b.row(p)) {
                *acc = factor.mul_add(b, *acc);
            }
        }
        for (c, x) in c.data[i * c.stride..][..n].iter_mut().zip(&acc) {
            *c += x;
        }
    }
}

/// `2^x` in place for finite `x <= 128` or `-inf`; below -126 the result is 0.
///
/// Degree-6 Taylor-like minimax polynomial on [-0.5, 0.5]; relative error below 3e-7.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn exp2_in_place(xs: &mut [f32]) {
    for x in xs {
        *x = exp2(*x);
    }
}

/// One `2^x`, as [`exp2_in_place`]; NaN stays NaN. For loops that are compiled per instruction set themselves.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    const C: [f32; 7] = [
        1.0,
        std::f32::consts::LN_2,
        0.240_226_5,
        0.055_504_11,
        0.009_618_129,
        0.001_333_355_8,
        0.000_154_035_3,
    ];
    let clamped = x.clamp(-126.0, 127.0);
    // Adding 1.5 * 2^23 rounds to an integer in the low mantissa bits.
    let shifted = clamped + 12_582_912.0;
    let whole = shifted - 12_582_912.0;
    let f = clamped - whole;
    let mut p = C[6];
    for c in C.iter().rev().skip(1) {
        p = p.mul_add(f, *c);
    }
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
    if x < -126.0 { 0.0 } else { p * scale }
}

/// Widens bfloat16; both slices have one length.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn widen_bf16(from: &[half::bf16], into: &mut [f32]) {
    for (x, y) in from.iter().zip(into) {
        *y = f32::from_bits(u32::from(x.to_bits()) << 16);
    }
}

/// Transposes `from [rows, cols]` into `into [cols, rows]`, row strides `cols` and `rows`.
pub(crate) fn transpose(from: &[f32], rows: usize, cols: usize, into: &mut [f32]) {
    for (i, row) in from.chunks_exact(cols).take(rows).enumerate() {
        for (j, &x) in row.iter().enumerate() {
            into[j * rows + i] = x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gemm_adds_the_product_for_ragged_extents() {
        for (m, n, k) in [(1, 1, 1), (6, 16, 8), (7, 33, 5), (13, 40, 64), (9, 32, 3), (5, 95, 2)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i % 5) as f32 - 2.0).collect();
            let mut c = vec![1.0; m * n];
            gemm(Mat::new(&a, k), Mat::new(&b, n), &mut c, n, [m, n, k]);
            for i in 0..m {
                for j in 0..n {
                    let want: f32 = 1.0 + (0..k).map(|p| a[i * k + p] * b[p * n + j]).sum::<f32>();
                    assert_eq!(c[i * n + j], want);
                }
            }
            let mut a_t = vec![0.0; m * k];
            transpose(&a, m, k, &mut a_t);
            let mut c_t = vec![1.0; m * n];
            gemm_tn(Mat::new(&a_t, m), Mat::new(&b, n), &mut c_t, n, [m, n, k]);
            assert_eq!(c, c_t);
        }
    }

    #[test]
    fn exp2_is_exact_to_a_few_ulp_and_zero_far_below() {
        let xs: Vec<f32> = (-2000..=1000).map(|i| i as f32 * 0.06).collect();
        let mut got = xs.clone();
        exp2_in_place(&mut got);
        for (x, y) in xs.iter().zip(&got) {
            let want = f64::from(*x).exp2();
            assert!((f64::from(*y) - want).abs() <= 4e-7 * want, "2^{x}: {y}");
        }
        let mut low = [f32::NEG_INFINITY, -200.0, 0.0];
        exp2_in_place(&mut low);
        assert_eq!(low, [0.0, 0.0, 1.0]);
    }

    #[test]
    fn widening_is_exact_for_every_bfloat16() {
        let from: Vec<half::bf16> = (0..=u16::MAX).map(half::bf16::from_bits).collect();
        let mut got = vec![0.0; from.len()];
        widen_bf16(&from, &mut got);
        for (x, y) in from.iter().zip(got) {
            assert!(x.to_f32() == y || (x.is_nan() && y.is_nan()), "{x:?}: {y}");
        }
    }

    #[test]
    #[ignore = "a timing, not a law"]
    fn gemm_rate() {
        type Gemm = fn(Mat<'_>, Mat<'_>, &mut [f32], usize, [usize; 3]);
        let (m, k) = (64, 64);
        for (name, gemm, n) in [("nn", gemm as Gemm, 128), ("nn", gemm, 32), ("tn", gemm_tn, 32)] {
            let (a, b, mut c) = (vec![1.0; m * k], vec![1.0; k * n], vec![0.0; m * n]);
            // The best of many short runs: other work on the machine only ever adds time.
            let time = |_| {
                let start = std::time::Instant::now();
                (0..20).for_each(|_| gemm(Mat::new(&a, k), Mat::new(&b, n), &mut c, n, [m, n, k]));
                start.elapsed().as_secs_f64() / 20.0
            };
            let best = (0..500).map(time).fold(f64::INFINITY, f64::min);
            println!("{name} {n}: {:.1} GFLOP/s", (2 * m * n * k) as f64 / best / 1e9);
        }
    }
}
