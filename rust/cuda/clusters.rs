//! select by clusters of CTAs (cuda/select/cluster.cuh): scores, and lists or candidates after them, in one launch, where
//! the GPU has clusters and a span has one tile of sampled rows.

use super::kernels::{Arg, Grid};
use super::params::{Then, Wish};
use super::select::{Scoring, longest_span};
use super::shared::{self, MAX_ROW_BLOCKS};
use crate::error::Result;
use crate::plan::Layout;
use crate::settings::Selector;
use crate::types::Dtype;

/// Whether the layer's selector scores some tokens of a span in place of all.
pub(super) fn samples(layout: &Layout) -> bool {
    let samples = matches!(
        layout.settings.selector,
        Selector::SampledExact | Selector::PooledMass | Selector::TwoLevel
    );
    samples && (1..longest_span(layout, layout.limits.max_total_q)).contains(&layout.settings.sample_rows)
}

/// CTAs of a cluster, kCtas of cuda/select/cluster.cuh.
const CTAS: u32 = 8;
const THREADS: u32 = 256;

/// Of cuda/select/mass_lists.cu: CTAs of a head, and the rows and blocks of one that they hold.
const HEAD_CTAS: u32 = 4;
const HELD_ROWS: usize = 32;
const HELD_BLOCKS: usize = 4096;

impl Scoring<'_> {
    /// Which tokens are scored, for selectors that sample where a span can have more than they do.
    pub(super) fn sample_rows(&self) -> Result<()> {
        if !samples(self.layout) {
            return Ok(());
        }
        let has_clusters = self.context.device().properties().has_clusters();
        let ctas = if has_clusters { CTAS } else { 1 };
        let group = self.step.layout.group_size.cast_unsigned();
        let shared_bytes = shared::sample_rows(group, self.head_dim(), has_clusters);
        let grid = Grid { blocks: [ctas, self.kv_heads(), self.selects()], threads: 512, shared_bytes };
        let name = self.of_dtype("compactattn_sample_rows_bf16", "compactattn_sample_rows_fp16");
        self.launch(name, grid, &[Arg::of(self.step)])
    }

    /// Whether clusters score this step.
    pub(super) fn by_clusters(&self) -> bool {
        self.context.device().properties().has_clusters() && self.one_tile()
    }

    /// What follows the scores in the launch that makes them: the lists, where they are wanted and each is made of whole
    /// rows of scores that a CTA can hold.
    pub(super) fn then(&self) -> Then {
        let fits = self.layout.max_blocks() <= MAX_ROW_BLOCKS;
        if self.wants_lists && self.step.settings.keep_at_rows == 0 && fits {
            Then::Lists
        } else {
            Then::Scores
        }
    }

    /// Scores by mean keys; false, with nothing launched, where shared memory does not hold the tiles and a slice of
    /// cells, and over e4m3 keys.
    pub(super) fn pooled_lists(&self, then: Then) -> Result<bool> {
        if self.layout.shape.kv_dtype == Dtype::E4m3 {
            return Ok(false);
        }
        let name = self.of_dtype("compactattn_pooled_lists_bf16", "compactattn_pooled_lists_fp16");
        let pitch = self.pitch();
        let bytes = shared::pooled_lists(self.head_dim(), pitch);
        self.cluster(name, bytes, Wish { then, pitch, listed: 0 })
    }

    /// Scores of cells in memory, with `listed` 0 for blocks that are no candidates; false, with nothing launched, where
    /// shared memory does not hold a slice of them: read twice from L2 they cost more than two launches.
    pub(super) fn cells_lists(&self, listed: bool) -> Result<bool> {
        let keep = shared::keep(self.blocks(), self.step.layout.mask_words.cast_unsigned());
        let pitch = self.pitch();
        let bytes = shared::cells_lists(pitch).max(keep);
        let wish = Wish { then: self.then(), pitch, listed: u32::from(listed) };
        self.cluster("compactattn_cells_lists", bytes, wish)
    }

    /// The same by four CTAs a head that hold its cells in registers, and what follows: lists of one head at most. None,
    /// with nothing launched, where registers do not hold them.
    pub(super) fn mass_lists(&self, listed: bool) -> Result<Option<Then>> {
        if self.layout.max_blocks() > HELD_BLOCKS || self.longest_sample() > HELD_ROWS {
            return Ok(None);
        }
        let then = if self.layout.heads_per_list() == 1 { self.then() } else { Then::Scores };
        let blocks = [HEAD_CTAS * self.step.layout.num_q_heads.cast_unsigned(), self.selects(), 1];
        let shared_bytes = shared::keep(self.blocks(), self.step.layout.mask_words.cast_unsigned());
        let wish = Wish { then, pitch: 0, listed: u32::from(listed) };
        let grid = Grid { blocks, threads: 512, shared_bytes };
        self.launch("compactattn_mass_lists", grid, &[Arg::of(self.step), Arg::of(&wish)])?;
        Ok(Some(then))
    }

    /// Floats between a slice's rows of cells: rows of a product are stored to different banks.
    fn pitch(&self) -> u32 {
        self.blocks().div_ceil(CTAS).next_multiple_of(32) + 8
    }

    fn cluster(&self, name: &'static str, shared_bytes: u32, wish: Wish) -> Result<bool> {
        if self.context.kernels().fits(name, shared_bytes).is_err() {
            return Ok(false);
        }
        let grid = Grid { blocks: [CTAS, self.kv_heads(), self.selects()], threads: THREADS, shared_bytes };
        self.launch(name, grid, &[Arg::of(self.step), Arg::of(&wish)])?;
        Ok(true)
    }
}
