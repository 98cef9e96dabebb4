//! attend, which combines what it cuts: which kernel serves a shape, and how it is launched.

use super::batch::{DeviceBatch, DevicePool, DeviceTokens, int32};
use super::context::Context;
use super::kernels::{Arg, Grid};
use super::params::{self, AttendParams, TILE_ROWS};
use super::scratch::Scratch;
use super::step::log2;
use super::stream::Stream;
use super::tensor_map::{self, TensorMap};
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::types::Dtype;

/// Results in device memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOutput {
    /// `[total_q, num_q_heads, head_dim]`.
    pub out: DeviceTokens,
    /// `[num_q_heads, total_q]` f32; 0 = none.
    pub lse: u64,
    /// From a head of `lse` to the next.
    pub lse_stride_head: usize,
    /// From a token of `lse` to the next.
    pub lse_stride_token: usize,
}

/// One attend kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// As exported by its image.
    pub(crate) name: &'static str,
    /// The same with mean correction.
    pub(crate) corrected: &'static str,
    threads: u32,
    shared_bytes: u32,
    /// The same in images for other GPUs than 9.0.
    small_shared_bytes: u32,
    ctas_per_sm: usize,
    /// Takes three tensor maps before its parameters, and a pair of means' where it corrects, with boxes of K and V of at
    /// most this many tokens; 0: takes none.
    map_tokens: usize,
}

impl Kernel {
    /// The best kernel that this context has for the layout.
    ///
    /// # Errors
    /// [`Status::Unsupported`] for a dtype without one.
    pub(crate) fn choose(context: &Context, layout: &Layout) -> Result<Self> {
        let shape = &layout.shape;
        let key = (shape.dtype, shape.kv_dtype, shape.head_dim);
        let found = KERNELS.iter().find(|(of, kernel)| {
            let fits = kernel.map_tokens == 0 || layout.geometry.box_tokens() >= MIN_MAP_TOKENS;
            *of == key && fits && context.kernels().has(kernel.name)
        });
        found.map(|(_, kernel)| *kernel).ok_or_else(|| {
            let is_16_bit = matches!(shape.dtype, Dtype::Bf16 | Dtype::F16);
            let got = format!("{} with head_dim {}", shape.kv_dtype.name(), shape.head_dim);
            match shape.kv_dtype {
                Dtype::E4m3 if is_16_bit => {
                    let wanted = "head_dim 64 or 128, for a cache of e4m3";
                    Error::new(Status::Unsupported, "kv_dtype on CUDA", wanted, got)
                }
                _ => {
                    let got = format!("{} with head_dim {}", shape.dtype.name(), shape.head_dim);
                    Error::new(Status::Unsupported, "dtype on CUDA", "bf16 or f16", got)
                }
            }
        })
    }

    /// CTAs of a launch: as many as the device holds at once.
    pub(crate) fn num_ctas(&self, context: &Context) -> usize {
        let properties = context.device().properties();
        let bytes = self.shared_bytes_on(context) + CTA_SHARED_BYTES;
        let fit = (properties.max_shared_bytes + CTA_SHARED_BYTES) / bytes;
        (context.num_sms() * self.ctas_per_sm.min(fit.max(1) as usize)).min(MAX_CTAS)
    }

    /// Its name, and the dynamic shared memory that a launch gives it.
    pub(crate) fn shared(&self, context: &Context) -> (&'static str, u32) {
        (self.name, self.shared_bytes_on(context))
    }

    fn shared_bytes_on(&self, context: &Context) -> u32 {
        let is_hopper = context.device().properties().capability == (9, 0);
        if is_hopper { self.shared_bytes } else { self.small_shared_bytes }
    }

    /// Launches attend over the lists in `scratch`.
    ///
    /// # Errors
    /// Those of the driver.
    pub(crate) fn launch(&self, context: &Context, stream: Stream, call: &Call) -> Result<()> {
        let params = call.params();
        let kernels = context.kernels();
        let num_ctas = call.scratch.stages.num_ctas.cast_unsigned();
        let shared_bytes = self.shared_bytes_on(context);
        let grid = Grid { blocks: [num_ctas, 1, 1], threads: self.threads, shared_bytes };
        let has_maps = self.map_tokens > 0;
        let maps = has_maps.then(|| call.maps(context, self.map_tokens)).transpose()?;
        let mean_maps = if has_maps { call.mean_maps(context, self.map_tokens)? } else { None };
        let name = if call.means.is_some() { self.corrected } else { self.name };
        let tensors = maps.iter().flatten().map(Arg::of).chain(mean_maps.iter().map(Arg::of));
        let args = tensors.chain([Arg::of(&params)]).chain(call.means.map(Arg::of));
        kernels.launch(stream, name, grid, &args.collect::<Vec<_>>())
    }
}

