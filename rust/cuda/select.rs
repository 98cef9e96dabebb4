//! select on the GPU: which kernels score for a selector, in what order, over which grids, with how much scratch.

use super::attend::{pool_map, query_map};
use super::batch::{DeviceBatch, int32};
use super::cells::{Cells, CellsKernel};
use super::context::Context;
use super::gate::DeviceGate;
use super::kernels::{Arg, Grid};
use super::params::{Step, TILE_ROWS, Then};
use super::shared;
use super::stream::Stream;
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::settings::Selector;
use crate::types::Dtype;

/// 4-byte elements of scratch that select and union need for the largest step; `gate_len` is
/// [`DeviceGate::len`] of the layer's gate.
///
/// # Errors
/// [`Status::Overflow`].
pub(crate) fn scratch_len(layout: &Layout, gate_len: usize) -> Result<usize> {
    let selects = layout.max_select_spans();
    let (heads, kv_heads, blocks) =
        (layout.shape.num_q_heads, layout.shape.num_kv_heads, layout.max_blocks());
    let scoring = match layout.settings.selector {
        Selector::SampledExact | Selector::Oracle | Selector::PooledMass => {
            product(&[selects, kv_heads, TILE_ROWS, blocks])?
        }
        // Candidates as bits, and as a list with its length.
        Selector::TwoLevel => {
            product(&[selects, kv_heads, TILE_ROWS * blocks + layout.mask_words() + 1 + blocks])?
        }
        Selector::FlashPrefill => product(&[selects, heads, 8 * blocks.div_ceil(128)])?,
        Selector::XAttention => {
            let stride = layout.settings.xattention_stride;
            let groups = layout.select_span().div_ceil(stride);
            let cells = (layout.geometry.block_size / stride / 128).max(1);
            product(&[selects, heads, groups, blocks, cells])?
        }
        Selector::AttnGate => product(&[layout.limits.max_num_reqs, blocks, gate_len])?,
        _ => 0,
    };
    // union merges rows too long for shared memory here, once select is done with it.
    let merging =
        if blocks > shared::MAX_ROW_BLOCKS { product(&[layout.max_list_rows(), blocks])? } else { 0 };
    Ok(scoring.max(merging))
}

/// One scoring of a step.
pub(crate) struct Scoring<'a> {
    pub(crate) context: &'a Context,
    pub(crate) stream: Stream,
    pub(crate) layout: &'a Layout,
    pub(crate) batch: &'a DeviceBatch,
    pub(crate) step: &'a Step,
    pub(crate) gate: Option<&'a DeviceGate>,
    /// Lists follow; else scores are all that is asked for.
    pub(crate) wants_lists: bool,
}

