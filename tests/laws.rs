//! The laws of each stage, as properties of random steps; the reference plays no part unless a law names it.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "test sizes are small and not negative"
)]

mod common;

use common::case::{Case, Lens};
use common::pipeline::{self, Attended, Means};
use common::rng::Rng;
use common::{judge, variants};
use compactattn::mask;
use compactattn::plan::Layout;
use compactattn::reference::{Request, chunks};
use compactattn::settings::{Keep, KeepAt, Scope, Selector, Settings};
use compactattn::summaries::Which;
use compactattn::union;
use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn union_is_the_smallest_set_that_covers_every_row(seed in any::<u64>()) {
        let case = masked(seed);
        let layout = case.layout();
        let masks = random_masks(&mut Rng::new(seed), &layout);
        let lists = unite(&case, &layout, &masks);
        let mut from_rows = vec![0; lists.len()];
        each_row(&case, &layout, |row, list| mask::or(words(&layout, &mut from_rows, list), at(&layout, &masks, row)));
        for list in past_lists(&case, &layout) {
            let n = list.past;
            for j in 0..n {
                let forced = j < layout.settings.sink_blocks || j + layout.settings.local_blocks >= n;
                let want = forced || mask::get(at(&layout, &from_rows, list.row), j);
                prop_assert_eq!(mask::get(at(&layout, &lists, list.row), j), want, "list {} block {}", list.row, j);
            }
        }
    }

    #[test]
    fn union_of_a_union_is_itself(seed in any::<u64>()) {
        let case = masked(seed);
        let layout = case.layout();
        let lists = unite(&case, &layout, &random_masks(&mut Rng::new(seed), &layout));
        let mut again = vec![0; mask_len(&layout)];
        each_row(&case, &layout, |row, list| {
            words(&layout, &mut again, row).copy_from_slice(at(&layout, &lists, list));
        });
        prop_assert_eq!(&lists, &unite(&case, &layout, &again));
    }

    #[test]
    fn union_does_not_depend_on_the_order_of_heads(seed in any::<u64>()) {
        let mut case = masked(seed);
        case.settings.scope.heads_per_list = 0;
        let layout = case.layout();
        let masks = random_masks(&mut Rng::new(seed), &layout);
        let group = layout.shape.group_size() * layout.mask_words();
        let mirrored: Vec<u32> = masks
            .chunks(group)
            .flat_map(|rows| rows.chunks(layout.mask_words()).rev().flatten().copied().collect::<Vec<_>>())
            .collect();
        prop_assert_eq!(unite(&case, &layout, &masks), unite(&case, &layout, &mirrored));
    }

    #[test]
    fn a_table_row_names_each_selected_box_once_in_order_on_its_requests_pages(seed in any::<u64>()) {
        let case = Case::random(seed);
        let layout = case.layout();
        let (selected, attended) = pipeline::run(&case);
        let requests = Request::gather_all(&case.batch());
        let bits = judge::list_bits(&layout, &requests, &selected.lists);
        for (row, (bits, span)) in bits.iter().zip(row_spans(&case, &layout)).enumerate() {
            let logical = logical_boxes(&case, &layout, &attended, row, span.req);
            prop_assert!(logical.iter().all(Option::is_some), "a page of another request in row {}", row);
            let logical: Vec<usize> = logical.into_iter().flatten().collect();
            prop_assert!(logical.is_sorted_by(|a, b| a < b), "row {} is not ascending: {:?}", row, logical);
            let tokens = layout.geometry.box_tokens();
            let of_block = |b: usize| logical.iter().filter(|&&x| x * tokens / layout.geometry.block_size == b).count();
            let end = span.end;
            for (b, &bit) in bits.iter().enumerate() {
                let held = ((b + 1) * layout.geometry.block_size).min(end) - b * layout.geometry.block_size;
                prop_assert_eq!(of_block(b), if bit { held.div_ceil(tokens) } else { 0 });
            }
        }
    }

    #[test]
    fn keeping_everything_equals_dense_bit_for_bit(seed in any::<u64>()) {
        let mut case = Case::random(seed);
        if case.settings.selector == Selector::External {
            case.settings.selector = Selector::Oracle;
            case.settings.block_size = case.settings.block_size.max(16);
        }
        let everything = Settings { keep: Keep::Density(1.0), max_density: 1.0, ..case.settings };
        case.settings = everything;
        let (_, kept) = pipeline::run(&case);
        case.settings.selector = Selector::Dense;
        let (_, dense) = pipeline::run(&case);
        prop_assert!(same_bits(&kept, &dense));
        let requests = Request::gather_all(&case.batch());
        let layout = case.layout();
        let all: Vec<Vec<bool>> =
            row_spans(&case, &layout).map(|s| vec![true; s.end.div_ceil(layout.geometry.block_size)]).collect();
        let judged = judge::outputs(&case, &layout, &requests, (&all, &dense));
        prop_assert!(judged.is_ok(), "{:?}", judged);
    }

    #[test]
    fn permuting_physical_pages_changes_no_bit(seed in any::<u64>()) {
        let case = Case::random(seed);
        let moved = variants::on_other_pages(&case, &mut Rng::new(seed));
        let (a, b) = (pipeline::run(&case), pipeline::run(&moved));
        prop_assert_eq!(a.0.lists, b.0.lists);
        prop_assert!(same_bits(&a.1, &b.1));
    }

    #[test]
    fn what_no_list_reads_changes_no_bit(seed in any::<u64>()) {
        let mut case = Case::random(seed);
        let layout = case.layout();
        let means = pipeline::means(&case, &layout);
        let lists = pipeline::select(&case, &layout, means.as_ref(), None).lists;
        let clean = pipeline::attend_lists(&case, &layout, means.as_ref(), &lists);
        variants::poison_unread(&mut case, &layout, &lists);
        let dirty = pipeline::attend_lists(&case, &layout, means.as_ref(), &lists);
        prop_assert!(same_bits(&clean, &dirty));
    }

    #[test]
    fn a_request_alone_gets_the_bits_it_gets_in_a_batch(seed in any::<u64>()) {
        let case = Case::random(seed);
        let (_, together) = pipeline::run(&case);
        let batch = case.batch();
        for req in (0..batch.num_reqs()).filter(|&r| batch.q_len(r) > 0) {
            let (_, alone) = pipeline::run(&variants::alone(&case, req));
            for token in 0..batch.q_len(req) {
                for head in 0..case.shape.num_q_heads {
                    let in_batch = row_bits(&together, batch.q_start(req) + token, head, case.shape.head_dim);
                    prop_assert_eq!(in_batch, row_bits(&alone, token, head, case.shape.head_dim));
                }
            }
        }
    }

    #[test]
    fn no_token_changes_a_row_before_it(seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let case = unaligned(&mut rng);
        let layout = case.layout();
        let means = pipeline::means(&case, &layout);
        let lists = pipeline::select(&case, &layout, means.as_ref(), None).lists;
        let before = pipeline::attend_lists(&case, &layout, means.as_ref(), &lists);
        let q_len = case.batch().q_len(0);
        let t = rng.below(q_len);
        let mut perturbed = case.clone();
        variants::perturb(&mut perturbed, &mut rng, t);
        // With the lists as they are, no row before t may change; with new lists, no row of an earlier span, since a
        // span's queries choose together what all of them read.
        let same_lists = pipeline::attend_lists(&perturbed, &layout, means.as_ref(), &lists);
        let (_, new_lists) = pipeline::run(&perturbed);
        let span = match layout.settings.scope.query_span { 0 => q_len, span => span };
        let chosen_before = if layout.settings.selector == Selector::Dense { t } else { t / span * span };
        for head in 0..case.shape.num_q_heads {
            for token in 0..t {
                let bits = row_bits(&before, token, head, case.shape.head_dim);
                prop_assert_eq!(&bits, &row_bits(&same_lists, token, head, case.shape.head_dim), "{} {}", token, t);
                if token < chosen_before {
                    prop_assert_eq!(&bits, &row_bits(&new_lists, token, head, case.shape.head_dim), "{} {}", token, t);
                }
            }
        }
    }

    #[test]
    fn twice_the_values_give_twice_the_output(seed in any::<u64>()) {
        let mut case = Case::random(seed);
        // Below 2^-14, f16 has fewer digits, and doubling regains them.
        if case.shape.dtype == compactattn::types::Dtype::F16 {
            return Ok(());
        }
        let (_, once) = pipeline::run(&case);
        variants::double_values(&mut case);
        let (_, twice) = pipeline::run(&case);
        for token in 0..case.batch().total_q() {
            for head in 0..case.shape.num_q_heads {
                let doubled = once.out.read(token, head, case.shape.head_dim).iter().map(|x| x * 2.0).collect::<Vec<_>>();
                prop_assert_eq!(doubled, twice.out.read(token, head, case.shape.head_dim));
            }
        }
    }

    #[test]
    fn asking_for_less_never_adds_a_block(seed in any::<u64>()) {
        let mut case = Case::random(seed);
        let mut rng = Rng::new(seed);
        let scores: Vec<f32> = (0..case.layout().score_len().unwrap()).map(|_| rng.below(40) as f32 / 39.0).collect();
        let mut at = |x: f32| {
            let keep: fn(f32) -> Keep = [Keep::Mass, Keep::Density, Keep::Threshold][(seed % 3) as usize];
            // A threshold asks for less when it is higher.
            case.settings.keep = keep(if seed % 3 == 2 { 1.0 - x } else { x });
            pipeline::unite(&case, &case.layout(), &scores).0
        };
        let (less, more) = (at(0.2), at(0.7));
        prop_assert!(less.iter().zip(&more).all(|(less, more)| less & !more == 0));
    }

    #[test]
    fn split_then_combined_equals_unsplit(seed in any::<u64>()) {
        let mut case = Case::random(seed);
        let layout = case.layout();
        let means = pipeline::means(&case, &layout);
        let lists = pipeline::select(&case, &layout, means.as_ref(), None).lists;
        let requests = Request::gather_all(&case.batch());
        let bits = judge::list_bits(&layout, &requests, &lists);
        for splits in [1, 2, 3, 17] {
            case.splits = splits;
            let got = pipeline::attend_lists(&case, &layout, means.as_ref(), &lists);
            let judged = judge::outputs(&case, &layout, &requests, (&bits, &got));
            prop_assert!(judged.is_ok(), "{} splits: {:?}", splits, judged);
        }
    }

    #[test]
    fn disjoint_sets_merge_by_their_log_sum_exps(seed in any::<u64>()) {
        let mut case = Case::random(seed);
        case.settings.mean_correction = false;
        let layout = case.layout();
        let mut rng = Rng::new(seed);
        let mut sets = [0; 4].map(|_: u32| vec![0_u32; layout.max_list_rows() * layout.mask_words()]);
        for list in all_lists(&case, &layout) {
            for j in 0..list.total {
                // The open region is in each, as causality is counted from a list's end.
                let part = if j >= list.past { 3 } else { rng.below(3) };
                for (s, set) in sets.iter_mut().enumerate() {
                    let holds = match s { 0 => part != 2, 1 => part == 0 || part == 3, 2 => part == 1 || part == 3, _ => part == 3 };
                    if holds { mask::set(words(&layout, set, list.row), j); }
                }
            }
        }
        let [all, a, b, open] = sets.map(|lists| pipeline::attend_lists(&case, &layout, None, &lists));
        let merged = variants::merge(&case, [&a, &b, &open], &all, 1.0);
        prop_assert!(merged.is_ok(), "{:?}", merged);
    }

    #[test]
    fn means_do_not_depend_on_how_the_tokens_came(seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let case = unaligned(&mut rng);
        let layout = case.layout();
        let kv = case.batch().kv_len(0);
        let mut whole = Means::poisoned(&case, &layout);
        whole.update(&case, &layout, Which::All);
        let mut piecewise = Means::poisoned(&case, &layout);
        let mut end = 0;
        while end < kv {
            let longest = case.batch().total_q();
            let piece = rng.within(1, longest).min(kv - end);
            end += piece;
            let mut step = case.clone();
            (step.seq_lens[0], step.cu_seqlens_q[1]) = (end as i32, piece as i32);
            piecewise.update(&step, &layout, Which::Completed);
        }
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&whole.k), bits(&piecewise.k));
        prop_assert_eq!(bits(&whole.v), bits(&piecewise.v));
    }
}

