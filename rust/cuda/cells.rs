//! Which kernel fills cells from keys and mean keys, where there is none of Hopper's own (cuda/select).

use super::context::Context;
use super::select::Read;
use super::shared;
use crate::types::{Dtype, Shape};

/// What cells are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cells {
    /// Keys.
    Read(Read),
    /// Mean keys.
    Pool,
}

/// One kernel and what a launch gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CellsKernel {
    pub(crate) name: &'static str,
    /// Dynamic.
    pub(crate) shared_bytes: u32,
    pub(crate) ctas_per_sm: u32,
}

impl CellsKernel {
    /// The one for the shape: with keys in pieces where whole ones do not fit this GPU's shared memory and there is such
    /// a kernel, else with whole ones, whether or not they fit.
    pub(crate) fn choose(context: &Context, cells: Cells, shape: &Shape) -> Self {
        let family = match cells {
            Cells::Read(Read::Every) => &FAMILIES[0],
            Cells::Read(Read::Candidates) => &FAMILIES[1],
            Cells::Pool => &FAMILIES[2],
        };
        let by_dtype = usize::from(shape.dtype != Dtype::Bf16);
        let has_e4m3 = shape.kv_dtype == Dtype::E4m3;
        let whole = Self {
            name: family.whole[usize::from(has_e4m3)][by_dtype],
            // A head_dim is at most 256.
            shared_bytes: shared::cells(u32::try_from(shape.head_dim).unwrap_or(256)),
            ctas_per_sm: 3,
        };
        let small = Self { name: family.small[by_dtype], shared_bytes: shared::CELLS_SMALL, ctas_per_sm: 1 };
        let fits = |kernel: &Self| context.kernels().fits(kernel.name, kernel.shared_bytes).is_ok();
        let has_small = shape.head_dim == SMALL_HEAD_DIM && !has_e4m3;
        if has_small && !fits(&whole) && fits(&small) { small } else { whole }
    }
}

/// The kernels for the same cells, each for bf16 and f16.
struct Family {
    /// Over caches of 16 bits, and of e4m3.
    whole: [[&'static str; 2]; 2],
    small: [&'static str; 2],
}

macro_rules! family {
    ($name:literal) => {
        Family {
            whole: [
                [concat!($name, "_bf16"), concat!($name, "_fp16")],
                [concat!($name, "_bf16_e4m3"), concat!($name, "_fp16_e4m3")],
            ],
            small: [concat!($name, "_small_bf16_d256"), concat!($name, "_small_fp16_d256")],
        }
    };
}

static FAMILIES: [Family; 3] = [
    family!("compactattn_cells_read"),
    family!("compactattn_cells_read_candidates"),
    family!("compactattn_cells_pool"),
];

/// The only one whose keys come in pieces (cuda/select/small).
const SMALL_HEAD_DIM: usize = 256;