impl Scoring<'_> {
    /// Scores every past block of the spans that are not dense; whether the lists are made too.
    ///
    /// # Errors
    /// The driver's; [`Status::Null`] for selector `attn_gate` without a gate.
    pub(crate) fn run(&self) -> Result<bool> {
        self.sample_rows()?;
        match self.layout.settings.selector {
            Selector::SampledExact | Selector::Oracle if self.by_clusters() => {
                self.cells_read(0, Read::Every)?;
                self.finish(false)
            }
            Selector::PooledMass if self.by_clusters() && self.holds_heads() => {
                self.cells_pool(0)?;
                self.finish(false)
            }
            Selector::PooledMass if self.by_clusters() && self.pooled_lists(self.then())? => {
                Ok(self.then() == Then::Lists)
            }
            Selector::TwoLevel if self.by_clusters() => {
                if !self.pooled_lists(Then::Candidates)? {
                    self.pooled_mass()?;
                    self.candidates()?;
                }
                self.cells_read(0, Read::Candidates)?;
                self.finish(true)
            }
            _ => self.run_stages().map(|()| false),
        }
    }

    /// Scores of the cells of the only tile, with `listed` 0 for blocks that are no candidates; whether the lists are made
    /// too. Registers hold a head's cells sooner than shared memory a group's, which makes lists of several heads at once.
    fn finish(&self, listed: bool) -> Result<bool> {
        // Whether or not they are wanted: scores alone are those that the lists come from.
        let of_groups = self.makes_lists() && self.layout.heads_per_list() > 1;
        if of_groups && self.cells_lists(listed)? {
            return Ok(self.then() == Then::Lists);
        }
        if let Some(then) = self.mass_lists(listed)? {
            return Ok(then == Then::Lists);
        }
        if !of_groups && self.cells_lists(listed)? {
            return Ok(self.then() == Then::Lists);
        }
        let mass = ["compactattn_cells_mass", "compactattn_two_level_mass"];
        self.mass(0, mass[usize::from(listed)])?;
        Ok(false)
    }

    fn run_stages(&self) -> Result<()> {
        match self.layout.settings.selector {
            Selector::SampledExact | Selector::Oracle => self.by_tiles(|tile| {
                self.cells_read(tile, Read::Every)?;
                self.mass(tile, "compactattn_cells_mass")
            }),
            Selector::PooledMass => self.pooled_mass(),
            Selector::TwoLevel => self.two_level(),
            Selector::FlashPrefill => self.flashprefill(),
            Selector::XAttention => self.xattention(),
            Selector::AttnGate => self.attn_gate(),
            Selector::Streaming => {
                let args = [Arg::of(self.step), Arg::of(&0.0_f32)];
                self.launch("compactattn_fill_scores", self.by_row(256, 0), &args)
            }
            // Dense spans need no scores, external ones are the caller's, and quoka is refused with the plan.
            Selector::Dense | Selector::External | Selector::Quoka => Ok(()),
        }
    }

    fn pooled_mass(&self) -> Result<()> {
        self.by_tiles(|tile| {
            self.cells_pool(tile)?;
            self.mass(tile, "compactattn_cells_mass")
        })
    }

    fn two_level(&self) -> Result<()> {
        self.pooled_mass()?;
        self.candidates()?;
        let has_one = self.tiles() == 1;
        self.by_tiles(|tile| {
            // The cells of a span's only tile are still those by mean keys.
            if !has_one {
                self.cells_pool(tile)?;
            }
            self.cells_read(tile, Read::Candidates)?;
            self.mass(tile, "compactattn_two_level_mass")
        })
    }

    fn candidates(&self) -> Result<()> {
        let blocks = [self.kv_heads(), self.selects(), 1];
        let shared_bytes = shared::keep(self.blocks(), self.step.layout.mask_words.cast_unsigned());
        let grid = Grid { blocks, threads: 256, shared_bytes };
        self.launch("compactattn_two_level_candidates", grid, &[Arg::of(self.step)])
    }

    fn flashprefill(&self) -> Result<()> {
        let key = (self.layout.shape.dtype, self.head_dim());
        let hopper = FLASHPREFILL_SM90.iter().find(|(dtype, head_dim, _)| (*dtype, *head_dim) == key);
        match hopper.filter(|(_, _, name)| self.context.kernels().has(name)) {
            Some((_, _, name)) => self.flashprefill_sm90(name)?,
            None => {
                let name = self.of_dtype("compactattn_flashprefill_bf16", "compactattn_flashprefill_fp16");
                let blocks = [self.selects(), self.kv_heads(), self.blocks().div_ceil(128)];
                let shared_bytes = shared::flashprefill(self.head_dim());
                self.launch(name, Grid { blocks, threads: 128, shared_bytes }, &[Arg::of(self.step)])?;
            }
        }
        if self.wants_lists && relates_rows(self.layout, self.step) {
            return Ok(());
        }
        self.launch("compactattn_flashprefill_relate", self.by_row(256, 0), &[Arg::of(self.step)])
    }

    /// By the copy engine; CTAs share the work evenly, whatever their number.
    fn flashprefill_sm90(&self, name: &'static str) -> Result<()> {
        // Without queries there is no map of them.
        if self.selects() == 0 {
            return Ok(());
        }
        let map = query_map(self.context, self.layout, self.batch, [1, FLASHPREFILL_ROWS])?;
        let ctas = u32::try_from(self.context.num_sms()).unwrap_or(u32::MAX);
        let shared_bytes = shared::flashprefill_sm90(self.head_dim());
        let grid = Grid { blocks: [ctas, 1, 1], threads: 512, shared_bytes };
        self.launch(name, grid, &[Arg::of(&map), Arg::of(self.step)])
    }

    fn xattention(&self) -> Result<()> {
        let groups = self
            .step
            .layout
            .max_kv_len
            .cast_unsigned()
            .div_ceil(self.step.settings.xattention_stride.cast_unsigned());
        let blocks = [self.selects(), groups.div_ceil(128), self.kv_heads()];
        let grid = Grid { blocks, threads: 256, shared_bytes: shared::XATTENTION };
        let args = [Arg::of(self.step)];
        self.launch(
            self.of_dtype("compactattn_xattention_bf16", "compactattn_xattention_fp16"),
            grid,
            &args,
        )?;
        let mass = self.of_dtype("compactattn_xattention_mass_bf16", "compactattn_xattention_mass_fp16");
        self.launch(mass, self.by_row(256, 0), &args)
    }

    fn attn_gate(&self) -> Result<()> {
        let missing = || Error::new(Status::Null, "gate", "the layer's gate, for selector attn_gate", "none");
        let gate = self.gate.ok_or_else(missing)?;
        let params = gate.params();
        let args = [Arg::of(self.step), Arg::of(&params)];
        let blocks = [self.blocks().div_ceil(16), self.kv_heads(), self.selects()];
        let grid = Grid { blocks, threads: 256, shared_bytes: shared::gate_keys(self.head_dim()) };
        let keys = self.of_dtype("compactattn_attn_gate_keys_bf16", "compactattn_attn_gate_keys_fp16");
        self.launch(keys, grid, &args)?;
        let vectors = if params.by_group == 1 { self.step.layout.group_size.cast_unsigned() } else { 1 };
        let bytes = shared::gate(vectors, self.head_dim(), params.gate_dim.cast_unsigned());
        let name = self.of_dtype("compactattn_attn_gate_bf16", "compactattn_attn_gate_fp16");
        self.launch(name, self.by_row(256, bytes), &args)
    }

    /// Exact cells of one tile of sampled rows.
    fn cells_read(&self, tile: i32, which: Read) -> Result<()> {
        if let Some(kernel) = Sm90::choose(self.context, self.layout) {
            let by_pairs = which == Read::Every && self.has_neighbours();
            let launch = if by_pairs { kernel.pairs } else { kernel.launches[which as usize] };
            return self.cells_read_sm90(tile, &launch, kernel.map_tokens);
        }
        let kernel = CellsKernel::choose(self.context, Cells::Read(which), &self.layout.shape);
        let at_once = kernel.ctas_per_sm * u32::try_from(self.context.num_sms()).unwrap_or(u32::MAX >> 3);
        self.cells(&kernel, at_once.div_ceil(self.kv_heads()), tile)
    }

    /// The same by the copy engine; CTAs share the work evenly, whatever their number.
    fn cells_read_sm90(&self, tile: i32, kernel: &Sm90Kernel, map_tokens: usize) -> Result<()> {
        // Without pages there is nothing to read.
        if self.selects() == 0 || self.batch.num_pages == 0 {
            return Ok(());
        }
        let map = pool_map(self.context, self.layout, self.batch, &self.batch.k, map_tokens)?;
        let ctas = u32::try_from(self.context.num_sms()).unwrap_or(u32::MAX);
        let shared_bytes = shared::cells_sm90(self.head_dim(), kernel.spans);
        let grid = Grid { blocks: [ctas, 1, 1], threads: SM90_THREADS, shared_bytes };
        self.launch(kernel.name, grid, &[Arg::of(&map), Arg::of(self.step), Arg::of(&tile)])
    }

    /// Cells of one tile by mean keys.
    fn cells_pool(&self, tile: i32) -> Result<()> {
        let tails = self.longest_span(self.step.batch.total_q.unsigned_abs() as usize).div_ceil(128) + 1;
        let tails = u32::try_from(tails).unwrap_or(u32::MAX);
        let kernel = CellsKernel::choose(self.context, Cells::Pool, &self.layout.shape);
        self.cells(&kernel, self.blocks().div_ceil(64) + tails, tile)
    }

    fn cells(&self, kernel: &CellsKernel, width: u32, tile: i32) -> Result<()> {
        let blocks = [width, self.kv_heads(), self.selects()];
        let grid = Grid { blocks, threads: 128, shared_bytes: kernel.shared_bytes };
        self.launch(kernel.name, grid, &[Arg::of(self.step), Arg::of(&tile)])
    }

    /// Scores of one tile's cells, added to those of the tiles before it.
    fn mass(&self, tile: i32, name: &'static str) -> Result<()> {
        let blocks = [MASS_CTAS * self.step.layout.num_q_heads.cast_unsigned(), self.selects(), 1];
        let grid = Grid { blocks, threads: 1024, shared_bytes: 0 };
        self.launch(name, grid, &[Arg::of(self.step), Arg::of(&tile)])
    }

    /// Runs `body` for each tile of sampled rows that a span can have.
    fn by_tiles(&self, body: impl Fn(i32) -> Result<()>) -> Result<()> {
        (0..self.tiles()).try_for_each(body)
    }

    fn tiles(&self) -> i32 {
        int32(self.tiles_of(self.longest_span(self.step.batch.total_q.unsigned_abs() as usize)))
    }

    /// Tiles of sampled rows of a span of `longest` tokens.
    fn tiles_of(&self, longest: usize) -> usize {
        let per_tile = (TILE_ROWS / self.layout.shape.group_size()).max(1);
        self.samples_of(longest).div_ceil(per_tile)
    }

    fn samples_of(&self, longest: usize) -> usize {
        match self.step.settings.sample_rows {
            0 => longest,
            n => longest.min(n.unsigned_abs() as usize),
        }
    }

    /// Sampled rows of a head, at most, in any step of the plan.
    pub(super) fn longest_sample(&self) -> usize {
        self.samples_of(self.longest_span(self.layout.limits.max_total_q))
    }

    /// Whether no span of any step of the plan has two tiles of sampled rows. The plan decides, not the step: kernels that
    /// want one tile round otherwise, and a request's scores must not depend on what is beside it.
    pub(super) fn one_tile(&self) -> bool {
        self.tiles_of(self.longest_span(self.layout.limits.max_total_q)) <= 1
    }

    /// Whether a request of this step can have two select spans.
    fn has_neighbours(&self) -> bool {
        let span = self.layout.select_span();
        span > 0 && self.step.batch.total_q.unsigned_abs() as usize > span
    }

    fn longest_span(&self, total_q: usize) -> usize {
        longest_span(self.layout, total_q)
    }

    /// One CTA for each row of scores.
    fn by_row(&self, threads: u32, shared_bytes: u32) -> Grid {
        let blocks = [self.selects(), self.step.layout.num_q_heads.cast_unsigned(), 1];
        Grid { blocks, threads, shared_bytes }
    }

    pub(super) fn launch(&self, name: &'static str, grid: Grid, args: &[Arg]) -> Result<()> {
        self.context.kernels().launch(self.stream, name, grid, args)
    }

    pub(super) fn of_dtype(&self, bf16: &'static str, fp16: &'static str) -> &'static str {
        if self.layout.shape.dtype == Dtype::Bf16 { bf16 } else { fp16 }
    }

    pub(super) fn selects(&self) -> u32 {
        self.step.stages.max_select_spans.cast_unsigned()
    }

    pub(super) fn kv_heads(&self) -> u32 {
        self.step.layout.num_kv_heads.cast_unsigned()
    }

    pub(super) fn blocks(&self) -> u32 {
        self.step.layout.max_blocks.cast_unsigned()
    }

    pub(super) fn head_dim(&self) -> u32 {
        self.step.layout.head_dim.cast_unsigned()
    }
}

