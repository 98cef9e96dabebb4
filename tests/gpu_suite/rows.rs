//! Single rows of a step that is too large for the oracle: against f64 over the KV that its list names.

use super::step::{Done, Step, lse_stride, total_q};
use crate::common::case::Case;
use crate::common::tenants;

/// The step's results, as far as its queries go.
fn results(step: &Step) -> [Vec<u8>; 2] {
    let case = step.case;
    let rows = [total_q(case) * case.q.stride_token * 2, lse_stride(case) * case.shape.num_q_heads * 4];
    [0, 1].map(|i| {
        let part = step.parts.whole[i];
        step.memory.get_at(part, 0, rows[i].min(part.len))
    })
}

/// Bits of every row of the results, without what lies between rows.
pub(crate) fn bits(step: &Step) -> Vec<u8> {
    let (case, whole) = (step.case, results(step));
    (0..total_q(case)).flat_map(|t| tenants::row_bytes(case, &whole, lse_stride(case), t)).collect()
}

/// The last row of each request is finite: NaN lies on every page that is not its own.
pub(crate) fn finite(step: &Step) -> Done {
    let case = step.case;
    for req in 0..case.seq_lens.len() {
        let (start, end) = (case.cu_seqlens_q[req], case.cu_seqlens_q[req + 1]);
        if start == end {
            continue;
        }
        let at = (end - 1) as usize * case.q.stride_token * 2;
        let bytes = step.memory.get_at(step.parts.whole[0], at, case.shape.head_dim * 2);
        let row: Vec<u16> = bytemuck::pod_collect_to_vec(&bytes);
        if row.iter().any(|x| x & 0x7F80 == 0x7F80) {
            return Err(format!("request {req}, token {end}: not finite"));
        }
    }
    Ok(())
}

/// The stages' bits are the whole pass's; and a row for each sample is right. How many were looked at.
pub(crate) fn judge(step: &Step, samples: &[u64]) -> Result<usize, String> {
    step.stages()?;
    let case = step.case;
    let whole = results(step);
    let staged = [0, 1].map(|i| step.memory.get_at(step.parts.staged[i], 0, whole[i].len()));
    let of = |results: &[Vec<u8>; 2], t| tenants::row_bytes(case, results, lse_stride(case), t);
    if (0..total_q(case)).any(|t| of(&whole, t) != of(&staged, t)) {
        return Err("forward and the stages differ".into());
    }
    let batch = case.batch();
    let spans = step.layout.list_spans(&batch);
    if spans.is_empty() {
        return Ok(0);
    }
    for &sample in samples {
        let at = (sample % spans.len() as u64) as usize;
        let i = (sample >> 20) as usize % spans[at].len;
        let head = (sample >> 50) as usize % case.shape.num_q_heads;
        row(step, (at, i, head), &whole).map_err(|e| {
            format!("{}: span {at}, token {i}, head {head}: {e}", case.settings.selector.name())
        })?;
    }
    Ok(samples.len())
}

/// Head `head` of token `i` of span `at`.
fn row(step: &Step, (at, i, head): (usize, usize, usize), whole: &[Vec<u8>; 2]) -> Done {
    let (case, layout) = (step.case, &step.layout);
    let batch = case.batch();
    let span = layout.list_spans(&batch)[at];
    let list = (0..layout.lists_per_span()).find(|&list| layout.list_heads(list).1.contains(&head));
    let list = list.ok_or("no list serves the head")?;
    let row = at * layout.lists_per_span() + list;
    let slots = slots(step, row)?;
    // The open region stands at the end of a stream: what the token does not see yet is its last tokens.
    let hidden = span.kv_end - span.visible(i);
    let seen = slots.len().saturating_sub(hidden);
    let own: std::collections::HashSet<usize> =
        (0..batch.kv_len(span.req).div_ceil(case.shape.page_size)).map(|p| batch.page(span.req, p)).collect();
    if slots.iter().any(|(page, _)| !own.contains(page)) {
        return Err("a list names a page of another request".into());
    }
    let token = span.q_start + i;
    let got: Vec<f32> = {
        let at = (token * case.q.stride_token + head * case.q.stride_head) * 2;
        let bits: Vec<u16> = bytemuck::pod_collect_to_vec(&whole[0][at..at + case.shape.head_dim * 2]);
        bits.iter().map(|&bits| half::bf16::from_bits(bits).to_f32()).collect()
    };
    let at = (head * lse_stride(case) + token) * 4;
    let lse = f32::from_le_bytes([0, 1, 2, 3].map(|i| whole[1][at + i]));
    agrees(case, (token, head), &slots[..seen], (&got, lse))
}

/// (page, row) of each token of a list's stream.
fn slots(step: &Step, row: usize) -> Result<Vec<(usize, usize)>, String> {
    let (p, sizes) = (&step.parts, &step.plan.sizes);
    let word = |part, at: usize| -> usize {
        let bytes = step.memory.get_at(part, at * 4, 4);
        u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[i])) as usize
    };
    let (count, tokens) = (word(p.counts, row), word(p.stream_lens, row));
    if count > sizes.max_boxes as usize || tokens > count * sizes.box_tokens as usize {
        return Err(format!("{count} boxes of {tokens} tokens"));
    }
    let boxes = step.memory.get_at(p.boxes, row * sizes.max_boxes as usize * 4, count * 4);
    let boxes: Vec<u32> = bytemuck::pod_collect_to_vec(&boxes);
    let size = sizes.box_tokens as usize;
    let per_page = step.case.shape.page_size / size;
    let of = |&b: &u32| {
        let (page, part) = (b as usize / per_page, b as usize % per_page);
        (0..size).map(move |i| (page, part * size + i))
    };
    Ok(boxes.iter().flat_map(of).take(tokens).collect())
}

/// Softmax of those keys in f64. A tensor core's row is off by the rounding of its weights and of the result, 2^-8 of
/// what they weigh each, and by f32 sums.
fn agrees(
    case: &Case,
    (token, head): (usize, usize),
    slots: &[(usize, usize)],
    (got, lse): (&[f32], f32),
) -> Done {
    let (dim, kv_head) = (case.shape.head_dim, head / case.shape.group_size());
    let q = case.q.read(token, head, dim);
    let mut x = vec![0.0; dim];
    let mut logits = Vec::with_capacity(slots.len());
    for &slot in slots {
        case.pools.read(false, slot, kv_head, &mut x);
        let dot: f64 = q.iter().zip(&x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        logits.push(dot * f64::from(case.shape.sm_scale));
    }
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - top).exp()).sum();
    let (mut out, mut spread) = (vec![0.0; dim], vec![0.0; dim]);
    for (&slot, logit) in slots.iter().zip(&logits) {
        case.pools.read(true, slot, kv_head, &mut x);
        let weight = (logit - top).exp() / sum;
        for i in 0..dim {
            out[i] += weight * f64::from(x[i]);
            spread[i] += weight * f64::from(x[i]).abs();
        }
    }
    let want = top + sum.ln();
    let off = (f64::from(lse) - want).abs();
    if slots.is_empty() || off.is_nan() || off > 1e-3 {
        return Err(format!("lse {lse}, not {want}, over {} tokens", slots.len()));
    }
    for i in 0..dim {
        let error = (spread[i] + out[i].abs()) / 256.0 + 1e-3 * spread[i];
        let off = (f64::from(got[i]) - out[i]).abs();
        if off.is_nan() || off > error {
            return Err(format!("out[{i}] {}, not {} (+-{error:.1e})", got[i], out[i]));
        }
    }
    Ok(())
}
