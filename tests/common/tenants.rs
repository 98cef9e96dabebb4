//! Whose page is whose, and what other tenants leave behind.

use super::case::Case;
use super::pool::Store;
use super::rng::Rng;

/// How often each page stands in the valid prefix of a request with queries.
pub(crate) fn owned_pages(case: &Case) -> Vec<usize> {
    let mut owned = vec![0; case.pools.num_pages];
    let batch = case.batch();
    for req in (0..batch.num_reqs()).filter(|&req| batch.q_len(req) > 0) {
        for i in 0..batch.kv_len(req).div_ceil(case.shape.page_size) {
            owned[batch.page(req, i)] += 1;
        }
    }
    owned
}

/// Canaries: finite numbers larger than any of the case's, on every page that no request owns.
pub(crate) fn fill_unowned(case: &mut Case, rng: &mut Rng) {
    let owned = owned_pages(case);
    for page in (0..case.pools.num_pages).filter(|&page| owned[page] == 0) {
        for_each_slot(case, page, |pools, slot, head, dim| {
            for v in [false, true] {
                let x: Vec<f32> = (0..dim).map(|_| 50.0 * rng.normal() + 200.0).collect();
                pools.write(v, slot, head, &x);
            }
        });
    }
}

/// Another tenant's contents, which no result of the next one may show: huge, infinite and NaN among them.
pub(crate) fn make_wild(case: &mut Case, rng: &mut Rng) {
    let owned = owned_pages(case);
    for page in (0..case.pools.num_pages).filter(|&page| owned[page] > 0) {
        let factor = rng.pick(&[1.0, -1.0, 100.0, 3000.0, f32::INFINITY, f32::NAN]);
        for_each_slot(case, page, |pools, slot, head, dim| {
            let mut x = vec![0.0; dim];
            for v in [false, true] {
                pools.read(v, slot, head, &mut x);
                x.iter_mut().for_each(|x| *x *= factor);
                pools.write(v, slot, head, &x);
            }
        });
    }
}

/// Whatever `case` has not written holds what `before` left there.
pub(crate) fn on_leftovers(case: &mut Case, before: &Case) {
    match (&mut case.pools.store, &before.pools.store) {
        (Store::Bf16(x), Store::Bf16(old)) => overlay(x, old, |x| x.is_nan()),
        (Store::F16(x), Store::F16(old)) => overlay(x, old, |x| x.is_nan()),
        (Store::F32(x), Store::F32(old)) => overlay(x, old, |x| x.is_nan()),
        (Store::E4m3(x), Store::E4m3(old)) => overlay(x, old, |x| x & 0x7F == 0x7F),
        _ => {}
    }
}

fn overlay<T: Copy>(new: &mut [T], old: &[T], unwritten: impl Fn(T) -> bool) {
    for (x, &old) in new.iter_mut().zip(old) {
        if unwritten(*x) {
            *x = old;
        }
    }
}

/// Every vector of the page.
fn for_each_slot(
    case: &mut Case,
    page: usize,
    mut visit: impl FnMut(&mut super::pool::Pools, (usize, usize), usize, usize),
) {
    let shape = case.shape;
    for (row, head) in (0..shape.page_size).flat_map(|row| (0..shape.num_kv_heads).map(move |h| (row, h))) {
        visit(&mut case.pools, (page, row), head, shape.head_dim);
    }
}

/// Bytes of one token's outputs, all heads, in results `[out, lse]` with rows of lse `lse_stride` apart.
pub(crate) fn row_bytes(case: &Case, results: &[Vec<u8>], lse_stride: usize, token: usize) -> Vec<u8> {
    let size = case.shape.dtype.size_bytes();
    let mut bytes = Vec::new();
    for head in 0..case.shape.num_q_heads {
        let at = (token * case.q.stride_token + head * case.q.stride_head) * size;
        bytes.extend_from_slice(&results[0][at..at + case.shape.head_dim * size]);
        let at = (head * lse_stride + token) * 4;
        bytes.extend_from_slice(&results[1][at..at + 4]);
    }
    bytes
}

/// `to` gets the contents of page `from`, bit by bit.
pub(crate) fn copy_page(case: &mut Case, from: usize, to: usize) {
    let (shape, dim) = (case.shape, case.shape.head_dim);
    for (row, head) in (0..shape.page_size).flat_map(|row| (0..shape.num_kv_heads).map(move |h| (row, h))) {
        for v in [false, true] {
            let [from, to] = [from, to].map(|page| case.pools.offset(v, (page, row), head));
            match &mut case.pools.store {
                Store::Bf16(x) => x.copy_within(from..from + dim, to),
                Store::F16(x) => x.copy_within(from..from + dim, to),
                Store::F32(x) => x.copy_within(from..from + dim, to),
                Store::E4m3(x) => x.copy_within(from..from + dim, to),
            }
        }
    }
}
