//! One contender at one density: the knob bisected over all layers and lists at once, then error and time.

use std::collections::HashMap;

use compactattn::plan::Layout;
use compactattn::settings::{Keep, Scope, Selector, Settings};
use compactattn::union::Counts;
use compactattn::{Error, Result, Status};

use crate::agree::{self, Agreement};
use crate::contender::{BLOCK, Contender, Knob, even};
use crate::gpu::Gpu;
use crate::prefill::Prefill;
use crate::stages::{self, Lists, Timed};

/// A measured contender.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// Who.
    pub(crate) contender: Contender,
    /// The density asked for.
    pub(crate) target: f64,
    /// The density reached: past tokens read, as a share of the whole blocks of 128, over all layers and lists.
    pub(crate) density: f64,
    /// Mean over (layer, KV head) of `||o_sparse - o||_F / ||o||_F`.
    pub(crate) error: f64,
    /// One forward of the chunk, select to combine, mean over layers.
    pub(crate) ms: f64,
    /// Where a GPU runs the others, why this row's error, lists and time are the CPU's.
    pub(crate) off_gpu: Option<String>,
    /// The knob's value.
    pub(crate) knob: f32,
    /// Of each layer, for plots.
    pub(crate) lists: Vec<Vec<u32>>,
    /// How the layers were cut.
    pub(crate) layout: Layout,
}

/// The layers, their dense outputs, and every score computed so far.
#[derive(Debug)]
pub(crate) struct Sweep<'a> {
    prefills: &'a [Prefill],
    gpu: Option<&'a Gpu>,
    dense: Vec<Timed<Vec<f32>>>,
    on_gpu: Option<Dense>,
    scores: HashMap<Key, Vec<Timed<Vec<f32>>>>,
    agreement: Agreement,
}

/// Dense attention on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dense {
    /// Mean over layers.
    pub(crate) ms: f64,
    /// Against the CPU's in f32.
    pub(crate) error: f64,
}

/// One contender under one setting, over all layers.
struct Measured {
    ms: f64,
    error: f64,
    lists: Vec<Lists>,
}

/// What scores depend on: selector, block size, select span, and, for `two_level`, its budget in permille.
type Key = (Selector, usize, usize, u32);

impl<'a> Sweep<'a> {
    /// Attends densely once on the CPU, in f32: what errors are measured against; and on the GPU, where one is to run
    /// what it offers.
    ///
    /// # Errors
    /// [`Status::Shape`] for a sequence without enough past; those of the stages and of [`Gpu::forward`].
    pub(crate) fn new(prefills: &'a [Prefill], gpu: Option<&'a Gpu>) -> Result<Self> {
        let batch = prefills[0].batch()?;
        let past_blocks = batch.past_len(0) / BLOCK;
        if past_blocks < MIN_PAST_BLOCKS {
            let wanted = format!("at least {} KV tokens before the queries", MIN_PAST_BLOCKS * BLOCK);
            return Err(Error::new(Status::Shape, "trace", wanted, batch.past_len(0)));
        }
        let settings = even(Selector::Dense, Scope::GROUP_CHUNK);
        let dense = prefills.iter().map(|prefill| {
            let layout = prefill.layout(&settings)?;
            let scores = stages::score(prefill, &layout)?;
            let lists = stages::unite(prefill, &layout, &scores.value)?;
            stages::attend(prefill, &layout, &lists.bits)
        });
        let dense = dense.collect::<Result<_>>()?;
        let (scores, agreement) = (HashMap::new(), Agreement::default());
        let mut sweep = Self { prefills, gpu, dense, on_gpu: None, scores, agreement };
        if let Some(gpu) = gpu {
            let mut dense = Dense { ms: 0.0, error: 0.0 };
            for (prefill, cpu) in prefills.iter().zip(&sweep.dense) {
                let ran = gpu.forward(prefill, &settings, None)?;
                let out = ran.forward.out.to_f32();
                sweep.agreement = sweep.agreement.and(agree::compare(prefill, &out, &cpu.value)?);
                dense.ms += ran.ms / prefills.len() as f64;
                dense.error += mean_error(prefill, &out, &cpu.value) / prefills.len() as f64;
            }
            sweep.on_gpu = Some(dense);
        }
        Ok(sweep)
    }

    /// Dense attention on the GPU, if there is one.
    pub(crate) fn dense_on_gpu(&self) -> Option<Dense> {
        self.on_gpu
    }

    /// How the GPU's outputs so far compare with the CPU's.
    pub(crate) fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    /// Milliseconds of dense attention on the CPU, mean over layers.
    pub(crate) fn dense_ms(&self) -> f64 {
        self.dense.iter().map(|timed| timed.ms).sum::<f64>() / self.dense.len() as f64
    }