/// A case with an external mask and neither guard nor merging of scores.
fn masked(seed: u64) -> Case {
    let mut case = Case::random(seed);
    case.settings = Settings { selector: Selector::External, density_guard: 1.0, ..case.settings };
    case
}

/// One request whose past lies on a block edge, one token after it, or one before.
fn unaligned(rng: &mut Rng) -> Case {
    let shape = common::case::shape(rng);
    let mut settings = common::case::settings(rng);
    settings.scope = Scope { query_span: rng.pick(&[0, 128]), ..settings.scope };
    settings.keep_at = rng.pick(&[KeepAt::Row, KeepAt::List]);
    let block = settings.block_size;
    let past = block * rng.within(1, (400 / block).max(1)) + rng.pick(&[0, 1, block - 1]);
    let most = (3_000_000 / (past + 1) / shape.num_q_heads / shape.head_dim).clamp(2, 200);
    let q = rng.within(1, most);
    Case::with(rng, shape, settings, &[Lens { q, kv: past + q }])
}

fn mask_len(layout: &Layout) -> usize {
    layout.max_select_spans() * layout.shape.num_q_heads * layout.mask_words()
}

fn random_masks(rng: &mut Rng, layout: &Layout) -> Vec<u32> {
    (0..mask_len(layout)).map(|_| (rng.next() & rng.next() & rng.next()) as u32).collect()
}

