//! Block tables that name what they must not: nothing outside a request's own valid pages reaches any result.
//!
//! Entries out of range are found on the device, request by request (on a CPU context by status, before anything is
//! written). An entry in range is the engine's word: exactly the page it names is read, and nobody else sees it.

use compactattn::capi::compactattn_status as status;

use super::abi::Refusal;
use super::bad_input::{blind, results};
use super::cases;
use super::check::{Worker, given};
use super::device::Device;
use super::rounds::{Rounds, is_own};
use super::step::{Done, Step, lse_stride, store_bytes};
use crate::common::case::Case;
use crate::common::rng::Rng;
use crate::common::tenants;

pub(crate) fn run(device: &Device, rounds: &Rounds) -> bool {
    rounds.run(device, |worker, rng, _| one(worker, rng))
}

fn one(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let mut case = cases::several(rng);
    tenants::fill_unowned(&mut case, rng);
    let given = given(&case, rng);
    let on_gpu = worker.device.cuda.is_some();
    let mut step = Step::new(worker.device, &mut worker.memory, &case, &given, worker.stream)?;
    step.update_summaries().map_err(Refusal::Fault)?;
    let verdict = match rng.below(4) {
        0 => tails(&mut step, rng),
        1 => in_range(&mut step, rng),
        _ if on_gpu => refused_on_device(&mut step, rng),
        _ => refused_by_status(&mut step, rng),
    };
    verdict.map_err(|why| Refusal::Fault(format!("{}: {why}", cases::describe(&case))))
}

/// Entries out of range, in some requests: those see nothing, all others what they saw.
fn refused_on_device(step: &mut Step, rng: &mut Rng) -> Done {
    let (table, hit) = corrupted(step.case, rng);
    let good = everything(step)?;
    let mut lens = step.case.seq_lens.clone();
    for &req in &hit {
        lens[req] = 0;
    }
    step.memory.set(step.parts.lens, bytemuck::cast_slice(&lens));
    let emptied = everything(step)?;
    step.memory.set(step.parts.lens, bytemuck::cast_slice(&step.case.seq_lens));
    step.memory.set(step.parts.table, bytemuck::cast_slice(&table));
    // Summaries are made through the same table.
    step.update_summaries()?;
    let got = everything(step)?;
    if !all_own(&emptied, &got) {
        return Err(format!("requests {hit:?} refused: not as if they held nothing"));
    }
    for &req in &hit {
        blind(step, req, &[got[0].clone(), got[1].clone()])?;
    }
    others_agree(step.case, &hit, &good, &got)?;
    step.memory.set(step.parts.table, bytemuck::cast_slice(&step.case.table));
    step.update_summaries()?;
    if everything(step)? == good { Ok(()) } else { Err("a good call after it has other bits".into()) }
}

/// The same on a CPU context: one status for the step, and nothing written.
fn refused_by_status(step: &mut Step, rng: &mut Rng) -> Done {
    let (table, hit) = corrupted(step.case, rng);
    let good = everything(step)?;
    step.memory.set(step.parts.table, bytemuck::cast_slice(&table));
    let want = if hit.is_empty() { status::COMPACTATTN_OK } else { status::COMPACTATTN_E_TABLE };
    let got = results(step, want, &|_, _| {})?;
    if hit.is_empty() && got[..] != good[..2] {
        return Err("entries of a request without queries changed something".into());
    }
    step.memory.set(step.parts.table, bytemuck::cast_slice(&step.case.table));
    if everything(step)? == good { Ok(()) } else { Err("a good call after it has other bits".into()) }
}

/// Whatever follows the valid prefix of a row, other tenants' pages among it, changes no bit.
fn tails(step: &mut Step, rng: &mut Rng) -> Done {
    let case = step.case;
    let good = everything(step)?;
    let mut table = case.table.clone();
    for (req, row) in table.chunks_mut(case.table_stride.max(1)).enumerate() {
        let used = valid_pages(case, req).min(row.len());
        for entry in &mut row[used..] {
            let other = rng.below(case.pools.num_pages) as i32;
            *entry = rng.pick(&[-1, i32::MIN, i32::MAX, other, other]);
        }
    }
    step.memory.set(step.parts.table, bytemuck::cast_slice(&table));
    step.update_summaries()?;
    let got = everything(step)?;
    if all_own(&good, &got) { Ok(()) } else { Err("the tail of a table row was read".into()) }
}

