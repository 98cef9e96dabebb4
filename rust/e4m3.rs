//! e4m3: 8-bit floats of KV caches. One sign, four exponent and three mantissa bits, bias 7, no infinity; all ones
//! below the sign are NaN, so the largest number is 448 (OCP 8-bit floating point, E4M3).

use multiversion::multiversion;

/// NaN.
pub const NAN: u8 = 0x7f;
/// The largest number.
pub const MAX: f32 = 448.0;

/// The number that `code` stands for, exactly.
#[must_use]
pub fn decode(code: u8) -> f32 {
    let rest = u32::from(code & 0x7f);
    // Below 8 the exponent is 0: multiples of 2^-9. Not by a product with a subnormal, which a host may flush.
    let normal = f32::from_bits((rest << 20) + (EXPONENT_SHIFT << 23));
    let subnormal = rest as f32 * (1.0 / 512.0);
    let magnitude = if rest < 8 { subnormal } else { normal };
    let magnitude = if rest == 0x7f { f32::NAN } else { magnitude };
    f32::from_bits(magnitude.to_bits() | u32::from(code & 0x80) << 24)
}

/// The code nearest to `x`, ties to the even one; what is too large becomes [`MAX`].
#[must_use]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 0x7f by the branches")]
pub fn encode(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let size = x.abs();
    if size.is_nan() {
        return sign | NAN;
    }
    if size >= MAX {
        return sign | (NAN - 1);
    }
    if size < 1.0 / 64.0 {
        return sign | (size * 512.0).round_ties_even() as u8;
    }
    let bits = size.to_bits();
    let rounded = (bits + 0x7_ffff + (bits >> 20 & 1)) >> 20;
    sign | (rounded - (EXPONENT_SHIFT << 3)) as u8
}

/// [`decode`] of many; both slices have one length.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn widen(from: &[u8], into: &mut [f32]) {
    for (x, y) in from.iter().zip(into) {
        *y = decode(*x);
    }
}

/// Between the bias of f32 and that of e4m3.
const EXPONENT_SHIFT: u32 = 127 - 7;

#[cfg(test)]
mod tests {
    use super::*;

    /// By the format's own words.
    fn value(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let size = match (exponent, code & 0x7f) {
            (_, 0x7f) => f64::NAN,
            (0, _) => mantissa / 8.0 * 2.0_f64.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2.0_f64.powi(exponent - 7),
        };
        if code & 0x80 == 0 { size } else { -size }
    }

    #[test]
    fn every_code_is_the_number_the_format_says() {
        let mut all = [0.0; 256];
        let codes: Vec<u8> = (0..=255).collect();
        widen(&codes, &mut all);
        for code in codes {
            let (want, got) = (value(code), decode(code));
            assert_eq!(all[usize::from(code)].to_bits(), got.to_bits());
            assert!(want.is_nan() && got.is_nan() || want == f64::from(got), "{code:#x}: {got}, not {want}");
            assert_eq!(got.is_sign_negative(), code & 0x80 != 0);
        }
        assert_eq!(decode(0x7e), MAX);
    }

    #[test]
    fn a_number_becomes_the_nearest_code_and_ties_the_even_one() {
        for code in (0..=255_u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(encode(decode(code)), code);
        }
        for code in 0..0x7e_u8 {
            let middle = f32::midpoint(decode(code), decode(code + 1));
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(encode(middle), even, "between {code:#x} and the next");
            assert_eq!(encode(middle.next_down()), code);
            assert_eq!(encode(-middle.next_up()), 0x80 | (code + 1));
        }
        assert_eq!([f32::INFINITY, 1e9, -1e9].map(encode), [0x7e, 0x7e, 0xfe]);
        assert_eq!(encode(f32::NAN) & 0x7f, NAN);
    }
}