    /// Finds the knob's value whose density is nearest to `target`, then measures there.
    ///
    /// # Errors
    /// Those of the stages.
    pub(crate) fn measure(&mut self, contender: &Contender, target: f64) -> Result<Row> {
        let scored = self.scored(contender, target)?;
        let mut nearest = (f64::INFINITY, 0.0);
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..BISECTIONS {
            let at = f64::midpoint(low, high);
            let knob = knob_at(contender.knob, at);
            let density =
                self.density(&self.lists(contender, &scored, knob)?.value, contender.settings.block_size);
            if (density - target).abs() < (nearest.0 - target).abs() {
                nearest = (density, knob);
            }
            if density > target { high = at } else { low = at }
        }
        self.measure_at(contender, target, &scored, nearest.1)
    }

    /// Measures settings as they are.
    ///
    /// # Errors
    /// Those of the stages.
    pub(crate) fn as_set(&mut self, settings: &Settings) -> Result<Row> {
        let (knob, x) = match settings.keep {
            Keep::Threshold(x) => (Knob::Threshold, x),
            Keep::Mass(x) => (Knob::Mass, x),
            Keep::Density(x) => (Knob::Density, x),
        };
        let contender = Contender { settings: *settings, knob };
        let scored = self.scored(&contender, f64::from(x))?;
        self.measure_at(&contender, f64::from(x), &scored, x)
    }

    fn measure_at(&mut self, contender: &Contender, target: f64, scored: &Key, knob: f32) -> Result<Row> {
        let lists = self.lists(contender, scored, knob)?;
        let layout = self.prefills[0].layout(&contender.at(knob, self.past_blocks()))?;
        let outs = self.prefills.iter().zip(&lists.value);
        let outs = outs.map(|(prefill, lists)| stages::attend(prefill, &layout, &lists.bits));
        let outs = outs.collect::<Result<Vec<_>>>()?;
        let (measured, off_gpu) = match self.on_gpu(contender, scored, knob, (&lists.value, &outs)) {
            Ok(Some((measured, agreement))) => {
                self.agreement = self.agreement.and(agreement);
                (measured, None)
            }
            Ok(None) => (self.on_cpu(scored, lists, &outs), None),
            Err(error) if error.status() == Status::Unsupported => {
                (self.on_cpu(scored, lists, &outs), Some(error.to_string()))
            }
            Err(error) => return Err(error),
        };
        Ok(Row {
            contender: *contender,
            target,
            density: self.density(&measured.lists, contender.settings.block_size),
            error: measured.error,
            ms: measured.ms,
            off_gpu,
            knob,
            lists: measured.lists.into_iter().map(|lists| lists.bits).collect(),
            layout,
        })
    }

    /// What the stages took and gave.
    fn on_cpu(&self, scored: &Key, lists: Timed<Vec<Lists>>, outs: &[Timed<Vec<f32>>]) -> Measured {
        let layers = self.prefills.len() as f64;
        let (mut ms, mut error) = (lists.ms, 0.0);
        for (i, out) in outs.iter().enumerate() {
            ms += out.ms + self.scores[scored][i].ms;
            error += mean_error(&self.prefills[i], &out.value, &self.dense[i].value);
        }
        Measured { ms: ms / layers, error: error / layers, lists: lists.value }
    }

    /// One forward pass a layer on the GPU, compared with the CPU's attention over the lists that the GPU made; `None`
    /// without a GPU.
    fn on_gpu(
        &self,
        contender: &Contender,
        scored: &Key,
        knob: f32,
        (lists, outs): (&[Lists], &[Timed<Vec<f32>>]),
    ) -> Result<Option<(Measured, Agreement)>> {
        let Some(gpu) = self.gpu else { return Ok(None) };
        let settings = contender.at(knob, self.past_blocks());
        let mut all = Agreement::default();
        let mut measured = Measured { ms: 0.0, error: 0.0, lists: Vec::new() };
        for (i, prefill) in self.prefills.iter().enumerate() {
            let masks = match contender.knob {
                Knob::OracleMask => {
                    let rows = prefill.layout(&oracle_rows(knob))?;
                    Some(stages::masks(prefill, &rows, &self.scores[scored][i].value)?)
                }
                _ => None,
            };
            let ran = gpu.forward(prefill, &settings, masks.as_deref())?;
            let out = ran.forward.out.to_f32();
            let agreement = if ran.lists == lists[i].bits {
                agree::compare(prefill, &out, &outs[i].value)?
            } else {
                let own = stages::attend(prefill, &prefill.layout(&settings)?, &ran.lists)?;
                agree::compare(prefill, &out, &own.value)?
            };
            all = all.and(agreement.with_lists(&ran.lists, &lists[i].bits));
            measured.ms += ran.ms / self.prefills.len() as f64;
            measured.error += mean_error(prefill, &out, &self.dense[i].value) / self.prefills.len() as f64;
            measured.lists.push(Lists { bits: ran.lists, counts: ran.forward.stats.counts });
        }
        Ok(Some((measured, all)))
    }