fn unite(case: &Case, layout: &Layout, masks: &[u32]) -> Vec<u32> {
    let mut lists = vec![!0; layout.max_list_rows() * layout.mask_words()];
    union::of_masks(layout, &case.batch(), masks, &mut lists);
    // Rows beyond the step's are not written.
    lists.truncate(layout.list_spans(&case.batch()).len() * layout.lists_per_span() * layout.mask_words());
    lists
}

fn at<'a>(layout: &Layout, rows: &'a [u32], row: usize) -> &'a [u32] {
    &rows[row * layout.mask_words()..(row + 1) * layout.mask_words()]
}

fn words<'a>(layout: &Layout, rows: &'a mut [u32], row: usize) -> &'a mut [u32] {
    &mut rows[row * layout.mask_words()..(row + 1) * layout.mask_words()]
}

/// Calls `visit(row of masks, list)` for each row of masks.
fn each_row(case: &Case, layout: &Layout, mut visit: impl FnMut(usize, usize)) {
    let batch = case.batch();
    let lists = layout.list_spans(&batch);
    for (s, span) in layout.select_spans(&batch).iter().enumerate() {
        let inside = |l: &compactattn::plan::Span| {
            l.req == span.req && (l.first..l.first + l.len).contains(&span.first)
        };
        let l = lists.iter().position(inside).expect("a list span around every select span");
        for list in 0..layout.lists_per_span() {
            for head in layout.list_heads(list).1 {
                visit(s * layout.shape.num_q_heads + head, l * layout.lists_per_span() + list);
            }
        }
    }
}

