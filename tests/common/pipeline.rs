//! The optimised stages, one after the other, on buffers that start out full of poison.

use compactattn::Parallel;
use compactattn::attend::{Correction, Partials, attend};
use compactattn::combine::combine;
use compactattn::plan::Layout;
use compactattn::select::{self, Input};
use compactattn::settings::Selector;
use compactattn::summaries::{self, Summaries, SummariesMut, Which};
use compactattn::table::{self, Table, TableMut};
use compactattn::tensor::LseMut;
use compactattn::union::{self, Counts};

use super::case::Case;
use super::pool::Packed;

/// Means of every whole block.
pub(crate) struct Means {
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl Means {
    pub(crate) fn poisoned(case: &Case, layout: &Layout) -> Self {
        let len = summaries::len(layout, case.pools.num_pages);
        Self { k: vec![f32::NAN; len], v: vec![f32::NAN; len] }
    }

    pub(crate) fn update(&mut self, case: &Case, layout: &Layout, which: Which) {
        let mut out = SummariesMut { k_mean: &mut self.k, v_mean: Some(&mut self.v), seals: None };
        summaries::update(layout, &case.batch(), which, &mut out, Parallel::new(1));
    }

    pub(crate) fn view(&self) -> Summaries<'_> {
        Summaries { k_mean: &self.k, v_mean: Some(&self.v) }
    }
}

/// What a step selected.
pub(crate) struct Selected {
    /// `[select spans, num_q_heads, max_blocks]`.
    pub(crate) scores: Vec<f32>,
    /// `[list spans, lists per span, mask_words]`.
    pub(crate) lists: Vec<u32>,
    pub(crate) counts: Counts,
}

/// What a step attended to and computed.
#[derive(Clone)]
pub(crate) struct Attended {
    pub(crate) rows: usize,
    pub(crate) counts: Vec<i32>,
    pub(crate) stream_lens: Vec<i32>,
    pub(crate) boxes: Vec<i32>,
    pub(crate) out: Packed,
    /// `[num_q_heads, total_q + lse_pad]`.
    pub(crate) lse: Vec<f32>,
    pub(crate) lse_stride: usize,
}

/// Means that the settings need; all blocks.
pub(crate) fn means(case: &Case, layout: &Layout) -> Option<Means> {
    let wanted = select::needs_summaries(layout.settings.selector) || layout.settings.mean_correction;
    wanted.then(|| {
        let mut means = Means::poisoned(case, layout);
        means.update(case, layout, Which::All);
        means
    })
}

/// Scores by the selector, or `given` ones for an external one.
pub(crate) fn select(case: &Case, layout: &Layout, means: Option<&Means>, given: Option<&[f32]>) -> Selected {
    let batch = case.batch();
    let mut scores = vec![f32::NAN; layout.score_len().expect("checked by Layout::new")];
    match given {
        Some(given) => scores.copy_from_slice(given),
        None if layout.settings.selector != Selector::External => {
            let summaries = means.map(Means::view);
            let input = Input { layout, batch: &batch, summaries, gate: None };
            select::score(&input, &mut scores, Parallel::new(1));
        }
        None => {}
    }
    let (lists, counts) = unite(case, layout, &scores);
    Selected { scores, lists, counts }
}

/// Lists of given scores.
pub(crate) fn unite(case: &Case, layout: &Layout, scores: &[f32]) -> (Vec<u32>, Counts) {
    let mut masks = vec![!0; layout.max_select_spans() * layout.shape.num_q_heads * layout.mask_words()];
    let mut lists = vec![!0; layout.max_list_rows() * layout.mask_words()];
    let counts = union::unite(layout, &case.batch(), scores, &mut masks, &mut lists);
    (lists, counts)
}

/// table, attend and combine of given lists.
pub(crate) fn attend_lists(case: &Case, layout: &Layout, means: Option<&Means>, lists: &[u32]) -> Attended {
    let batch = case.batch();
    let (max_rows, total_q) = (layout.max_list_rows(), batch.total_q());
    let (mut counts, mut stream_lens) = (vec![-1; max_rows], vec![-1; max_rows]);
    let mut boxes = vec![i32::MAX; max_rows * layout.max_boxes()];
    let mut out = TableMut { counts: &mut counts, stream_lens: &mut stream_lens, boxes: &mut boxes };
    let rows = table::build(layout, &batch, lists, &mut out);
    let table = Table { counts: &counts, stream_lens: &stream_lens, boxes: &boxes };

    let partial_rows = case.splits * total_q * layout.shape.num_q_heads;
    let (mut partial_out, mut partial_lse) =
        (vec![f32::NAN; partial_rows * layout.shape.head_dim], vec![f32::NAN; partial_rows]);
    let mut partials = Partials { splits: case.splits, out: &mut partial_out, lse: &mut partial_lse };
    let correction = means.filter(|_| layout.settings.mean_correction);
    let correction = correction.map(|means| Correction::new(lists, means.view()).expect("has mean values"));
    attend(layout, &batch, &table, correction.as_ref(), &mut partials, Parallel::new(1));

    let mut out = case.q.clone();
    let lse_stride = total_q + 3;
    let mut lse = vec![f32::NAN; lse_stride * layout.shape.num_q_heads];
    let mut lse_mut = LseMut { elements: &mut lse, stride_head: lse_stride };
    combine(layout, &batch, &partials, &mut out.view_mut(), Some(&mut lse_mut), Parallel::new(1));
    Attended { rows, counts, stream_lens, boxes, out, lse, lse_stride }
}

/// The whole step.
pub(crate) fn run(case: &Case) -> (Selected, Attended) {
    let layout = case.layout();
    let means = means(case, &layout);
    let selected = select(case, &layout, means.as_ref(), None);
    let attended = attend_lists(case, &layout, means.as_ref(), &selected.lists);
    (selected, attended)
}