/// Whether keep_rows relates flashprefill's scores to their row's best: it holds the row in shared memory, and nobody else
/// reads it.
pub(super) fn relates_rows(layout: &Layout, step: &Step) -> bool {
    let is_held = layout.max_blocks() <= shared::MAX_ROW_BLOCKS;
    layout.settings.selector == Selector::FlashPrefill && step.settings.keep_at_rows != 0 && is_held
}

/// Tokens of the longest select span that a step of so many query tokens can have.
pub(super) fn longest_span(layout: &Layout, total_q: usize) -> usize {
    match layout.select_span() {
        0 => total_q,
        span => span.min(total_q),
    }
}

fn product(factors: &[usize]) -> Result<usize> {
    let all = factors.iter().try_fold(1_usize, |all, &x| all.checked_mul(x));
    all.ok_or_else(|| Error::new(Status::Overflow, "limits", "buffers within 63 bits", "more"))
}

/// CTAs of cells_mass.cu for each (select span, query head).
const MASS_CTAS: u32 = 4;

/// Of a tile of cuda/select/sm90/flashprefill_share.cuh.
const FLASHPREFILL_ROWS: usize = 64;

const FLASHPREFILL_SM90: [(Dtype, u32, &str); 4] = [
    (Dtype::Bf16, 64, "compactattn_flashprefill_sm90_bf16_d64"),
    (Dtype::Bf16, 128, "compactattn_flashprefill_sm90_bf16_d128"),
    (Dtype::F16, 64, "compactattn_flashprefill_sm90_fp16_d64"),
    (Dtype::F16, 128, "compactattn_flashprefill_sm90_fp16_d128"),
];

