//! Shared memory of the kernels before attend: what launches ask for (the numbers of cuda/common/shared.h), and
//! whether this GPU has it.

use super::attend::Kernel;
use super::cells::{Cells, CellsKernel};
use super::clusters;
use super::context::Context;
use super::select::{Read, Sm90, Sm90Kernel};
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::settings::{KeepAt, Selector};
use crate::types::Dtype;

/// Blocks of the longest row of scores that is held in shared memory while it is ranked.
pub(crate) const MAX_ROW_BLOCKS: usize = 8192;

/// Of `compactattn_xattention_*`.
pub(crate) const XATTENTION: u32 = 110_592;

/// Of `compactattn_flashprefill_*`.
pub(crate) const fn flashprefill(head_dim: u32) -> u32 {
    256 * row(head_dim)
}

/// Of `compactattn_flashprefill_sm90_*`.
pub(crate) const fn flashprefill_sm90(head_dim: u32) -> u32 {
    1024 * head_dim + 1024
}

/// Of `compactattn_sample_rows_*`, for groups of so many heads.
pub(crate) const fn sample_rows(heads: u32, head_dim: u32) -> u32 {
    4 * heads * if head_dim == 96 { 128 } else { head_dim }
}

/// Of `compactattn_sample_rows_held_*`.
pub(crate) const SAMPLE_ROWS_HELD: u32 = 51_200;

/// Of `compactattn_cells_*`.
pub(crate) const fn cells(head_dim: u32) -> u32 {
    256 * row(head_dim)
}

/// Of `compactattn_cells_*_small_*`.
pub(crate) const CELLS_SMALL: u32 = 128 * row(256) + 192 * row(64);

/// Of `compactattn_cells_*_sm90_*`, with rows of one select span or of two.
pub(crate) const fn cells_sm90(head_dim: u32, spans: u32) -> u32 {
    match (head_dim, spans) {
        (_, 2) => 232_448,
        (64, _) => 215_040,
        (128, _) => 231_424,
        _ => 198_656,
    }
}

/// Of `compactattn_cells_lists`, with `pitch` floats between rows of cells.
pub(crate) const fn cells_lists(pitch: u32) -> u32 {
    512 * pitch
}

/// Of `compactattn_pooled_lists_*`, likewise.
pub(crate) const fn pooled_lists(head_dim: u32, pitch: u32) -> u32 {
    let (cells, keys) = (cells_lists(pitch), 128 * row(head_dim));
    (if cells > keys { cells } else { keys }) + 256 * row(head_dim)
}

/// Of `compactattn_attn_gate_keys_*`.
pub(crate) const fn gate_keys(head_dim: u32) -> u32 {
    192 * head_dim
}

/// Of `compactattn_attn_gate_*`; `heads` is the group under a gate that reads the group's means, else 1.
pub(crate) const fn gate(heads: u32, head_dim: u32, gate_dim: u32) -> u32 {
    4 * ((heads + 3) * head_dim + 2 * gate_dim)
}

/// Of the kernels that keep: a row of bits, and a row of scores where it fits.
pub(crate) const fn keep(max_blocks: u32, mask_words: u32) -> u32 {
    let row = if max_blocks as usize <= MAX_ROW_BLOCKS { max_blocks } else { 0 };
    4 * (mask_words + row)
}

const fn row(head_dim: u32) -> u32 {
    2 * head_dim + 16
}

/// What of a gate decides how much shared memory it takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GateShape {
    /// Elements of a gate vector.
    pub(crate) gate_dim: usize,
    /// Whether it reads the means of the whole group.
    pub(crate) by_group: bool,
}