    /// Scores every layer, or finds that it was done; where they are.
    fn scored(&mut self, contender: &Contender, target: f64) -> Result<Key> {
        let settings = scoring_settings(contender, target);
        let layout = self.prefills[0].layout(&settings)?;
        let budget = if settings.selector == Selector::TwoLevel { permille(target) } else { 0 };
        let key = (settings.selector, settings.block_size, layout.select_span(), budget);
        if !self.scores.contains_key(&key) {
            let scores = self.prefills.iter().map(|prefill| stages::score(prefill, &layout));
            self.scores.insert(key, scores.collect::<Result<_>>()?);
        }
        Ok(key)
    }

    /// The lists of every layer with the knob at `x`.
    fn lists(&self, contender: &Contender, scored: &Key, x: f32) -> Result<Timed<Vec<Lists>>> {
        let layout = self.prefills[0].layout(&contender.at(x, self.past_blocks()))?;
        let scored_layout = self.prefills[0].layout(&oracle_rows(x))?;
        let of = |(prefill, scores): (&Prefill, &Timed<Vec<f32>>)| match contender.knob {
            Knob::OracleMask => {
                let masks = stages::masks(prefill, &scored_layout, &scores.value)?;
                stages::unite_masks(prefill, &layout, &masks)
            }
            _ => stages::unite(prefill, &layout, &scores.value),
        };
        stages::timed(|| self.prefills.iter().zip(&self.scores[scored]).map(of).collect())
    }

    /// Past tokens read beyond the open tail, as a share of the whole blocks of [`BLOCK`]: equal tokens whatever the
    /// block size.
    fn density(&self, lists: &[Lists], block_size: usize) -> f64 {
        let past = self.past();
        let whole = past / BLOCK * BLOCK;
        let sum = |of: fn(&Counts) -> u64| lists.iter().map(|lists| of(&lists.counts)).sum::<u64>() as f64;
        let share = sum(|counts| counts.selected) / sum(|counts| counts.candidates);
        let candidates = past / block_size * block_size;
        let read = share * candidates as f64 + (past - candidates) as f64;
        (read - (past - whole) as f64) / whole as f64
    }

    fn past(&self) -> usize {
        self.prefills[0].limits.max_kv_len - self.prefills[0].q_len()
    }

    fn past_blocks(&self) -> usize {
        self.past() / BLOCK
    }
}

/// The settings whose scores a contender needs: `two_level` must know its budget before it scores.
fn scoring_settings(contender: &Contender, target: f64) -> Settings {
    match (contender.knob, contender.settings.selector) {
        (Knob::OracleMask, _) => oracle_rows(1.0),
        (_, Selector::TwoLevel) => Settings { keep: Keep::Density(narrow(target)), ..contender.settings },
        _ => contender.settings,
    }
}

/// The oracle's rows per head and 128 queries, thresholded: a mask as a caller of `external` might bring it.
fn oracle_rows(threshold: f32) -> Settings {
    Settings { keep: Keep::Threshold(threshold), ..even(Selector::Oracle, Scope::HEAD_128) }
}

/// The knob at a place in (0, 1) such that density rises with the place.
fn knob_at(knob: Knob, at: f64) -> f32 {
    match knob {
        // Scores span many decades, so thresholds are bisected in the log.
        Knob::Threshold | Knob::OracleMask => narrow((at * LOG_LOWEST).exp()),
        Knob::Mass | Knob::Density | Knob::Local => narrow(at),
    }
}

/// Mean over KV heads of the relative error of the group's rows.
pub(crate) fn mean_error(prefill: &Prefill, got: &[f32], want: &[f32]) -> f64 {
    let shape = &prefill.shape;
    let width = shape.group_size() * shape.head_dim;
    let (mut apart, mut norm) = (vec![0.0; shape.num_kv_heads], vec![0.0; shape.num_kv_heads]);
    for (i, (a, b)) in got.chunks_exact(width).zip(want.chunks_exact(width)).enumerate() {
        let head = i % shape.num_kv_heads;
        for (&a, &b) in a.iter().zip(b) {
            apart[head] += (f64::from(a) - f64::from(b)).powi(2);
            norm[head] += f64::from(b).powi(2);
        }
    }
    let each = apart.iter().zip(&norm).map(|(apart, norm)| (apart / norm).sqrt());
    each.sum::<f64>() / shape.num_kv_heads as f64
}

#[expect(clippy::cast_possible_truncation, reason = "settings are f32")]
fn narrow(x: f64) -> f32 {
    x as f32
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a density in (0, 1]")]
fn permille(x: f64) -> u32 {
    (x * 1000.0).round() as u32
}

/// Enough to tell f32 thresholds apart over the whole range.
const BISECTIONS: usize = 40;

/// ln of the lowest threshold tried.
const LOG_LOWEST: f64 = -80.0;

/// First, last, and something to choose from.
const MIN_PAST_BLOCKS: usize = 4;
