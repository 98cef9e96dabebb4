//! Hours of an engine in minutes: requests that come, are aborted and leave; a pool that is nearly full; modes that
//! change; plans made anew. Sampled rows against f64, one step always the same to the bit and timed, nothing leaked.

use std::time::{Duration, Instant};

use compactattn::plan::Limits;
use compactattn::settings::{Selector, Settings};
use compactattn::types::{Dtype, Shape};

use super::abi::{Plan, Refusal};
use super::device::Device;
use super::engine::{Engine, Scale};
use super::levels::{Level, sees_a_plan};
use super::memory::{Memory, Packing};
use super::rounds::Rounds;
use super::rows;
use super::scenes;
use super::step::{Done, Given, Parts, Step, place};
use crate::common::case::Case;

const SELECTORS: [Selector; 3] = [Selector::SampledExact, Selector::FlashPrefill, Selector::Dense];
/// Every so many steps: rows are judged; the fixed step runs.
const JUDGED: usize = 64;
const PROBED: usize = 16;
/// Of the host, with each plan that --leak keeps.
const LEAKED_BYTES: usize = 4 << 20;

pub(crate) fn run(device: &Device, rounds: &Rounds) -> bool {
    device.enter();
    let seconds = if rounds.seconds > 0 { rounds.seconds } else { u64::MAX / 4 };
    let until = Instant::now() + Duration::from_secs(seconds.min(1 << 30));
    match soak(device, rounds, until) {
        Ok(()) => true,
        Err(Refusal::Unsupported(why)) => {
            println!("  not offered here: {why}");
            false
        }
        Err(Refusal::Fault(why)) => {
            let kind = if device.cuda.is_some() { "" } else { " --device cpu" };
            let kv = if rounds.kv == Dtype::E4m3 { " --kv e4m3" } else { "" };
            let leak = if rounds.leak { " --leak 1" } else { "" };
            println!(
                "  gpu_suite soak --seed {} --count {}{kv}{leak}{kind}\n    {why}",
                rounds.seed, rounds.count
            );
            false
        }
    }
}

fn soak(device: &Device, rounds: &Rounds, until: Instant) -> Result<(), Refusal> {
    let scale = scale(device, rounds.kv);
    let mut engine = Engine::new(rounds.seed, scale, settings_of(0));
    sees_a_plan(device, &engine.case, rounds.shared)?;
    let mut plans = Vec::new();
    for mode in (0..SELECTORS.len()).rev() {
        engine.case.settings = settings_of(mode);
        plans.insert(0, Plan::new(device, &engine.case, &Given::Nothing)?);
    }
    let mut memory = Memory::new(device, Packing::Together);
    let sizes = largest(&plans);
    let parts = place(&mut memory, &engine.case, &Given::Nothing, &sizes);
    memory.push();
    let seals = vec![0; parts.seals.len];
    memory.set(parts.seals, &seals);
    let workspace = memory.workspace(sizes.workspace_bytes as usize);
    let stream = device.new_stream();
    let mut site =
        Site { device, memory, parts, workspace, stream, plans: plans.into_iter().map(Some).collect() };
    let mut soak = Soak { leaks: rounds.leak, ..Soak::default() };
    let (start, mut steps) = (Instant::now(), 0);
    while steps < rounds.count as usize && Instant::now() < until {
        soak.step(&mut site, &mut engine, steps).map_err(|e| at_step(e, steps))?;
        steps += 1;
    }
    println!("  seed {}, a cache of {}", rounds.seed, rounds.kv.name());
    soak.report(&engine, steps, start.elapsed());
    site.memory.pull();
    if !site.memory.canaries_hold(sizes.workspace_bytes as usize) {
        return Err(Refusal::Fault("something beside a buffer was written to".into()));
    }
    soak.verdict(device.cuda.is_some() && !rounds.shared, &engine).map_err(Refusal::Fault)
}

fn at_step(refusal: Refusal, step: usize) -> Refusal {
    match refusal {
        Refusal::Fault(why) => Refusal::Fault(format!("step {step}: {why}")),
        other => other,
    }
}

fn settings_of(mode: usize) -> Settings {
    scenes::settings(SELECTORS[mode], 64)
}

