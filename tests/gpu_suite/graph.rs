//! A whole pass, and the tables for other kernels of given lists, recorded once, then replayed while lengths, tables and contents change on the device between replays.
//!
//! On the CPU context, which has no graphs, a second call stands in for the replay: that tests this test.

use compactattn::settings::Selector;
use compactattn::types::Dtype;

use super::abi::Refusal;
use super::check::Worker;
use super::device::Device;
use super::driver::Graph;
use super::exports;
use super::memory::Packing;
use super::scenes;
use super::step::{Done, Given, Step, store_bytes};
use crate::common::case::{Case, Lens};
use crate::common::judge;
use crate::common::rng::Rng;

const REQS: usize = 3;
const TOTAL_Q: usize = 96;
const MAX_KV: usize = 640;
/// Every so many comparisons, the oracle judges too.
const JUDGED: usize = 50;
/// Of more replays than this, one in a hundred is compared, and memory comes and goes between the others.
const COMPARED: usize = 2000;

/// `replays` of each selector's pass; whether each gave the bits of an eager call.
pub(crate) fn run(device: &Device, replays: usize) -> bool {
    let mut right = true;
    for selector in [Selector::SampledExact, Selector::FlashPrefill, Selector::Dense] {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            match replay(device, selector, dtype, replays) {
                Ok(()) => {}
                Err(Refusal::Unsupported(why)) => println!("  not offered here: {why}"),
                Err(Refusal::Fault(why)) => {
                    println!("  {} {}: {why}", selector.name(), dtype.name());
                    right = false;
                }
            }
        }
    }
    right
}

fn replay(device: &Device, selector: Selector, dtype: Dtype, replays: usize) -> Result<(), Refusal> {
    let mut rng = Rng::new(selector as u64);
    let shape = scenes::shape([8, 2], 128, 64, dtype);
    let full = [Lens { q: TOTAL_Q / REQS, kv: MAX_KV }; REQS];
    let base = Case::with(&mut rng, shape, scenes::settings(selector, 32), &full);
    let mut worker = Worker::new(device, Packing::Together);
    let mut judge = Worker::new(device, Packing::Together);
    let stream = worker.stream;
    let step = Step::new(device, &mut worker.memory, &base, &Given::Nothing, stream)?;
    let mut stepped = Stepped::new(device, step).map_err(Refusal::Fault)?;
    let mut case = base.clone();
    let mut compared = 0;
    for i in 0..replays {
        if replays > COMPARED && i % 100 != 0 {
            stepped.unwatched(&case, &mut rng).map_err(Refusal::Fault)?;
            continue;
        }
        compared += 1;
        case.refill(&mut rng, &lens(&mut rng_of(i)));
        let at = |e: String| Refusal::Fault(format!("replay {i}: {e}"));
        let got = stepped.compare(&case).map_err(at)?;
        if compared % JUDGED == 1 {
            let ran = judge.judged(&case, &Given::Nothing).map_err(|e| within(i, e))?;
            if store_bytes(&ran.attended.out.store) != got {
                return Err(at("out is not that of a fresh plan".into()));
            }
        }
    }
    let calls = stepped.step.plan.stats().calls;
    let want = stepped.calls(replays, compared);
    if calls != want {
        return Err(Refusal::Fault(format!("{calls} calls counted, not {want}")));
    }
    Ok(())
}

fn within(i: usize, refusal: Refusal) -> Refusal {
    match refusal {
        Refusal::Fault(why) => Refusal::Fault(format!("replay {i}, judged: {why}")),
        other => other,
    }
}

fn rng_of(i: usize) -> Rng {
    Rng::new(i as u64 + 1000)
}

/// Chunks of any length that add up, decode rows and idle requests among them, each within its row of the table.
fn lens(rng: &mut Rng) -> Vec<Lens> {
    let mut cuts = [rng.below(TOTAL_Q + 1), rng.pick(&[0, 1, TOTAL_Q - 1, TOTAL_Q, 40])];
    cuts.sort_unstable();
    let ends = [0, cuts[0], cuts[1], TOTAL_Q];
    let one = |q: usize, rng: &mut Rng| {
        let past = rng.pick(&[0, 1, 31, 32, 63, 64, 65, MAX_KV]).min(MAX_KV - q);
        let past = if rng.once_in(2) { rng.below(MAX_KV - q + 1) } else { past };
        Lens { q, kv: if rng.once_in(20) { rng.below(q + 1) } else { q + past } }
    };
    ends.windows(2).map(|w| one(w[1] - w[0], rng)).collect()
}

