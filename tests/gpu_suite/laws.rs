//! Laws that need a case to be told another way; each compares bits.

use compactattn::settings::{Keep, Selector, Settings};

use super::abi::Refusal;
use super::check::{Ran, Worker, selection_bits};
use super::step::{Done, Given};
use crate::common::case::{Case, Lens};
use crate::common::rng::Rng;
use crate::common::variants;

/// One law of the case, drawn at random, that `ran` shows or breaks.
pub(crate) fn one(
    worker: &mut Worker,
    rng: &mut Rng,
    case: &Case,
    (given, ran): (&Given, &Ran),
) -> Result<(), Refusal> {
    match rng.below(3) {
        0 => on_other_pages(worker, rng, case, (given, ran)),
        1 => alone(worker, rng, case, ran),
        _ => everything_kept(worker, case),
    }
}

/// Permuting physical pages, and the table with them, changes no bit.
pub(crate) fn on_other_pages(
    worker: &mut Worker,
    rng: &mut Rng,
    case: &Case,
    (given, ran): (&Given, &Ran),
) -> Result<(), Refusal> {
    let moved = worker.run(&variants::on_other_pages(case, rng), given)?;
    if moved.selected.lists != ran.selected.lists {
        return Err(Refusal::Fault("permuting pages changes lists".into()));
    }
    same_results(ran, &moved).map_err(|e| Refusal::Fault(format!("permuting pages: {e}")))
}

/// A request alone selects what it selects in a batch.
fn alone(worker: &mut Worker, rng: &mut Rng, case: &Case, ran: &Ran) -> Result<(), Refusal> {
    let batch = case.batch();
    let req = rng.below(batch.num_reqs());
    // A caller's scores are rows of the whole batch; alone they would be other rows.
    if case.settings.selector == Selector::External || batch.q_len(req) == 0 {
        return Ok(());
    }
    let alone = variants::alone(case, req);
    let ran_alone = worker.run(&alone, &Given::Nothing)?;
    let (together, apart) = (selection_bits(case, ran, req), selection_bits(&alone, &ran_alone, 0));
    let wrong = |what: &str| Err(Refusal::Fault(format!("request {req} alone has other {what}")));
    match (together.0 == apart.0, together.1 == apart.1) {
        (false, _) => wrong("lists"),
        (_, false) => wrong("scores"),
        _ => Ok(()),
    }
}

/// Keeping everything equals dense, bit for bit.
pub(crate) fn everything_kept(worker: &mut Worker, case: &Case) -> Result<(), Refusal> {
    let mut kept = case.clone();
    if kept.settings.selector == Selector::External {
        kept.settings.selector = Selector::SampledExact;
        kept.settings.block_size = kept.settings.block_size.max(16);
    }
    kept.settings = Settings { keep: Keep::Density(1.0), max_density: 1.0, ..kept.settings };
    let mut dense = kept.clone();
    dense.settings.selector = Selector::Dense;
    let (kept, dense) = (worker.run(&kept, &Given::Nothing)?, worker.run(&dense, &Given::Nothing)?);
    same_results(&kept, &dense).map_err(|e| Refusal::Fault(format!("everything kept is not dense: {e}")))
}

/// Every request of a batch of 16 alone, for the given selector.
pub(crate) fn batch_of_16(worker: &mut Worker, selector: Selector, seed: u64) -> Result<(), Refusal> {
    let mut rng = Rng::new(seed);
    let shape = super::cases::shape(&mut rng);
    let settings = super::scenes::settings(selector, 32);
    let lens: Vec<Lens> = (0..16)
        .map(|_| (rng.pick(&[1, 5, 40, 130]), rng.below(400)))
        .map(|(q, past)| Lens { q, kv: q + past })
        .collect();
    let case = Case::with(&mut rng, shape, settings, &lens);
    let ran = worker.run(&case, &Given::Nothing)?;
    for req in 0..16 {
        let alone = variants::alone(&case, req);
        let apart = worker.run(&alone, &Given::Nothing)?;
        if selection_bits(&case, &ran, req) != selection_bits(&alone, &apart, 0) {
            let why = format!("{}: request {req} of 16 selects otherwise alone", selector.name());
            return Err(Refusal::Fault(why));
        }
    }
    Ok(())
}

fn same_results(a: &Ran, b: &Ran) -> Done {
    let (a, b) = (&a.attended, &b.attended);
    if a.out.store.bits() != b.out.store.bits() {
        return Err("out has other bits".into());
    }
    let bits = |lse: &[f32]| lse.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    if bits(&a.lse) != bits(&b.lse) { Err("lse has other bits".into()) } else { Ok(()) }
}
