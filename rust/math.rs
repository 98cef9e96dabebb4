//! The two inner loops of the CPU backend: a small f32 matrix product and exp, compiled once per instruction set.

use multiversion::multiversion;

/// Rows and columns of the register tile: 6 x 16 f32 fit the sixteen 8-lane registers of AVX2 and half of AVX-512.
const ROWS: usize = 6;
const COLS: usize = 16;

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
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn gemm(a: Mat<'_>, b: Mat<'_>, c: &mut [f32], c_stride: usize, [m, n, k]: [usize; 3]) {
    for i in (0..m).step_by(ROWS) {
        for j in (0..n).step_by(COLS) {
            let (rows, cols) = (ROWS.min(m - i), COLS.min(n - j));
            let mut acc = [[0.0_f32; COLS]; ROWS];
            if rows == ROWS && cols == COLS {
                let a: [&[f32]; ROWS] = std::array::from_fn(|r| &a.row(i + r)[..k]);
                for p in 0..k {
                    let b = &b.row(p)[j..j + COLS];
                    for r in 0..ROWS {
                        for x in 0..COLS {
                            acc[r][x] = a[r][p].mul_add(b[x], acc[r][x]);
                        }
                    }
                }
            } else {
                for p in 0..k {
                    let b = &b.row(p)[j..j + cols];
                    for r in 0..rows {
                        let a = a.row(i + r)[p];
                        for x in 0..cols {
                            acc[r][x] = a.mul_add(b[x], acc[r][x]);
                        }
                    }
                }
            }
            for r in 0..rows {
                let c = &mut c[(i + r) * c_stride + j..][..cols];
                for (c, acc) in c.iter_mut().zip(&acc[r]) {
                    *c += acc;
                }
            }
        }
    }
}

/// `2^x` in place for finite `x <= 128` or `-inf`; below -126 the result is 0.
///
/// Degree-6 Taylor-like minimax polynomial on [-0.5, 0.5]; relative error below 3e-7.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn exp2_in_place(xs: &mut [f32]) {
    const C: [f32; 7] = [
        1.0,
        std::f32::consts::LN_2,
        0.240_226_5,
        0.055_504_11,
        0.009_618_129,
        0.001_333_355_8,
        0.000_154_035_3,
    ];
    for x in xs {
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
        *x = if *x < -126.0 { 0.0 } else { p * scale };
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
        for (m, n, k) in [(1, 1, 1), (6, 16, 8), (7, 33, 5), (13, 40, 64)] {
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
    #[ignore = "a timing, not a law"]
    fn gemm_rate() {
        let (m, n, k) = (64, 128, 64);
        let (a, b, mut c) = (vec![1.0; m * k], vec![1.0; k * n], vec![0.0; m * n]);
        let start = std::time::Instant::now();
        let reps = 2000;
        for _ in 0..reps {
            gemm(Mat::new(&a, k), Mat::new(&b, n), &mut c, n, [m, n, k]);
        }
        let flop = (2 * m * n * k * reps) as f64;
        println!("{:.1} GFLOP/s {}", flop / start.elapsed().as_secs_f64() / 1e9, c[0]);
    }
}
