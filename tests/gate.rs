//! Selector `attn_gate` against its f64 oracle: every published form of the weights, read from a file, on random steps.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::unwrap_used,
    reason = "test sizes are small and not negative; a test stops at the first surprise"
)]

mod common;

use std::path::PathBuf;

use common::case::Case;
use common::gate::{self, Form, Tensor, case, margin, tensors, widened};
use common::rng::Rng;
use compactattn::Parallel;
use compactattn::reference::gate as oracle;
use compactattn::reference::{Request, chunks, select_step};
use compactattn::select::{self, Gate, Input, Pairing, Rope};
use compactattn::types::Shape;
use safetensors::tensor::Dtype as FileDtype;

#[test]
fn every_score_is_the_oracles_in_every_form_and_pairing() {
    let mut unaligned = 0;
    for seed in 0..60 {
        let form = [Form::KeysOnly, Form::Both, Form::ByGroup][seed % 3];
        let pairing = [Pairing::HalfSplit, Pairing::Interleaved][seed / 3 % 2];
        let mut rng = Rng::new(seed as u64);
        let case = case(&mut rng);
        let gate_dim = if form == Form::KeysOnly { case.shape.head_dim } else { rng.pick(&[32, 64]) };
        let tensors = tensors(&mut rng, &case.shape, form, gate_dim);
        let rope = rope(&mut rng, case.shape.head_dim, gate_dim, pairing);
        let loaded = load(seed, &tensors, &case.shape, &rope);
        let mut weights = tensors.iter().map(widened);
        let k = weights.next().unwrap();
        let oracle = oracle::Gate { k, q: weights.next(), rope };
        unaligned += judge(seed, &case, &loaded, &oracle);
    }
    // About half of the requests of 60 cases start beside a block's edge, each with a row for every head.
    assert!(unaligned > 200, "only {unaligned} rows of unaligned chunks");
}

/// Compares every score of a case; how many rows were of chunks that start beside a block's edge.
fn judge(seed: usize, case: &Case, gate: &Gate, oracle: &oracle::Gate) -> usize {
    let (layout, batch) = (case.layout(), case.batch());
    layout.admit(&batch).unwrap();
    let mut scores = vec![f32::NAN; layout.score_len().unwrap()];
    let input = Input { layout: &layout, batch: &batch, summaries: None, gate: gate.layer(0) };
    select::score(&input, &mut scores, Parallel::new(1 + seed % 2));
    let requests = Request::gather_all(&batch);
    let mut unaligned = 0;
    let mut rows = scores.chunks(layout.max_blocks());
    for chunk in chunks(&layout, &requests, select_step(&layout)) {
        let rows = rows.by_ref().take(layout.shape.num_q_heads);
        for (head, found) in rows.enumerate().collect::<Vec<_>>() {
            if chunk.dense {
                continue;
            }
            let request = &requests[chunk.req];
            let row = oracle::scores(oracle, &layout, request, &chunk, head);
            let margin = margin(&layout, oracle, &row);
            for (block, (&found, want)) in found.iter().zip(&row.scores).enumerate() {
                let error = (f64::from(found) - want).abs();
                let at = format!("seed {seed} {chunk:?} head {head} block {block}");
                // 2^x is flushed to 0 below 2^-126.
                let allowed = margin * want + f64::from(f32::MIN_POSITIVE);
                assert!(error <= allowed, "{at}: {found}, not {want} +- {allowed}");
            }
            unaligned += usize::from(!request.past().is_multiple_of(layout.settings.block_size));
        }
    }
    unaligned
}

/// Writes the tensors to a file of this process, bf16 or f32 by turns, loads it, removes it.
fn load(seed: usize, tensors: &[Tensor], shape: &Shape, rope: &Rope) -> Gate {
    let path: PathBuf = std::env::temp_dir().join(format!("compactattn-gate-{}-{seed}", std::process::id()));
    gate::write(&path, [FileDtype::BF16, FileDtype::F32][seed % 2], tensors);
    let gate = Gate::load(&path, shape, 1, rope.clone());
    std::fs::remove_file(&path).unwrap();
    gate.unwrap()
}

fn rope(rng: &mut Rng, head_dim: usize, gate_dim: usize, pairing: Pairing) -> Rope {
    let freq = |dim: usize| (0..dim / 2).map(|i| 1e4_f32.powf(-2.0 * i as f32 / dim as f32)).collect();
    let gate_inv_freq = (gate_dim != head_dim).then(|| freq(gate_dim));
    Rope { inv_freq: freq(head_dim), gate_inv_freq, pairing, scale: rng.pick(&[1.0, 1.25]) }
}