/// A step, and its pass recorded.
struct Stepped<'a, 'd> {
    step: Step<'a, 'd>,
    device: &'d Device,
    graph: Option<Graph<'d>>,
    /// What the exports read; no pass writes it.
    lists: Vec<u32>,
}

impl<'a, 'd> Stepped<'a, 'd> {
    /// Warms up, then records.
    fn new(device: &'d Device, step: Step<'a, 'd>) -> Result<Self, String> {
        let lists = judge::sparse_bits(&mut Rng::new(5), step.parts.lists.len / 4);
        step.memory.set(step.parts.lists, bytemuck::cast_slice(&lists));
        step.update_summaries()?;
        step.forward()?;
        device.sync();
        let Some(cuda) = &device.cuda else { return Ok(Self { step, device, graph: None, lists }) };
        let record = || step.forward().and_then(|()| step.exports(step.stream));
        let (graph, done) = cuda.capture(step.stream, record);
        done.map_err(|e| format!("under capture: {e}"))?;
        Ok(Self { step, device, graph: Some(graph?), lists })
    }

    /// Passes counted: the warm-up, a replay each, and a call in each comparison. Recording counts none.
    fn calls(&self, replays: usize, compared: usize) -> i64 {
        1 + (replays + compared) as i64
    }

    /// A replay with other lengths, among allocations that come and go; what it leaves behind must not matter.
    fn unwatched(&mut self, case: &Case, rng: &mut Rng) -> Done {
        let shorter = |&kv: &i32| (kv - rng.below(40) as i32).max(0);
        let lens: Vec<i32> = case.seq_lens.iter().map(shorter).collect();
        self.step.memory.set(self.step.parts.lens, bytemuck::cast_slice(&lens));
        if rng.once_in(4) {
            let bytes = 1 << rng.within(8, 24);
            let noise = self.device.allocate(bytes);
            self.device.fill(noise, 0xFF, bytes);
            self.launch()?;
            self.device.release(noise, bytes);
            return Ok(());
        }
        self.launch()
    }

    /// Puts the case's contents where the graph reads, replays, calls, compares; out.
    fn compare(&mut self, case: &Case) -> Result<Vec<u8>, String> {
        // Unwatched replays leave exports behind.
        self.step.poison_exports();
        let parts = self.step.parts;
        for (part, bytes) in [
            (parts.q, store_bytes(&case.q.store)),
            (parts.kv, store_bytes(&case.pools.store)),
            (parts.cu, bytemuck::cast_slice(&case.cu_seqlens_q)),
            (parts.lens, bytemuck::cast_slice(&case.seq_lens)),
            (parts.table, bytemuck::cast_slice(&case.table)),
        ] {
            self.step.memory.set(part, bytes);
        }
        self.step.update_summaries()?;
        let replayed = self.results(Self::launch)?;
        self.judge_exports(case)?;
        let eager = self.results(|this| this.step.forward())?;
        if replayed != eager {
            let what = if replayed[0] == eager[0] { "lse" } else { "out" };
            return Err(format!("{what} has other bits than an eager call's"));
        }
        let [out, _] = eager;
        Ok(out)
    }

    fn launch(&self) -> Done {
        match (&self.graph, &self.device.cuda) {
            (Some(graph), Some(cuda)) => {
                graph.launch(self.step.stream);
                cuda.sync_stream(self.step.stream);
                Ok(())
            }
            _ => self.step.forward().and_then(|()| self.step.exports(self.step.stream)),
        }
    }

    /// What the replay left of the exports, then poison again.
    fn judge_exports(&self, case: &Case) -> Done {
        let (step, parts) = (&self.step, &self.step.parts.exports);
        let got = parts.map(|part| bytemuck::pod_collect_to_vec(&step.memory.get(part)));
        step.poison_exports();
        exports::compare(&got, &exports::expected(case, &self.lists, parts, self.device.cuda.is_some())?)
    }

    fn results(&self, call: impl FnOnce(&Self) -> Done) -> Result<[Vec<u8>; 2], String> {
        self.step.poison_results();
        call(self)?;
        Ok(self.step.parts.whole.map(|part| self.step.memory.get(part)))
    }
}
