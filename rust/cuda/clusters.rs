//! select by clusters of CTAs (cuda/select/cluster.cuh): scores, and lists or candidates after them, in one launch, where
//! the GPU has clusters and a span has one tile of sampled rows.

use super::context::Context;
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

/// The kernel that says which, and its shared memory: registers hold the candidates of groups of few short heads.
pub(super) fn sampling(context: &Context, layout: &Layout) -> (&'static str, u32) {
    let is_bf16 = layout.shape.dtype == Dtype::Bf16;
    let (group, head_dim) = (layout.shape.group_size(), layout.shape.head_dim);
    if context.device().properties().has_clusters() && group <= 4 && head_dim <= 128 {
        let names = ["compactattn_sample_rows_held_fp16", "compactattn_sample_rows_held_bf16"];
        return (names[usize::from(is_bf16)], shared::SAMPLE_ROWS_HELD);
    }
    let names = ["compactattn_sample_rows_fp16", "compactattn_sample_rows_bf16"];
    (names[usize::from(is_bf16)], shared::sample_rows(shared::narrow(group), shared::narrow(head_dim)))
}

/// CTAs of a cluster, kCtas of cuda/select/cluster.cuh.
const CTAS: u32 = 8;
const THREADS: u32 = 256;

/// Of cuda/select/mass_lists.cuh: CTAs of a head, and the blocks of a row that they hold; rows of a head.
const HEAD_CTAS: [(&str, u32, usize); 2] =
    [("compactattn_mass_lists_short", 2, 2048), ("compactattn_mass_lists", 4, 4096)];
const HELD_ROWS: usize = 32;

impl Scoring<'_> {
    /// Which tokens are scored, for selectors that sample where a span can have more than they do.
    pub(super) fn sample_rows(&self) -> Result<()> {
        if !samples(self.layout) {
            return Ok(());
        }
        let ctas = if self.context.device().properties().has_clusters() { CTAS } else { 1 };
        let (name, shared_bytes) = sampling(self.context, self.layout);
        let grid = Grid { blocks: [ctas, self.kv_heads(), self.selects()], threads: 512, shared_bytes };
        self.launch(name, grid, &[Arg::of(self.step)])
    }

    /// Whether clusters score this step.
    pub(super) fn by_clusters(&self) -> bool {
        self.context.device().properties().has_clusters() && self.one_tile()
    }

    /// What follows the scores in the launch that makes them.
    pub(super) fn then(&self) -> Then {
        if self.wants_lists && self.makes_lists() { Then::Lists } else { Then::Scores }
    }

    /// Whether lists can follow there: each is made of whole rows of scores that a CTA can hold.
    pub(super) fn makes_lists(&self) -> bool {
        self.layout.max_blocks() <= MAX_ROW_BLOCKS && self.step.settings.keep_at_rows == 0
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

    /// The same by CTAs that hold a head's cells in registers, and what follows: lists of one head at most. None, with
    /// nothing launched, where registers do not hold them. The plan decides how many share a head, as it does their sums.
    pub(super) fn mass_lists(&self, listed: bool) -> Result<Option<Then>> {
        let Some((name, ctas, _)) = self.holding() else {
            return Ok(None);
        };
        let then = if self.layout.heads_per_list() == 1 { self.then() } else { Then::Scores };
        let blocks = [ctas * self.step.layout.num_q_heads.cast_unsigned(), self.selects(), 1];
        let shared_bytes = shared::keep(self.blocks(), self.step.layout.mask_words.cast_unsigned());
        let wish = Wish { then, pitch: 0, listed: u32::from(listed) };
        let grid = Grid { blocks, threads: 512, shared_bytes };
        self.launch(name, grid, &[Arg::of(self.step), Arg::of(&wish)])?;
        Ok(Some(then))
    }

    /// The kernel whose registers hold a head's cells.
    fn holding(&self) -> Option<&'static (&'static str, u32, usize)> {
        let holding = HEAD_CTAS.iter().find(|(_, _, blocks)| self.layout.max_blocks() <= *blocks);
        holding.filter(|_| self.longest_sample() <= HELD_ROWS)
    }

    /// Whether [`Self::mass_lists`] makes whole lists.
    pub(super) fn holds_heads(&self) -> bool {
        self.layout.heads_per_list() == 1 && self.holding().is_some()
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