/// What one attend reads and writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    /// How the layer cuts the step.
    pub(crate) layout: &'a Layout,
    /// Queries and pools.
    pub(crate) batch: &'a DeviceBatch,
    /// Lists, items, pieces, room for parts.
    pub(crate) scratch: &'a Scratch,
    /// Results.
    pub(crate) output: &'a DeviceOutput,
    /// With mean correction.
    pub(crate) means: Option<&'a params::Means>,
}

impl Call<'_> {
    fn params(&self) -> AttendParams {
        let (stages, geometry) = (&self.scratch.stages, &self.layout.geometry);
        let stride = |x: usize| i64::try_from(x).unwrap_or(i64::MAX);
        AttendParams {
            work: params::Work {
                items: stages.items,
                pieces: stages.pieces,
                piece_starts: stages.piece_starts,
                boxes: stages.boxes,
                arrivals: stages.arrivals,
                num_ctas: stages.num_ctas,
                max_boxes: int32(self.layout.max_boxes()),
                heads_per_list: int32(self.layout.heads_per_list()),
                log2_box_tokens: log2(geometry.box_tokens()),
            },
            results: params::Results {
                out: self.output.out.address,
                lse: self.output.lse,
                partial_out: self.scratch.partials.out,
                partial_lse: self.scratch.partials.lse,
                out_token_stride: stride(self.output.out.stride_token),
                out_head_stride: stride(self.output.out.stride_head),
                lse_token_stride: stride(self.output.lse_stride_token),
                lse_head_stride: stride(self.output.lse_stride_head),
            },
            batch: self.batch.params(),
            log2_box_tokens: log2(geometry.box_tokens()),
            log2_boxes_per_page: log2(geometry.boxes_per_page()),
            sm_scale: self.layout.shape.sm_scale,
            reserved: 0,
        }
    }

    /// Maps of q, k and v as cuda/attend/sm90/kernel.cuh wants them.
    fn maps(&self, context: &Context, max_tokens: usize) -> Result<[TensorMap; 3]> {
        let heads = self.layout.heads_per_list();
        let q = query_map(context, self.layout, self.batch, [heads, TILE_ROWS / heads])?;
        let pool = |pool| pool_map(context, self.layout, self.batch, pool, max_tokens);
        Ok([q, pool(&self.batch.k)?, pool(&self.batch.v)?])
    }

    /// With mean correction those of the means, one parameter.
    fn mean_maps(&self, context: &Context, max_tokens: usize) -> Result<Option<[TensorMap; 2]>> {
        let map = |address| self.means_map(context, address, max_tokens);
        self.means.map(|means| Ok([map(means.k)?, map(means.v)?])).transpose()
    }

    /// Rows of means as a pool whose pages are requests.
    fn means_map(&self, context: &Context, address: u64, max_tokens: usize) -> Result<TensorMap> {
        let (shape, len) = (&self.layout.shape, self.scratch.means.len);
        let head = len * shape.head_dim;
        let dims = [
            Dim { size: MAP_COLUMNS, stride: 1, tile: tile(MAP_COLUMNS) },
            Dim { size: len, stride: shape.head_dim, tile: tile(max_tokens) },
            Dim { size: shape.head_dim / MAP_COLUMNS, stride: MAP_COLUMNS, tile: 1 },
            Dim { size: shape.num_kv_heads, stride: head, tile: 1 },
            Dim { size: self.batch.num_reqs.max(1), stride: shape.num_kv_heads * head, tile: 1 },
        ];
        encode(context, shape.dtype, address, &dims)
    }
}

/// Map of the batch's queries, copied by boxes of so many heads and tokens, and 64 columns.
///
/// # Errors
/// The driver's.
pub(crate) fn query_map(
    context: &Context,
    layout: &Layout,
    batch: &DeviceBatch,
    [heads, tokens]: [usize; 2],
) -> Result<TensorMap> {
    let (shape, q) = (&layout.shape, batch.q);
    let dims = [
        Dim { size: MAP_COLUMNS, stride: 1, tile: tile(MAP_COLUMNS) },
        Dim { size: shape.num_q_heads, stride: q.stride_head, tile: tile(heads) },
        Dim { size: batch.total_q, stride: q.stride_token, tile: tile(tokens) },
        Dim { size: shape.head_dim / MAP_COLUMNS, stride: MAP_COLUMNS, tile: 1 },
    ];
    encode(context, shape.dtype, q.address, &dims)
}

