//! Pages freed and used again with other data, however an engine comes to it: kept summaries, sealed, give the scores,
//! lists and results that summaries made anew give, to the bit. And the test can fail: without seals they do not.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "test sizes are small and not negative"
)]

mod common;

use common::history::History;
use common::pipeline::{self, Means};
use compactattn::plan::Layout;
use compactattn::settings::Selector;
use compactattn::summaries::{self, SummariesMut, Which};
use compactattn::types::Dtype;
use compactattn::{Parallel, seals};

const SELECTORS: [Selector; 4] =
    [Selector::FlashPrefill, Selector::PooledMass, Selector::TwoLevel, Selector::SampledExact];
const DTYPES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];
const HISTORIES: u64 = 300;
const STEPS: usize = 12;

#[test]
fn sealed_summaries_are_never_stale_whatever_became_of_their_pages() {
    for seed in 0..HISTORIES {
        let told = run(seed, true);
        assert_eq!(told, Told { steps: STEPS, ..Told::default() }, "seed {seed}");
    }
}

#[test]
fn without_seals_steps_that_nobody_announced_leave_stale_summaries() {
    let all: Vec<Told> = (0..HISTORIES / 10).map(|seed| run(seed, false)).collect();
    let count = |of: fn(&Told) -> usize| all.iter().map(of).sum::<usize>();
    assert!(count(|told| told.other_means) > 0, "no history left a stale mean: the test above says nothing");
    assert!(count(|told| told.other_lists) > 0, "no stale mean moved a block");
    assert!(count(|told| told.other_results) > 0, "no stale mean reached a result");
}

/// Steps of a history in which kept summaries made a difference.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    steps: usize,
    other_means: usize,
    other_lists: usize,
    other_results: usize,
}

fn run(seed: u64, sealed: bool) -> Told {
    let mut history = History::new(seed, &SELECTORS, &DTYPES);
    let mut told = Told::default();
    let mut kept: Option<(Means, Vec<u32>)> = None;
    for _ in 0..STEPS {
        let case = history.step();
        let layout = case.layout();
        let (kept, seals) = kept.get_or_insert_with(|| {
            (Means::poisoned(&case, &layout), vec![0; seals::len(&layout, case.pools.num_pages)])
        });
        let seals = sealed.then_some(&mut seals[..]);
        let mut out = SummariesMut { k_mean: &mut kept.k, v_mean: Some(&mut kept.v), seals };
        summaries::update(&layout, &case.batch(), Which::Completed, &mut out, Parallel::new(1));
        let fresh = pipeline::means(&case, &layout).expect("every selector or its correction reads means");
        let [a, b] = [&*kept, &fresh].map(|means| {
            let selected = pipeline::select(&case, &layout, Some(means), None);
            let attended = pipeline::attend_lists(&case, &layout, Some(means), &selected.lists);
            let results = (attended.out.store.bits(), bits(&attended.lse));
            (read(&case.batch(), &layout, means), (bits(&selected.scores), selected.lists), results)
        });
        told.steps += 1;
        told.other_means += usize::from(a.0 != b.0);
        told.other_lists += usize::from(a.1 != b.1);
        told.other_results += usize::from(a.2 != b.2);
    }
    told
}

/// Bits of all means that the step may read.
fn read(batch: &compactattn::batch::Batch, layout: &Layout, means: &Means) -> Vec<u32> {
    let (view, mut all) = (means.view(), Vec::new());
    for req in 0..batch.num_reqs() {
        for block in 0..batch.kv_len(req) / layout.settings.block_size {
            for kv_head in 0..layout.shape.num_kv_heads {
                let at = summaries::BlockAt { req, block, kv_head };
                all.extend(bits(view.k(layout, batch, at)));
                all.extend(bits(view.v(layout, batch, at).expect("values are kept")));
            }
        }
    }
    all
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}
