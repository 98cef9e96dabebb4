//! One contender at one density: the knob bisected over all layers and lists at once, then error and time.

use std::collections::HashMap;

use compactattn::plan::Layout;
use compactattn::settings::{Keep, Scope, Selector, Settings};
use compactattn::union::Counts;
use compactattn::{Error, Result, Status};

use crate::contender::{BLOCK, Contender, Knob, even};
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
    dense: Vec<Timed<Vec<f32>>>,
    scores: HashMap<Key, Vec<Timed<Vec<f32>>>>,
}

/// What scores depend on: selector, block size, select span, and, for `two_level`, its budget in permille.
type Key = (Selector, usize, usize, u32);

impl<'a> Sweep<'a> {
    /// Attends densely once; the outputs are what errors are measured against.
    ///
    /// # Errors
    /// [`Status::Shape`] for a sequence without enough past; those of the stages.
    pub(crate) fn new(prefills: &'a [Prefill]) -> Result<Self> {
        let batch = prefills[0].batch()?;
        let past_blocks = batch.past_len(0) / BLOCK;
        if past_blocks < MIN_PAST_BLOCKS {
            let wanted = format!("at least {} KV tokens before the queries", MIN_PAST_BLOCKS * BLOCK);
            return Err(Error::new(Status::Shape, "trace", wanted, batch.past_len(0)));
        }
        let dense = prefills.iter().map(|prefill| {
            let layout = prefill.layout(&even(Selector::Dense, Scope::GROUP_CHUNK))?;
            let scores = stages::score(prefill, &layout)?;
            let lists = stages::unite(prefill, &layout, &scores.value)?;
            stages::attend(prefill, &layout, &lists.bits)
        });
        Ok(Self { prefills, dense: dense.collect::<Result<_>>()?, scores: HashMap::new() })
    }

    /// Milliseconds of dense attention, mean over layers.
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

    fn measure_at(&self, contender: &Contender, target: f64, scored: &Key, knob: f32) -> Result<Row> {
        let lists = self.lists(contender, scored, knob)?;
        let layout = self.prefills[0].layout(&contender.at(knob, self.past_blocks()))?;
        let (mut ms, mut error) = (lists.ms, 0.0);
        for (i, (prefill, lists)) in self.prefills.iter().zip(&lists.value).enumerate() {
            let out = stages::attend(prefill, &layout, &lists.bits)?;
            ms += out.ms + self.scores[scored][i].ms;
            error += mean_error(prefill, &out.value, &self.dense[i].value);
        }
        let layers = self.prefills.len() as f64;
        Ok(Row {
            contender: *contender,
            target,
            density: self.density(&lists.value, contender.settings.block_size),
            error: error / layers,
            ms: ms / layers,
            knob,
            lists: lists.value.into_iter().map(|lists| lists.bits).collect(),
            layout,
        })
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
