//! Every stage against the f64 reference, on random steps.
//!
//! `cargo test --test differential` runs a few hundred; `cargo test --release --test differential -- --ignored
//! ten_thousand` runs 10,000; a failure prints the command that repeats its case alone.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "test sizes are small and not negative"
)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use common::case::Case;
use common::judge::judge;

#[test]
fn the_pipeline_agrees_with_the_reference() {
    run(0..400);
}

#[test]
#[ignore = "minutes: run with --release"]
fn ten_thousand() {
    run(0..10_000);
}

/// What a failure prints: `CASE=SEED cargo test --release --test differential -- --ignored --exact one`.
#[test]
#[ignore = "needs a seed: CASE=..."]
fn one() {
    let seed = std::env::var("CASE").ok().and_then(|seed| seed.parse().ok()).expect("CASE=seed");
    run(seed..seed + 1);
}

/// Judges the cases of `seeds` on two threads; fails with every broken case's one-line repro.
fn run(seeds: std::ops::Range<u64>) {
    let next = AtomicU64::new(seeds.start);
    let broken = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    if let Some(why) = why_broken(seed) {
                        broken.lock().expect("no judge panics").push((seed, why));
                    }
                }
            });
        }
    });
    let mut broken = broken.into_inner().expect("no judge panics");
    broken.sort();
    let lines: Vec<String> = broken.iter().take(20).map(|(seed, why)| repro(*seed, why)).collect();
    assert!(broken.is_empty(), "{} of {} cases:\n{}", broken.len(), seeds.count(), lines.join("\n"));
}

fn why_broken(seed: u64) -> Option<String> {
    let judged = catch_unwind(AssertUnwindSafe(|| judge(&Case::random(seed), seed)));
    match judged {
        Ok(verdict) => verdict.err(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Some(text.or(panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or("panicked".into()))
        }
    }
}

fn repro(seed: u64, why: &str) -> String {
    let case = Case::random(seed);
    let (s, shape) = (&case.settings, &case.shape);
    format!(
        "CASE={seed} cargo test --release --test differential -- --ignored --exact one   # {why} [{} b{} p{} d{} \
         h{}/{} {}/{} {:?} {:?} {:?}]",
        s.selector.name(),
        s.block_size,
        shape.page_size,
        shape.head_dim,
        shape.num_q_heads,
        shape.num_kv_heads,
        shape.dtype.name(),
        shape.kv_dtype.name(),
        s.scope,
        s.keep,
        s.keep_at,
    )
}
