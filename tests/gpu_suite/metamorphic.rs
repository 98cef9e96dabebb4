//! The same case told another way (M1 to M12): what may not change does not, by one bit where nothing else is said.
//!
//! | law | |
//! |---|---|
//! | M1 | keeping everything equals dense |
//! | M2 | permuting physical pages changes nothing |
//! | M3 | NaN on everything that no list names changes nothing |
//! | M4 | other tenants' pages in the tails of table rows change nothing |
//! | M5 | whatever lies after the last token, and on nobody's pages, changes nothing |
//! | M6 | a request alone gets what it gets in a batch |
//! | M7 | permuting requests permutes results |
//! | M8 | twice the values give twice the output |
//! | M9 | results of disjoint sets merge by their lse to that of their union |
//! | M10 | asking for less adds no block |
//! | M12 | a chunk cut in two: both parts judged, as the whole is |
//!
//! M11, replays of a graph, is part `graph`.

use compactattn::settings::{Keep, KeepAt, Selector};
use compactattn::types::Dtype;

use super::abi::Refusal;
use super::cases;
use super::check::{Ran, Worker, given, selection_bits};
use super::device::Device;
use super::laws;
use super::rounds::Rounds;
use super::step::{Done, Given};
use crate::common::case::{Case, Lens};
use crate::common::judge;
use crate::common::rng::Rng;
use crate::common::{tenants, variants};

type Law = fn(&mut Worker, &mut Rng) -> Result<(), Refusal>;

const LAWS: [(&str, Law); 11] = [
    ("M1", m1_everything_kept),
    ("M2", m2_pages),
    ("M3", m3_unselected),
    ("M4", m4_tails),
    ("M5", m5_unwritten),
    ("M6", m6_alone),
    ("M7", m7_requests),
    ("M8", m8_values),
    ("M9", m9_merged),
    ("M10", m10_less),
    ("M12", m12_cut),
];

/// `count` cases of each law.
pub(crate) fn run(device: &Device, rounds: &Rounds) -> bool {
    let rounds = Rounds { count: rounds.count * LAWS.len() as u64, ..*rounds };
    rounds.run(device, |worker, rng, index| {
        let (name, law) = LAWS[(index % LAWS.len() as u64) as usize];
        law(worker, rng).map_err(|refusal| match refusal {
            Refusal::Fault(why) => Refusal::Fault(format!("{name}: {why}")),
            other => other,
        })
    })
}

fn m1_everything_kept(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    laws::everything_kept(worker, &cases::several(rng))
}

fn m2_pages(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let case = cases::several(rng);
    let given = given(&case, rng);
    let ran = worker.run(&case, &given)?;
    laws::on_other_pages(worker, rng, &case, (&given, &ran))
}

fn m3_unselected(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let mut case = by_masks(rng);
    let given = given_masks(&case, rng, 3);
    let clean = worker.run(&case, &given)?;
    let layout = case.layout();
    variants::poison_unread(&mut case, &layout, &clean.selected.lists);
    let dirty = worker.run(&case, &given)?;
    same(&case, &clean, &dirty)
}

fn m4_tails(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let case = cases::several(rng);
    let given = given(&case, rng);
    let mut other = case.clone();
    for req in 0..case.seq_lens.len() {
        let used = case.seq_lens[req].unsigned_abs().div_ceil(case.shape.page_size as u32) as usize;
        for i in used..case.table_stride {
            other.table[req * case.table_stride + i] = rng.below(case.pools.num_pages) as i32;
        }
    }
    let (a, b) = (worker.run(&case, &given)?, worker.run(&other, &given)?);
    same(&case, &a, &b)
}

fn m5_unwritten(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let case = cases::several(rng);
    let given = given(&case, rng);
    let mut wild = case.clone();
    tenants::fill_unowned(&mut wild, rng);
    tenants::make_wild(&mut wild, rng);
    let mut other = case.clone();
    tenants::on_leftovers(&mut other, &wild);
    let (a, b) = (worker.run(&case, &given)?, worker.run(&other, &given)?);
    same(&case, &a, &b)
}

