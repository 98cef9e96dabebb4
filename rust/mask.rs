//! Rows of bits, one bit a KV block: bit `j` of a row is bit `j % 32` of its word `j / 32`.

/// Words that hold `bits` bits.
#[must_use]
pub fn words(bits: usize) -> usize {
    bits.div_ceil(32)
}

/// Whether bit `j` is set.
#[must_use]
pub fn get(row: &[u32], j: usize) -> bool {
    row[j / 32] >> (j % 32) & 1 == 1
}

/// Sets bit `j`.
pub fn set(row: &mut [u32], j: usize) {
    row[j / 32] |= 1 << (j % 32);
}

/// Sets bits `range`.
pub fn set_range(row: &mut [u32], range: std::ops::Range<usize>) {
    for j in range {
        set(row, j);
    }
}

/// Clears bit `first` and all after it.
pub fn clear_from(row: &mut [u32], first: usize) {
    for (w, word) in row.iter_mut().enumerate().skip(first / 32) {
        *word &= if w == first / 32 { (1 << (first % 32)) - 1 } else { 0 };
    }
}

/// ORs `from` into `into`.
pub fn or(into: &mut [u32], from: &[u32]) {
    for (a, b) in into.iter_mut().zip(from) {
        *a |= b;
    }
}

/// Set bits among the first `bits`.
#[must_use]
pub fn count(row: &[u32], bits: usize) -> usize {
    ones(row, bits).count()
}

/// Set bits among the first `bits`, ascending.
pub fn ones(row: &[u32], bits: usize) -> impl Iterator<Item = usize> + '_ {
    let used = &row[..words(bits).min(row.len())];
    used.iter()
        .enumerate()
        .flat_map(|(w, &word)| {
            std::iter::successors((word != 0).then_some(word), |&x| (x & (x - 1) != 0).then_some(x & (x - 1)))
                .map(move |x| w * 32 + x.trailing_zeros() as usize)
        })
        .take_while(move |&j| j < bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ones_lists_set_bits_in_order_and_stops_at_the_end() {
        let mut row = [0_u32; 3];
        for j in [0, 31, 32, 70, 95] {
            set(&mut row, j);
        }
        assert_eq!(ones(&row, 96).collect::<Vec<_>>(), [0, 31, 32, 70, 95]);
        assert_eq!(ones(&row, 70).collect::<Vec<_>>(), [0, 31, 32]);
        assert_eq!(count(&row, 71), 4);
        assert!(get(&row, 70) && !get(&row, 71));
    }

    #[test]
    fn clear_from_leaves_the_bits_before_it() {
        for first in [0, 31, 32, 33, 96, 200] {
            let mut row = [u32::MAX; 3];
            clear_from(&mut row, first);
            assert!(ones(&row, 96).eq(0..first.min(96)), "{first}");
        }
    }
}