/// Which blocks get exact cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// All that a sampled row sees.
    Every,
    /// Those that `two_level` scores again, and the open ones.
    Candidates,
}

/// Exact cells on Hopper (cuda/select/sm90).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sm90 {
    /// By [`Read`].
    pub(crate) launches: [Sm90Kernel; 2],
    /// Every block, each key once for two select spans of a request.
    pub(crate) pairs: Sm90Kernel,
    /// Most tokens of a box of keys.
    map_tokens: usize,
}

/// One of them, as cuda/select/sm90/traits.h has its tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sm90Kernel {
    pub(crate) name: &'static str,
    /// Select spans that a key is read once for.
    pub(crate) spans: u32,
}

impl Sm90 {
    /// The kernels for the layer, where this GPU has them.
    pub(crate) fn choose(context: &Context, layout: &Layout) -> Option<Self> {
        // None of them takes e4m3.
        let key = (layout.shape.kv_dtype, layout.shape.head_dim);
        let found = SM90.iter().find(|(dtype, head_dim, _)| (*dtype, *head_dim) == key);
        found.map(|(_, _, kernels)| *kernels).filter(|kernels| context.kernels().has(kernels.pairs.name))
    }
}

macro_rules! sm90 {
    ($dtype:literal, $dim:literal, $map_tokens:literal) => {
        Sm90 {
            launches: [
                by_spans(concat!("compactattn_cells_read_sm90_", $dtype, "_d", $dim), 1),
                by_spans(concat!("compactattn_cells_read_candidates_sm90_", $dtype, "_d", $dim), 1),
            ],
            pairs: by_spans(concat!("compactattn_cells_read_pairs_sm90_", $dtype, "_d", $dim), 2),
            map_tokens: $map_tokens,
        }
    };
}

/// Four consumer warpgroups and one that copies.
const SM90_THREADS: u32 = 640;

const fn by_spans(name: &'static str, spans: u32) -> Sm90Kernel {
    Sm90Kernel { name, spans }
}

/// `map_tokens` are those of a tile of cuda/select/sm90/traits.h.
static SM90: [(Dtype, usize, Sm90); 6] = [
    (Dtype::Bf16, 64, sm90!("bf16", 64, 128)),
    (Dtype::Bf16, 128, sm90!("bf16", 128, 128)),
    (Dtype::Bf16, 256, sm90!("bf16", 256, 64)),
    (Dtype::F16, 64, sm90!("fp16", 64, 128)),
    (Dtype::F16, 128, sm90!("fp16", 128, 128)),
    (Dtype::F16, 256, sm90!("fp16", 256, 64)),
];