/// Refuses a layer for which some kernel asks for more than a CTA of this GPU can have.
///
/// # Errors
/// [`Status::Unsupported`] naming what asks for it, with bytes wanted and available.
pub(crate) fn check(context: &Context, layout: &Layout, gate: Option<GateShape>) -> Result<()> {
    let (head_dim, selector) = (layout.shape.head_dim, layout.settings.selector.name());
    let sampling = clusters::samples(layout).then(|| clusters::sampling(context, layout));
    for (kernel, bytes) in scoring(context, layout, gate).into_iter().flatten().chain(sampling) {
        fit(context, kernel, bytes, || format!("selector {selector} with head_dim {head_dim}"))?;
    }
    let (max_kv_len, block_size) = (layout.limits.max_kv_len, layout.geometry.block_size);
    let bytes = keep(narrow(layout.max_blocks()), narrow(layout.mask_words()));
    let what = || format!("max_kv_len {max_kv_len} with block_size {block_size}");
    fit(context, "compactattn_union_table", bytes, what)?;
    let (attend, attend_bytes) = Kernel::choose(context, layout)?.shared(context);
    fit(context, attend, attend_bytes, || format!("head_dim {head_dim}"))?;
    match layout.settings.keep_at {
        KeepAt::Row => fit(context, "compactattn_keep_rows", bytes, what),
        KeepAt::List => Ok(()),
    }
}