fn m6_alone(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let case = unsplit_selecting(rng);
    let together = worker.run(&case, &Given::Nothing)?;
    let batch = case.batch();
    let req = rng.below(batch.num_reqs());
    let alone_case = variants::alone(&case, req);
    let alone = worker.run(&alone_case, &Given::Nothing)?;
    if selection_bits(&case, &together, req) != selection_bits(&alone_case, &alone, 0) {
        return Err(Refusal::Fault(format!("request {req} alone selects otherwise")));
    }
    let rows = |t: usize| (batch.q_start(req) + t, t);
    rows_agree(&case, (&together, &alone), (0..batch.q_len(req)).map(rows))
}

fn m7_requests(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let case = unsplit_selecting(rng);
    let batch = case.batch();
    let mut order: Vec<usize> = (0..batch.num_reqs()).collect();
    rng.shuffle(&mut order);
    let mut moved = case.clone();
    let mut rows = Vec::new();
    for (at, &req) in order.iter().enumerate() {
        let end = moved.cu_seqlens_q[at] + batch.q_len(req) as i32;
        moved.cu_seqlens_q[at + 1] = end;
        moved.seq_lens[at] = case.seq_lens[req];
        let row = &case.table[req * case.table_stride..(req + 1) * case.table_stride];
        moved.table[at * case.table_stride..(at + 1) * case.table_stride].copy_from_slice(row);
        for t in 0..batch.q_len(req) {
            let (from, to) = (batch.q_start(req) + t, moved.cu_seqlens_q[at] as usize + t);
            for head in 0..case.shape.num_q_heads {
                moved.q.write(to, head, &case.q.read(from, head, case.shape.head_dim));
            }
            rows.push((from, to));
        }
    }
    let (a, b) = (worker.run(&case, &Given::Nothing)?, worker.run(&moved, &Given::Nothing)?);
    rows_agree(&case, (&a, &b), rows.into_iter())
}

fn m8_values(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let mut case = cases::several(rng);
    // Below 2^-14, f16 has fewer digits, and doubling regains them.
    while case.shape.dtype == Dtype::F16 {
        case = cases::several(rng);
    }
    let given = given(&case, rng);
    let once = worker.run(&case, &given)?;
    variants::double_values(&mut case);
    let twice = worker.run(&case, &given)?;
    for token in 0..case.batch().total_q() {
        for head in 0..case.shape.num_q_heads {
            let of = |ran: &Ran| ran.attended.out.read(token, head, case.shape.head_dim);
            if of(&once).iter().map(|x| x * 2.0).ne(of(&twice)) {
                return Err(Refusal::Fault(format!("token {token}, head {head} is not twice what it was")));
            }
        }
    }
    Ok(())
}

fn m9_merged(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let case = by_masks(rng);
    let Given::Masks(all) = given_masks(&case, rng, 2) else { return Ok(()) };
    let cut: Vec<u32> = (0..case.layout().mask_words()).map(|_| rng.next() as u32).collect();
    let part = |keep: fn(u32, u32) -> u32| -> Given {
        Given::Masks(all.iter().zip(cut.iter().cycle()).map(|(&x, &cut)| keep(x, cut)).collect())
    };
    let a = worker.run(&case, &part(|x, cut| x & cut))?;
    let b = worker.run(&case, &part(|x, cut| x & !cut))?;
    let open = worker.run(&case, &part(|_, _| 0))?;
    let whole = worker.run(&case, &part(|x, _| x))?;
    // Tensor cores round weights as well as results.
    let roundings = if worker.device.cuda.is_some() { 2.0 } else { 1.0 };
    let parts = [&a.attended, &b.attended, &open.attended];
    variants::merge(&case, parts, &whole.attended, roundings).map_err(Refusal::Fault)
}