/// One entry names a page that is another's, or nobody's: the step that has that page's contents on the request's own
/// page gives the same bits, so that page alone was read; and no other request sees a difference.
fn in_range(step: &mut Step, rng: &mut Rng) -> Done {
    let case = step.case;
    let Some((req, entry)) = lone_page(case, rng) else { return Ok(()) };
    // A summary of a block of several pages is kept by the last of them: its owner's and this request's would be two.
    let apart = step.needs_summaries() && case.settings.block_size > case.shape.page_size;
    let own = case.table[req * case.table_stride + entry] as usize;
    let owned = tenants::owned_pages(case);
    let foreign: Vec<usize> =
        (0..case.pools.num_pages).filter(|page| *page != own && !(apart && owned[*page] > 0)).collect();
    if foreign.is_empty() {
        return Ok(());
    }
    let page = rng.pick(&foreign);
    let good = everything(step)?;
    let mut table = case.table.clone();
    table[req * case.table_stride + entry] = page as i32;
    step.memory.set(step.parts.table, bytemuck::cast_slice(&table));
    step.update_summaries()?;
    let got = everything(step)?;
    others_agree(case, &[req], &good, &got)?;
    let mut copied = case.clone();
    tenants::copy_page(&mut copied, page, own);
    step.memory.set(step.parts.table, bytemuck::cast_slice(&case.table));
    step.memory.set(step.parts.kv, store_bytes(&copied.pools.store));
    step.update_summaries()?;
    if everything(step)? == got {
        return Ok(());
    }
    Err(format!("page {page} as entry {entry} of request {req}: not as if its contents lay on page {own}"))
}

/// out and lse of the whole pass, then of the stages.
fn everything(step: &Step) -> Result<Vec<Vec<u8>>, String> {
    let [out, lse] = results(step, status::COMPACTATTN_OK, &|_, _| {})?;
    step.stages()?;
    let [staged_out, staged_lse] = step.parts.staged.map(|part| step.memory.get(part));
    if staged_out != out || staged_lse != lse {
        return Err("forward and the stages differ".into());
    }
    Ok(vec![out, lse])
}

/// A table with 1 to n bad entries within valid prefixes; the requests with queries that have one.
fn corrupted(case: &Case, rng: &mut Rng) -> (Vec<i32>, Vec<usize>) {
    let mut table = case.table.clone();
    let mut hit = Vec::new();
    let rows: Vec<usize> = (0..case.seq_lens.len()).filter(|&req| valid_pages(case, req) > 0).collect();
    let page_elements = case.pools.strides.of(false).1[0] as i64;
    // Ids whose product with a page's elements, or bytes, wraps at 32 bits to a small offset.
    let wraps = [(1_i64 << 32) / page_elements + 1, (1_i64 << 31) / page_elements + 1, 1 << 30];
    let wraps = wraps.map(|id| id.clamp(case.pools.num_pages as i64, i32::MAX.into()) as i32);
    let n = case.pools.num_pages as i32;
    let above = [i32::MAX, n, wraps[0], wraps[1], wraps[2], i32::MAX - n];
    // Alone in half of the steps: another bad entry would hide one that is let through.
    let below = [-1, -2, -n, i32::MIN, i32::MIN + 1, i32::MIN + n, -wraps[0], -wraps[2]];
    let all = [&above[..], &below].concat();
    let bad = rng.pick(&[&below[..], &below, &above, &all]);
    for _ in 0..rng.pick(&[1, 1, 1, 2, 5, 50]) {
        let Some(&req) = rows.get(rng.below(rows.len().max(1))) else { break };
        let pages = valid_pages(case, req);
        let any = rng.below(pages);
        let at = rng.pick(&[0, pages - 1, any]);
        table[req * case.table_stride + at] = rng.pick(bad);
        hit.push(req);
    }
    hit.sort_unstable();
    hit.dedup();
    (table, hit)
}

/// Pages that request `req` reads; a request without queries reads none.
fn valid_pages(case: &Case, req: usize) -> usize {
    let idle = case.cu_seqlens_q[req + 1] == case.cu_seqlens_q[req];
    let kv = usize::try_from(case.seq_lens[req]).unwrap_or(0);
    if idle { 0 } else { kv.div_ceil(case.shape.page_size) }
}

/// A request and an entry of its table whose page no other entry names.
fn lone_page(case: &Case, rng: &mut Rng) -> Option<(usize, usize)> {
    let owned = tenants::owned_pages(case);
    let of = |req: usize| (0..valid_pages(case, req)).map(move |entry| (req, entry));
    let lone: Vec<(usize, usize)> = (0..case.seq_lens.len())
        .flat_map(of)
        .filter(|(req, entry)| owned[case.table[req * case.table_stride + entry] as usize] == 1)
        .collect();
    (!lone.is_empty()).then(|| rng.pick(&lone))
}

fn all_own(wanted: &[Vec<u8>], got: &[Vec<u8>]) -> bool {
    wanted.iter().zip(got).map(|(wanted, got)| is_own(wanted, got)).fold(true, |all, own| all & own)
}

/// Rows of requests other than `except` have the same bits.
fn others_agree(case: &Case, except: &[usize], good: &[Vec<u8>], got: &[Vec<u8>]) -> Done {
    for req in (0..case.seq_lens.len()).filter(|req| !except.contains(req)) {
        for token in case.cu_seqlens_q[req] as usize..case.cu_seqlens_q[req + 1] as usize {
            let of = |results| tenants::row_bytes(case, results, lse_stride(case), token);
            if !is_own(&of(good), &of(got)) {
                return Err(format!("requests {except:?} spoiled: token {token} of request {req} changed"));
            }
        }
    }
    Ok(())
}