/// Kernels that score for the layer's selector, and what launches give them.
fn scoring(
    context: &Context,
    layout: &Layout,
    gate_shape: Option<GateShape>,
) -> [Option<(&'static str, u32)>; 2] {
    let bf16 = layout.shape.dtype == Dtype::Bf16;
    let of = |names: [&'static str; 2]| if bf16 { names[0] } else { names[1] };
    let dim = narrow(layout.shape.head_dim);
    let hopper = Sm90::choose(context, layout);
    let of_cells = |cells| {
        let kernel = CellsKernel::choose(context, cells, &layout.shape);
        (kernel.name, kernel.shared_bytes)
    };
    let of_hopper = |kernel: Sm90Kernel| (kernel.name, cells_sm90(dim, kernel.spans));
    let read = |which| match hopper {
        Some(kernels) => of_hopper(kernels.launches[which as usize]),
        None => of_cells(Cells::Read(which)),
    };
    let pairs = hopper.map(|kernels| of_hopper(kernels.pairs));
    let pool = of_cells(Cells::Pool);
    match layout.settings.selector {
        Selector::SampledExact | Selector::Oracle => [Some(read(Read::Every)), pairs],
        Selector::PooledMass => [Some(pool), None],
        Selector::TwoLevel => [Some(pool), Some(read(Read::Candidates))],
        Selector::FlashPrefill => {
            let names = ["compactattn_flashprefill_bf16", "compactattn_flashprefill_fp16"];
            [Some((of(names), flashprefill(dim))), None]
        }
        Selector::XAttention => {
            let names = ["compactattn_xattention_bf16", "compactattn_xattention_fp16"];
            [Some((of(names), XATTENTION)), None]
        }
        Selector::AttnGate => {
            let GateShape { gate_dim, by_group } =
                gate_shape.unwrap_or(GateShape { gate_dim: layout.shape.head_dim, by_group: false });
            let heads = if by_group { narrow(layout.shape.group_size()) } else { 1 };
            let keys = ["compactattn_attn_gate_keys_bf16", "compactattn_attn_gate_keys_fp16"];
            let scores = ["compactattn_attn_gate_bf16", "compactattn_attn_gate_fp16"];
            let gate_bytes = gate(heads, dim, narrow(gate_dim));
            [Some((of(keys), gate_keys(dim))), Some((of(scores), gate_bytes))]
        }
        Selector::Dense | Selector::Streaming | Selector::External | Selector::Quoka => [None; 2],
    }
}

fn fit(context: &Context, kernel: &str, bytes: u32, what: impl Fn() -> String) -> Result<()> {
    context.kernels().fits(kernel, bytes).map_err(|available| {
        let wanted = format!("at most {available} bytes of dynamic shared memory for {kernel} on this GPU");
        Error::new(Status::Unsupported, what(), wanted, bytes)
    })
}

/// Saturates, so that what is too large stays so; an eighth of the range, so that sums of products do not wrap.
pub(super) fn narrow(x: usize) -> u32 {
    u32::try_from(x).unwrap_or(u32::MAX).min(u32::MAX >> 13)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::path::PathBuf;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::cuda::attend;

    /// The headers hold the numbers of the host: a compiler checks one against the other.
    #[test]
    fn kernels_are_compiled_for_what_launches_give_them() {
        let mut source = String::from("#include \"cuda/common/shared.h\"\nusing namespace compactattn;\n");
        let mut equal = |left: &str, right: u32| {
            writeln!(source, "static_assert({left} == {right}, \"rust/cuda/shared.rs\");").unwrap();
        };
        equal("xattention_bytes()", XATTENTION);
        equal("sample_rows_held_bytes()", SAMPLE_ROWS_HELD);
        equal("cells_small_bytes()", CELLS_SMALL);
        for dim in [64, 96, 128, 256] {
            equal(&format!("flashprefill_bytes({dim})"), flashprefill(dim));
            equal(&format!("flashprefill_sm90_bytes({dim})"), flashprefill_sm90(dim));
            for heads in [4, 7] {
                equal(&format!("sample_rows_bytes({heads}, {dim})"), sample_rows(heads, dim));
            }
            equal(&format!("cells_bytes({dim})"), cells(dim));
            equal(&format!("cells_sm90_bytes({dim}, 1)"), cells_sm90(dim, 1));
            equal(&format!("cells_sm90_bytes({dim}, 2)"), cells_sm90(dim, 2));
            equal(&format!("pooled_lists_bytes({dim}, 0)"), pooled_lists(dim, 0));
            equal(&format!("pooled_lists_bytes({dim}, 264)"), pooled_lists(dim, 264));
            equal(&format!("gate_keys_bytes({dim})"), gate_keys(dim));
            equal(&format!("gate_bytes(1, {dim}, 64)"), gate(1, dim, 64));
            equal(&format!("gate_bytes(7, {dim}, 96)"), gate(7, dim, 96));
        }
        for blocks in [1_u32, 77, 8191, 8192, 8193, 100_000] {
            equal(
                &format!("keep_bytes({blocks}, {})", blocks.div_ceil(32)),
                keep(blocks, blocks.div_ceil(32)),
            );
        }
        compile(&source, "");
    }

    /// cuda/attend: tiles of 9.0 and of the other architectures.
    #[test]
    fn attend_kernels_are_compiled_for_what_launches_give_them() {
        for (roomy, hopper) in [("-DCOMPACTATTN_ROOMY=1", true), ("-DCOMPACTATTN_ROOMY=0", false)] {
            let mut source =
                String::from("#include \"cuda/attend/sm80/traits.h\"\nusing namespace compactattn::sm80;\n");
            let tiles = attend::sm80_tiles(hopper);
            assert_eq!(tiles.len(), 8);
            for (dtype, head_dim, [threads, shared_bytes, ctas_per_sm]) in tiles {
                let element = if dtype == Dtype::Bf16 { "__nv_bfloat16" } else { "__half" };
                let tile = format!("TileOf<{element}, {head_dim}>");
                writeln!(source, "static_assert({tile}::kThreads == {threads});").unwrap();
                writeln!(source, "static_assert({tile}::kSharedBytes == {shared_bytes});").unwrap();
                writeln!(source, "static_assert({tile}::kCtasPerSm == {ctas_per_sm});").unwrap();
            }
            compile(&source, roomy);
        }
    }

    /// Compiles to nothing, below the root of the tree; the headers of CUDA's 16-bit types are not needed for it.
    fn compile(source: &str, flag: &str) {
        use std::io::Write as _;
        let stubs = PathBuf::from(format!("{}/stubs-{}{flag}", env!("OUT_DIR"), std::process::id()));
        std::fs::create_dir_all(&stubs).unwrap();
        std::fs::write(stubs.join("cuda_bf16.h"), "struct __nv_bfloat16 { short x; };\n").unwrap();
        std::fs::write(stubs.join("cuda_fp16.h"), "struct __half { short x; };\n").unwrap();
        let mut compiler = Command::new("c++");
        compiler.args(["-std=c++17", "-fsyntax-only", "-x", "c++", "-I", env!("CARGO_MANIFEST_DIR"), "-I"]);
        compiler.arg(&stubs).args((!flag.is_empty()).then_some(flag)).arg("-").stdin(Stdio::piped());
        let mut child = compiler.spawn().unwrap();
        child.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
        let status = child.wait().unwrap();
        std::fs::remove_dir_all(&stubs).unwrap();
        assert!(status.success(), "the host and the kernels differ");
    }
}