fn m10_less(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let mut case = unsplit_selecting(rng);
    // A list beyond the guard becomes dense; that is a step, not a law.
    (case.settings.density_guard, case.settings.flashprefill.min_budget) = (1.0, 0);
    let keep: fn(f32) -> Keep = rng.pick(&[Keep::Mass, Keep::Density, Keep::Threshold]);
    let by_threshold = matches!(keep(0.5), Keep::Threshold(_));
    // two_level scores what a first pass keeps, so it has other scores where it keeps less.
    if case.settings.selector == Selector::TwoLevel {
        case.settings.selector = Selector::PooledMass;
    }
    let mut at = |x: f32| {
        case.settings.keep = keep(if by_threshold { 1.0 - x } else { x });
        worker.run(&case, &Given::Nothing).map(|ran| ran.selected.lists)
    };
    let (less, more) = (at(0.3)?, at(0.8)?);
    let words = case.layout().mask_words();
    let rows = super::check::rows_of(&case, &case.layout(), case.seq_lens.len() - 1).end;
    let added = (0..rows * words).find(|&i| less[i] & !more[i] != 0);
    added.map_or(Ok(()), |i| Err(Refusal::Fault(format!("row {} keeps more by asking for less", i / words))))
}

fn m12_cut(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let settings = super::scenes::settings(Selector::Dense, 16);
    let shape = cases::shape_for(rng, &settings);
    let (q, past) = (rng.within(2, 150), rng.below(500));
    let case = Case::with(rng, shape, settings, &[Lens { q, kv: q + past }]);
    worker.judged(&case, &Given::Nothing)?;
    let cut = rng.within(1, q - 1);
    for (from, to) in [(0, cut), (cut, q)] {
        let mut part = case.clone();
        part.cu_seqlens_q = vec![0, (to - from) as i32];
        part.seq_lens[0] -= (q - to) as i32;
        for (token, head) in (from..to).flat_map(|t| (0..shape.num_q_heads).map(move |head| (t, head))) {
            part.q.write(token - from, head, &case.q.read(token, head, shape.head_dim));
        }
        worker.judged(&part, &Given::Nothing)?;
    }
    Ok(())
}

/// A case whose selector reads nothing but the batch.
fn unsplit_selecting(rng: &mut Rng) -> Case {
    let mut case = cases::several(rng);
    while case.settings.selector == Selector::External {
        case = cases::several(rng);
    }
    case
}

/// A case whose lists are the given masks, no more and no less.
fn by_masks(rng: &mut Rng) -> Case {
    let mut case = cases::several(rng);
    let s = &mut case.settings;
    (s.selector, s.keep_at, s.mean_correction) = (Selector::External, KeepAt::Row, false);
    (s.sink_blocks, s.local_blocks, s.min_density, s.max_density, s.density_guard) = (0, 0, 0.0, 1.0, 1.0);
    s.block_size = s.block_size.max(16);
    case
}

/// Masks in which about one block in `n` is set.
fn given_masks(case: &Case, rng: &mut Rng, n: usize) -> Given {
    let layout = case.layout();
    let words = layout.max_select_spans() * layout.shape.num_q_heads * layout.mask_words();
    let mut masks = judge::sparse_bits(rng, words);
    if n == 2 {
        masks.iter_mut().for_each(|word| *word |= rng.next() as u32);
    }
    Given::Masks(masks)
}

fn same(case: &Case, a: &Ran, b: &Ran) -> Result<(), Refusal> {
    rows_agree(case, (a, b), (0..case.batch().total_q()).map(|t| (t, t)))
}

/// Rows `(of a, of b)` of the results have the same bits.
fn rows_agree(
    case: &Case,
    (a, b): (&Ran, &Ran),
    rows: impl Iterator<Item = (usize, usize)>,
) -> Result<(), Refusal> {
    let verdict: Done = rows
        .flat_map(|row| (0..case.shape.num_q_heads).map(move |head| (row, head)))
        .try_for_each(|((in_a, in_b), head)| {
            let of = |ran: &Ran, token: usize| {
                let got = &ran.attended;
                let out = got.out.read(token, head, case.shape.head_dim);
                let out: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                (out, got.lse[head * got.lse_stride + token].to_bits())
            };
            if of(a, in_a) == of(b, in_b) {
                return Ok(());
            }
            Err(format!("token {in_a}, head {head} has other bits ({})", cases::describe(case)))
        });
    verdict.map_err(Refusal::Fault)
}
