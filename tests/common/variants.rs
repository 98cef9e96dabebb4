//! The same step, told another way: on other pages, alone, doubled, perturbed, merged from parts.

use compactattn::plan::Layout;
use compactattn::reference::{Request, table};

use super::case::Case;
use super::judge::list_bits;
use super::pipeline::Attended;
use super::pool::{Pools, Strides};
use super::rng::Rng;
use compactattn::types::Dtype;

/// The step with its pages shuffled and the table following.
pub(crate) fn on_other_pages(case: &Case, rng: &mut Rng) -> Case {
    let mut moved = case.clone();
    let mut to: Vec<usize> = (0..case.pools.num_pages).collect();
    rng.shuffle(&mut to);
    moved.pools = Pools::poisoned(&case.shape, case.pools.strides, case.pools.num_pages);
    each_vector(case, |v, (page, row), head, x| moved.pools.write(v, (to[page], row), head, x));
    for entry in &mut moved.table {
        if let Some(&page) = usize::try_from(*entry).ok().and_then(|page| to.get(page)) {
            *entry = page as i32;
        }
    }
    moved
}

/// The step's pool in another layout.
pub(crate) fn restrided(case: &Case, strides: Strides) -> Pools {
    let mut pools = Pools::poisoned(&case.shape, strides, case.pools.num_pages);
    each_vector(case, |v, slot, head, x| pools.write(v, slot, head, x));
    pools
}

/// Request `req` as the only one, on the same pages.
pub(crate) fn alone(case: &Case, req: usize) -> Case {
    let mut alone = case.clone();
    let (start, q_len) = (case.batch().q_start(req), case.batch().q_len(req));
    alone.cu_seqlens_q = vec![0, q_len as i32];
    alone.seq_lens = vec![case.seq_lens[req]];
    alone.table = case.table[req * case.table_stride..(req + 1) * case.table_stride].to_vec();
    for token in 0..q_len {
        for head in 0..case.shape.num_q_heads {
            alone.q.write(token, head, &case.q.read(start + token, head, case.shape.head_dim));
        }
    }
    alone
}

/// NaN in every slot and head that no list reads.
pub(crate) fn poison_unread(case: &mut Case, layout: &Layout, lists: &[u32]) {
    let requests = Request::gather_all(&case.batch());
    let tokens = table::tokens(layout, &requests, &list_bits(layout, &requests, lists));
    let slots = table::slots(layout, &case.batch(), &requests, &tokens);
    let lists_per_kv_head = layout.lists_per_kv_head();
    let mut read = std::collections::HashSet::new();
    for (row, slots) in slots.iter().enumerate() {
        let kv_head = row % layout.lists_per_span() / lists_per_kv_head;
        read.extend(slots.iter().map(|&slot| (slot, kv_head)));
    }
    let nan = vec![f32::NAN; case.shape.head_dim];
    let mut unread = Vec::new();
    each_vector(case, |v, slot, head, _| {
        if !read.contains(&(slot, head)) {
            unread.push((v, slot, head));
        }
    });
    for (v, slot, head) in unread {
        case.pools.write(v, slot, head, &nan);
    }
}

/// Other query, key and value for token `t` of the only request's chunk.
pub(crate) fn perturb(case: &mut Case, rng: &mut Rng, t: usize) {
    let (past, page_size) = (case.batch().past_len(0), case.shape.page_size);
    let token = past + t;
    let slot = (case.batch().page(0, token / page_size), token % page_size);
    let mut other = |scale: f32| (0..case.shape.head_dim).map(|_| scale * rng.normal()).collect::<Vec<f32>>();
    for head in 0..case.shape.num_kv_heads {
        case.pools.write(false, slot, head, &other(3.0));
        case.pools.write(true, slot, head, &other(30.0));
    }
    for head in 0..case.shape.num_q_heads {
        case.q.write(t, head, &other(3.0));
    }
}

/// An e4m3 pool may have no room for them: its scale is doubled instead.
pub(crate) fn double_values(case: &mut Case) {
    if case.shape.kv_dtype == Dtype::E4m3 {
        let scales = &mut case.pools.scales[1];
        if scales.is_empty() {
            scales.push(1.0);
        }
        return scales.iter_mut().for_each(|scale| *scale *= 2.0);
    }
    let mut doubled = case.pools.clone();
    each_vector(case, |v, slot, head, x| {
        if v {
            doubled.write(v, slot, head, &x.iter().map(|x| x * 2.0).collect::<Vec<_>>());
        }
    });
    case.pools = doubled;
}

/// Checks `all = a + b - open` in weights and weighted values, where `a` and `b` share the open region only.
/// `roundings`: to the type of values, of each result.
pub(crate) fn merge(
    case: &Case,
    parts: [&Attended; 3],
    all: &Attended,
    roundings: f64,
) -> Result<(), String> {
    for token in 0..case.batch().total_q() {
        for head in 0..case.shape.num_q_heads {
            merge_row((case, roundings), parts, all, (token, head))
                .map_err(|e| format!("token {token}, head {head}: {e}"))?;
        }
    }
    Ok(())
}

fn merge_row(
    (case, roundings): (&Case, f64),
    [a, b, open]: [&Attended; 3],
    all: &Attended,
    (token, head): (usize, usize),
) -> Result<(), String> {
    let lse = |x: &Attended| f64::from(x.lse[head * x.lse_stride + token]);
    let out = |x: &Attended, i: usize| f64::from(x.out.read(token, head, case.shape.head_dim)[i]);
    if lse(all) == f64::NEG_INFINITY {
        return Ok(());
    }
    let weight = |x: &Attended| (lse(x) - lse(all)).exp();
    let signed = [(1.0, a), (1.0, b), (-1.0, open)].map(|(sign, x)| (sign * weight(x), x));
    let sum: f64 = signed.iter().map(|(w, _)| w).sum();
    // Each part is off by its own log-sum-exp (below 1e-4) and by one rounding of values, which stay below 3.75 (3.5, rounded to 4 bits).
    let spread: f64 = signed.iter().map(|(w, _)| w.abs()).sum::<f64>() + 1.0;
    let rounding = match case.shape.dtype {
        Dtype::Bf16 => 1.0 / 256.0,
        Dtype::F16 => 1.0 / 2048.0,
        _ => 1.0 / (1 << 24) as f64,
    };
    if (sum - 1.0).abs() > 1e-4 * spread {
        return Err(format!("weights sum to {sum}"));
    }
    for i in (0..case.shape.head_dim).step_by(17) {
        let merged: f64 = signed.iter().map(|(w, x)| w * out(x, i)).sum();
        if (merged - out(all, i)).abs() > (roundings * rounding + 2e-4) * 3.75 * spread {
            return Err(format!("{merged}, not {}", out(all, i)));
        }
    }
    Ok(())
}

/// Calls `visit(is value, slot, KV head, vector)` for every slot that a request owns.
fn each_vector(case: &Case, mut visit: impl FnMut(bool, (usize, usize), usize, &[f32])) {
    let batch = case.batch();
    let mut x = vec![0.0; case.shape.head_dim];
    let mut seen = std::collections::HashSet::new();
    for req in (0..batch.num_reqs()).filter(|&r| batch.q_len(r) > 0) {
        for token in 0..batch.kv_len(req) {
            let slot = (batch.page(req, token / case.shape.page_size), token % case.shape.page_size);
            let heads = if seen.insert(slot) { case.shape.num_kv_heads } else { 0 };
            for (head, v) in (0..heads).flat_map(|head| [(head, false), (head, true)]) {
                case.pools.read(v, slot, head, &mut x);
                visit(v, slot, head, &x);
            }
        }
    }
}