/// One list: its row, its past blocks, all its blocks.
struct List {
    row: usize,
    past: usize,
    total: usize,
    dense: bool,
}

fn all_lists(case: &Case, layout: &Layout) -> Vec<List> {
    let spans = layout.list_spans(&case.batch());
    let list = |row: usize| {
        let span = spans[row / layout.lists_per_span()];
        let past = layout.geometry.past_blocks(span.past);
        List { row, past, total: layout.geometry.blocks(span.kv_end), dense: span.dense }
    };
    (0..spans.len() * layout.lists_per_span()).map(list).collect()
}

fn past_lists(case: &Case, layout: &Layout) -> Vec<List> {
    all_lists(case, layout).into_iter().filter(|list| !list.dense).collect()
}

/// Request and KV end of a row of the table.
struct RowSpan {
    req: usize,
    end: usize,
}

fn row_spans(case: &Case, layout: &Layout) -> impl Iterator<Item = RowSpan> {
    let requests = Request::gather_all(&case.batch());
    let spans = chunks(layout, &requests, layout.settings.scope.query_span);
    let per_span = layout.lists_per_span();
    spans.into_iter().flat_map(move |span| {
        let end = requests[span.req].visible(span.tokens.end - 1);
        (0..per_span).map(move |_| RowSpan { req: span.req, end }).collect::<Vec<_>>()
    })
}

/// Logical box of each physical one in a row; `None` for a page that the request does not own.
fn logical_boxes(case: &Case, layout: &Layout, got: &Attended, row: usize, req: usize) -> Vec<Option<usize>> {
    let per_page = layout.geometry.boxes_per_page();
    let pages = case.batch().kv_len(req).div_ceil(layout.shape.page_size);
    let owned = &case.table[req * case.table_stride..][..pages];
    let boxes = &got.boxes[row * layout.max_boxes()..][..got.counts[row] as usize];
    let logical = |&b: &i32| {
        let page = owned.iter().position(|&p| p as usize == b as usize / per_page)?;
        Some(page * per_page + b as usize % per_page)
    };
    boxes.iter().map(logical).collect()
}

fn row_bits(got: &Attended, token: usize, head: usize, head_dim: usize) -> (Vec<u32>, u32) {
    let lse = got.lse[head * got.lse_stride + token].to_bits();
    (got.out.read(token, head, head_dim).iter().map(|x| x.to_bits()).collect(), lse)
}

fn same_bits(a: &Attended, b: &Attended) -> bool {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    bits(&a.lse) == bits(&b.lse) && a.out.store.bits() == b.out.store.bits()
}