/// Map of one of the batch's pools, copied by boxes of 64 columns; a longer box than `max_tokens` is copied in parts.
///
/// # Errors
/// The driver's.
pub(crate) fn pool_map(
    context: &Context,
    layout: &Layout,
    batch: &DeviceBatch,
    pool: &DevicePool,
    max_tokens: usize,
) -> Result<TensorMap> {
    let shape = &layout.shape;
    let rows = tile(copied_tokens(layout.geometry.box_tokens().min(max_tokens)));
    let dims = [
        Dim { size: MAP_COLUMNS, stride: 1, tile: tile(MAP_COLUMNS) },
        Dim { size: shape.page_size, stride: pool.stride_token, tile: rows },
        Dim { size: shape.head_dim / MAP_COLUMNS, stride: MAP_COLUMNS, tile: 1 },
        Dim { size: shape.num_kv_heads, stride: pool.stride_head, tile: 1 },
        // A pool without pages has a map too, by which nothing is read.
        Dim { size: batch.num_pages.max(1), stride: pool.stride_page, tile: 1 },
    ];
    encode(context, shape.dtype, pool.address, &dims)
}

fn encode<const N: usize>(
    context: &Context,
    dtype: Dtype,
    address: u64,
    dims: &[Dim; N],
) -> Result<TensorMap> {
    let sizes = dims.map(|dim| dim.size as u64);
    // Dimensions of one entry have no stride of their own; any legal one will do.
    let strides = dims.map(|dim| (dim.stride * 2).max(16) as u64);
    let boxes = dims.map(|dim| dim.tile);
    tensor_map::encode(context.device().driver(), dtype, address, &sizes, &strides[1..], &boxes)
}

/// Tokens of one copy; its twin in cuda/ptx/tma.cuh says why.
const fn copied_tokens(box_tokens: usize) -> usize {
    if box_tokens == 32 { 16 } else { box_tokens }
}

fn tile(x: usize) -> u32 {
    u32::try_from(x).unwrap_or(u32::MAX)
}

/// One dimension of a tensor map; strides in elements.
#[derive(Clone, Copy, Debug)]
struct Dim {
    size: usize,
    stride: usize,
    tile: u32,
}

/// The widest swizzle in 16-bit elements.
const MAP_COLUMNS: usize = 64;
/// An atom of the swizzle.
const MIN_MAP_TOKENS: usize = 8;
/// What a CTA takes of its SM's shared memory beside its own.
const CTA_SHARED_BYTES: u32 = 1024;
/// What cuda/plan/work.cu cuts for.
const MAX_CTAS: usize = 1024;

/// (type of q, type of the cache, `head_dim`).
type Key = (Dtype, Dtype, usize);

/// A kernel by its family, the types in its name and its `head_dim`; `$how` makes the rest of it.
macro_rules! kernel {
    ($family:literal, $dtype:ident, $kv:ident, $types:literal, $dim:literal, $how:expr) => {
        (
            (Dtype::$dtype, Dtype::$kv, $dim),
            $how.named([
                concat!("compactattn_attend_", $family, "_", $types, "_d", $dim),
                concat!("compactattn_attend_", $family, "_", $types, "_d", $dim, "_means"),
            ]),
        )
    };
}

/// Every attend kernel, the best first for each key.
static KERNELS: &[(Key, Kernel)] = &[
    kernel!("sm90", Bf16, Bf16, "bf16", 64, sm90(214_016, 128)),
    kernel!("sm90", Bf16, Bf16, "bf16", 128, sm90(230_400, 128)),
    kernel!("sm90", Bf16, Bf16, "bf16", 256, sm90(230_400, 64)),
    kernel!("sm90", F16, F16, "fp16", 64, sm90(214_016, 128)),
    kernel!("sm90", F16, F16, "fp16", 128, sm90(230_400, 128)),
    kernel!("sm90", F16, F16, "fp16", 256, sm90(230_400, 64)),
    kernel!("sm80", Bf16, Bf16, "bf16", 64, sm80(D64)),
    kernel!("sm80", Bf16, Bf16, "bf16", 96, sm80(D96)),
    kernel!("sm80", Bf16, Bf16, "bf16", 128, sm80(D128)),
    kernel!("sm80", Bf16, Bf16, "bf16", 256, sm80(D256)),
    kernel!("sm80", F16, F16, "fp16", 64, sm80(D64)),
    kernel!("sm80", F16, F16, "fp16", 96, sm80(D96)),
    kernel!("sm80", F16, F16, "fp16", 128, sm80(D128)),
    kernel!("sm80", F16, F16, "fp16", 256, sm80(D256)),
    kernel!("sm80", Bf16, E4m3, "bf16_e4m3", 64, sm80(D64)),
    kernel!("sm80", Bf16, E4m3, "bf16_e4m3", 128, sm80(D128)),
    kernel!("sm80", F16, E4m3, "fp16_e4m3", 64, sm80(D64)),
    kernel!("sm80", F16, E4m3, "fp16_e4m3", 128, sm80(D128)),
];