/// 128K tokens and chunks of up to 8192 on a GPU; a miniature elsewhere.
fn scale(device: &Device, kv_dtype: Dtype) -> Scale {
    let shape = |heads, head_dim, page| -> Shape {
        Shape { kv_dtype, ..scenes::shape(heads, head_dim, page, Dtype::Bf16) }
    };
    if device.cuda.is_some() {
        let limits = Limits { max_num_reqs: 16, max_total_q: 8192, max_kv_len: 131_072 };
        return Scale { shape: shape([16, 4], 128, 64), limits, num_pages: 4096, chunk: [512, 8192] };
    }
    let limits = Limits { max_num_reqs: 6, max_total_q: 96, max_kv_len: 1024 };
    Scale { shape: shape([4, 2], 64, 16), limits, num_pages: 128, chunk: [8, 96] }
}

/// Room for every plan's step.
fn largest(plans: &[Plan]) -> compactattn::capi::compactattn_sizes {
    let mut most = plans[0].sizes;
    for sizes in plans.iter().map(|plan| &plan.sizes) {
        most.workspace_bytes = most.workspace_bytes.max(sizes.workspace_bytes);
        most.select_rows = most.select_rows.max(sizes.select_rows);
        most.list_rows = most.list_rows.max(sizes.list_rows);
        most.max_blocks = most.max_blocks.max(sizes.max_blocks);
        most.mask_words = most.mask_words.max(sizes.mask_words);
        most.max_boxes = most.max_boxes.max(sizes.max_boxes);
        most.summary_slots_per_page = most.summary_slots_per_page.max(sizes.summary_slots_per_page);
    }
    most
}

/// What the library is given.
struct Site<'d> {
    device: &'d Device,
    memory: Memory<'d>,
    parts: Parts,
    workspace: *mut u8,
    stream: super::driver::Handle,
    plans: Vec<Option<Plan>>,
}

impl Site<'_> {
    /// Runs `body` on the engine's step, whose settings are those of plan `mode`.
    fn with<T>(
        &mut self,
        case: &Case,
        mode: usize,
        body: impl FnOnce(&mut Step) -> Result<T, String>,
    ) -> Result<T, Refusal> {
        let plan = match self.plans[mode].take() {
            Some(plan) => plan,
            None => Plan::new(self.device, case, &Given::Nothing)?,
        };
        let mut step = Step {
            case,
            layout: case.layout(),
            plan,
            given: &Given::Nothing,
            memory: &mut self.memory,
            parts: self.parts,
            workspace: self.workspace,
            stream: self.stream,
            sealed: true,
        };
        let answer = body(&mut step).map_err(Refusal::Fault);
        let Step { plan, .. } = step;
        self.plans[mode] = Some(plan);
        answer
    }
}

/// What was seen on the way.
#[derive(Default)]
struct Soak {
    mode: usize,
    toggles: usize,
    renewed: usize,
    judged: usize,
    rows: usize,
    /// Of the fixed step.
    bits: Option<Vec<u8>>,
    /// Seconds of each fixed step.
    times: Vec<f64>,
    levels: Vec<Level>,
    /// Whether to leak on purpose, and what.
    leaks: bool,
    leaked: Vec<(Plan, Vec<u8>)>,
}

impl Soak {
    fn step(&mut self, site: &mut Site, engine: &mut Engine, i: usize) -> Result<(), Refusal> {
        if engine.rng.once_in(20) {
            self.toggle(site, engine);
        }
        let left = engine.leave();
        let written = engine.advance();
        let samples: Vec<u64> = (0..8).map(|_| engine.rng.next()).collect();
        let device = site.device;
        let judged = i.is_multiple_of(JUDGED);
        self.rows += site.with(&engine.case, self.mode, |step| {
            Engine::poison(step, step.parts.kv, &left);
            Engine::upload(step, &written);
            step.forward()?;
            device.sync();
            rows::finite(step)?;
            if judged { rows::judge(step, &samples) } else { Ok(0) }
        })?;
        self.judged += usize::from(judged);
        if i.is_multiple_of(PROBED) && engine.probe().is_some() {
            engine.case.settings = settings_of(0);
            self.probe(site, engine)?;
            engine.case.settings = settings_of(self.mode);
        }
        if judged {
            if self.leaks {
                let plan = Plan::new(device, &engine.case, &Given::Nothing)?;
                self.leaked.push((plan, vec![1; LEAKED_BYTES]));
            }
            self.levels.push(Level::now(device));
        }
        Ok(())
    }

