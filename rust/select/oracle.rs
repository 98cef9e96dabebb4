//! oracle: the block masses that `sampled_exact` estimates, from every row. The bound a scorer can reach, at a cost
//! near that of the attention it would save.

use super::{Input, Unit, sampled_exact};

/// Scores one unit by all its rows.
pub(super) fn score(input: &Input, unit: &mut Unit) {
    sampled_exact::of_rows(input, unit, &(0..unit.span.len).collect::<Vec<_>>());
}

#[cfg(test)]
mod tests {
    use super::super::plain::{assert_scores, batches, settings};
    use crate::settings::Selector;

    #[test]
    fn scores_are_the_mean_attention_shares_of_all_rows() {
        for (paged, block_size) in batches() {
            assert_scores(&paged, settings(Selector::Oracle, block_size), |row| {
                row.mass(&(0..row.span.len).collect::<Vec<_>>(), |i, j| row.exact(i, j))
            });
        }
    }
}