/// As cuda/attend/sm90/traits.h says; `map_tokens` are those of a tile.
const fn sm90(shared_bytes: u32, map_tokens: usize) -> Unnamed {
    let tile = Tile { threads: 384, shared_bytes, small_shared_bytes: shared_bytes, ctas_per_sm: 1 };
    Unnamed { tile, map_tokens }
}

const fn sm80(tile: Tile) -> Unnamed {
    Unnamed { tile, map_tokens: 0 }
}

/// All of a [`Kernel`] but its names.
struct Unnamed {
    tile: Tile,
    map_tokens: usize,
}

impl Unnamed {
    const fn named(self, names: [&'static str; 2]) -> Kernel {
        let [name, corrected] = names;
        let Tile { threads, shared_bytes, small_shared_bytes, ctas_per_sm } = self.tile;
        let map_tokens = self.map_tokens;
        Kernel { name, corrected, threads, shared_bytes, small_shared_bytes, ctas_per_sm, map_tokens }
    }
}

/// What cuda/attend/sm80/traits.h says of one head_dim: of the image for 9.0, which buffers K and V twice, and of the
/// others.
#[derive(Clone, Copy)]
struct Tile {
    threads: u32,
    shared_bytes: u32,
    small_shared_bytes: u32,
    ctas_per_sm: usize,
}

const D64: Tile = Tile { threads: 128, shared_bytes: 92_160, small_shared_bytes: 55_296, ctas_per_sm: 2 };
const D96: Tile = Tile { threads: 128, shared_bytes: 79_872, small_shared_bytes: 53_248, ctas_per_sm: 2 };
const D128: Tile = Tile { threads: 128, shared_bytes: 104_448, small_shared_bytes: 69_632, ctas_per_sm: 2 };
const D256: Tile = Tile { threads: 256, shared_bytes: 202_752, small_shared_bytes: 101_376, ctas_per_sm: 1 };

/// Threads, shared memory and CTAs an SM of every sm_80 kernel, of the image for 9.0 or the others.
#[cfg(test)]
pub(super) fn sm80_tiles(is_hopper: bool) -> Vec<(Dtype, usize, [usize; 3])> {
    let tile = |&((dtype, _, head_dim), ref kernel): &(Key, Kernel)| {
        let bytes = if is_hopper { kernel.shared_bytes } else { kernel.small_shared_bytes };
        (dtype, head_dim, [kernel.threads as usize, bytes as usize, kernel.ctas_per_sm])
    };
    // Those over e4m3 have the same.
    let own = KERNELS.iter().filter(|((dtype, kv_dtype, _), _)| dtype == kv_dtype);
    own.filter(|(_, kernel)| kernel.map_tokens == 0).map(tile).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names say what a kernel is for, and one that copies by tensor maps comes before the one for every GPU, which
    /// each (dtype, `head_dim`) has.
    #[test]
    fn kernels_are_what_their_names_say_best_first() {
        for &(key, kernel) in KERNELS {
            let (dtype, kv_dtype, head_dim) = key;
            let element = if dtype == Dtype::Bf16 { "bf16" } else { "fp16" };
            let cache = if kv_dtype == Dtype::E4m3 { "_e4m3" } else { "" };
            let suffix = format!("_{element}{cache}_d{head_dim}");
            assert!(kernel.name.ends_with(&suffix), "{}", kernel.name);
            assert!(kv_dtype == dtype || kv_dtype == Dtype::E4m3, "{}", kernel.name);
            assert_eq!(kernel.corrected, format!("{}_means", kernel.name));
            assert_eq!(kernel.map_tokens > 0, kernel.name.contains("sm90"), "{}", kernel.name);
            let same = KERNELS.iter().filter(|(of, _)| *of == key);
            let by_maps: Vec<bool> = same.map(|(_, kernel)| kernel.map_tokens > 0).collect();
            assert!(by_maps == [false] || by_maps == [true, false], "{suffix}: {by_maps:?}");
        }
    }
}