    /// Another mode; one time in four its plan is made anew.
    fn toggle(&mut self, site: &mut Site, engine: &mut Engine) {
        self.mode = engine.rng.below(SELECTORS.len());
        engine.case.settings = settings_of(self.mode);
        self.toggles += 1;
        if engine.rng.once_in(4) {
            site.plans[self.mode] = None;
            self.renewed += 1;
        }
    }

    /// The fixed step: the bits of its first time, and how long it took.
    fn probe(&mut self, site: &mut Site, engine: &Engine) -> Result<(), Refusal> {
        let device = site.device;
        let (seconds, bits) = site.with(&engine.case, 0, |step| {
            Engine::upload(step, &Vec::new());
            // Once to bring its pages near, as every step but the first of an engine finds them.
            step.forward()?;
            device.sync();
            let start = Instant::now();
            step.forward()?;
            device.sync();
            Ok((start.elapsed().as_secs_f64(), rows::bits(step)))
        })?;
        self.times.push(seconds);
        match &self.bits {
            Some(first) if *first != bits => Err(Refusal::Fault("the fixed step has other bits".into())),
            Some(_) => Ok(()),
            None => {
                self.bits = Some(bits);
                Ok(())
            }
        }
    }

    fn report(&self, engine: &Engine, steps: usize, took: Duration) {
        println!(
            "  {steps} steps in {:.1} s: {} requests, {} done, {} aborted; {} mode changes, {} plans made anew",
            took.as_secs_f64(),
            engine.admitted,
            engine.finished,
            engine.aborted,
            self.toggles,
            self.renewed
        );
        println!(
            "  pool: {} of {} pages at the fullest, each handed out {:.1} times; {} rows of {} steps judged",
            engine.fullest,
            engine.scale.num_pages,
            engine.handed_out as f64 / engine.scale.num_pages as f64,
            self.rows,
            self.judged
        );
        let [early, late] = self.quarters();
        println!(
            "  fixed step, {} times: p50 {:.3} then {:.3} ms, p99 {:.3} then {:.3} ms",
            self.times.len(),
            1e3 * at(&early, 0.5),
            1e3 * at(&late, 0.5),
            1e3 * at(&early, 0.99),
            1e3 * at(&late, 0.99)
        );
        if let [Some(warm), Some(last)] = self.ends() {
            println!("  after warm-up {warm:?}\n  at the end    {last:?}");
            println!("  growth: {}; 0 mismatches, 0 foreign bytes", last.growth(&warm));
        }
    }

    /// Nothing grew, nothing slowed down, and what was to be tried was.
    /// `alone`: on a GPU that nobody else uses, whose clock and free memory are the soak's own.
    fn verdict(&self, alone: bool, engine: &Engine) -> Done {
        if self.rows == 0 || engine.finished == 0 || engine.aborted == 0 {
            return Err("too short: no row judged, or no request done or aborted".into());
        }
        if engine.fullest * 100 < engine.scale.num_pages * 95 {
            return Err(format!("the pool was never full: {} pages", engine.fullest));
        }
        if let [Some(warm), Some(last)] = self.ends() {
            last.judge(&warm, alone)?;
        }
        let [early, late] = self.quarters();
        if alone && late.len() >= 50 && at(&late, 0.5) > 1.05 * at(&early, 0.5) {
            return Err("the fixed step has become slower".into());
        }
        Ok(())
    }

    /// Times of the first quarter after warm-up, and of the last, sorted.
    fn quarters(&self) -> [Vec<f64>; 2] {
        let n = self.times.len();
        [n / 4..n / 2, n - n / 4..n].map(|range| {
            let mut times = self.times[range].to_vec();
            times.sort_by(f64::total_cmp);
            times
        })
    }

    /// Levels after a quarter of the run, and at its end.
    fn ends(&self) -> [Option<Level>; 2] {
        let n = self.levels.len();
        [self.levels.get(n / 4), self.levels.last()].map(Option::<&Level>::copied)
    }
}

/// Sorted times' quantile.
fn at(times: &[f64], q: f64) -> f64 {
    times.get(((times.len() as f64 - 1.0) * q).round().max(0.0) as usize).copied().unwrap_or(f64::NAN)
}
