//! flashprefill: all rows of a span against mean keys, relative to the span's best block (arXiv 2603.06199).
//!
//! Per query head, `S_j = sum over the span's rows of exp(q_r . k_mean_j * sm_scale)`, where a row counts for the
//! blocks that lie wholly at or before it; the score is `S_j / max S`, in (0, 1], compared in the log domain. The
//! maximum runs over every block that some row sees whole, those of the open region too, unless
//! `settings.flashprefill.relative_to_past`.

use super::cells::mean_keys;
use super::rows::Rows;
use super::{Input, Unit};
use crate::math::{self, Mat};

/// Scores one unit; without summaries nothing can be judged, and NaN keeps everything the cap allows.
pub(super) fn score(input: &Input, unit: &mut Unit) {
    let Some(summaries) = &input.summaries else { return unit.fill(f32::NAN) };
    let rows = Rows::load(input, unit, &(0..unit.span.len).collect::<Vec<_>>());
    let geometry = input.layout.geometry;
    let blocks = if input.layout.settings.flashprefill.relative_to_past {
        unit.past_blocks
    } else {
        rows.kv_end() / geometry.block_size
    };
    let mut sums = vec![0.0; rows.heads * blocks];
    for first in (0..blocks).step_by(TILE_BLOCKS) {
        let tile = first..blocks.min(first + TILE_BLOCKS);
        let means = mean_keys(input, summaries, (unit.span.req, unit.kv_head), tile.clone());
        let (width, dim) = (rows.len(), input.layout.shape.head_dim);
        let mut logits = vec![0.0; tile.len() * width];
        math::gemm(
            Mat::new(&means, dim),
            Mat::new(&rows.q, width),
            &mut logits,
            width,
            [tile.len(), width, dim],
        );
        for (j, logits) in tile.zip(logits.chunks_exact_mut(width)) {
            let blind = rows.blind_to((j + 1) * geometry.block_size);
            for (head, logits) in logits.chunks_exact_mut(rows.visible.len()).enumerate() {
                sums[head * blocks + j] = log2_sum(&mut logits[blind..]);
            }
        }
    }
    for (scores, sums) in unit.scores.chunks_mut(unit.stride).zip(sums.chunks_exact_mut(blocks)) {
        relate(sums, &mut scores[..unit.past_blocks]);
    }
}

/// `log2(sum of 2^x)` of `logits`, which are scratch afterwards; NaN if one is.
fn log2_sum(logits: &mut [f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    logits.iter_mut().for_each(|x| *x -= max);
    math::exp2_in_place(logits);
    max + logits.iter().sum::<f32>().log2()
}

/// Scores of the first blocks relative to the best of all.
fn relate(sums: &mut [f32], scores: &mut [f32]) {
    let best = sums.iter().copied().fold(f32::MIN, f32::max);
    sums.iter_mut().for_each(|x| *x -= best);
    math::exp2_in_place(sums);
    scores.copy_from_slice(&sums[..scores.len()]);
}

/// Blocks per product.
const TILE_BLOCKS: usize = 128;

#[cfg(test)]
mod tests {
    use super::super::plain::{assert_scores, batches, settings};
    use crate::settings::{FlashPrefill, Selector, Settings};

    #[test]
    fn scores_are_relative_to_the_best_block_that_a_row_sees_whole() {
        for (paged, block_size) in batches() {
            let settings = settings(Selector::FlashPrefill, block_size);
            assert_scores(&paged, settings, |row| row.relative(row.span.kv_end / block_size));
        }
    }

    #[test]
    fn scores_can_be_relative_to_past_blocks_only() {
        for (paged, block_size) in batches() {
            let settings = settings(Selector::FlashPrefill, block_size);
            let flashprefill = FlashPrefill { relative_to_past: true, ..settings.flashprefill };
            let settings = Settings { flashprefill, ..settings };
            assert_scores(&paged, settings, |row| row.relative(row.past_blocks()));
        }
    }
}
