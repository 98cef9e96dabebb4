//! Shapes and units every stage shares. `page` = memory, `block` = selection, `box` = what one table entry names.

use crate::error::{Error, Result, Status};

/// Element type of a tensor. Values are the ABI's `compactattn_dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Dtype {
    /// bfloat16.
    Bf16 = 1,
    /// IEEE half.
    F16 = 2,
    /// IEEE single; CPU only.
    F32 = 3,
    /// 32-bit signed integer: lengths, tables.
    I32 = 4,
    /// 32-bit words: bit masks.
    U32 = 5,
    /// 8-bit floats of 4 exponent and 3 mantissa bits, finite but for one NaN of each sign; KV caches only.
    E4m3 = 6,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub fn size_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::E4m3 => 1,
        }
    }

    /// The name users know.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::I32 => "i32",
            Self::U32 => "u32",
            Self::E4m3 => "e4m3",
        }
    }
}

/// Head layout and page size of one model on one rank. Checked once, then trusted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Query heads.
    pub num_q_heads: usize,
    /// KV heads; divides `num_q_heads`.
    pub num_kv_heads: usize,
    /// Elements per head: one of [`Shape::HEAD_DIMS`].
    pub head_dim: usize,
    /// Tokens per engine KV page: one of [`Shape::PAGE_SIZES`].
    pub page_size: usize,
    /// Type of q and out.
    pub dtype: Dtype,
    /// Type of the KV cache: `dtype` or e4m3.
    pub kv_dtype: Dtype,
    /// Factor on q·k before the exponential; finite and > 0.
    pub sm_scale: f32,
}

impl Shape {
    /// Head dimensions with an attend kernel.
    pub const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];
    /// Page sizes a list can name; a page of 1 would make every table entry a token (see [`Shape::check`]).
    pub const PAGE_SIZES: [usize; 5] = [16, 32, 64, 128, 256];
    /// Largest group of query heads that share one KV head.
    pub const MAX_GROUP: usize = 64;

    /// Refuses what no kernel here serves, by name and with the remedy.
    ///
    /// # Errors
    /// [`Status::Shape`], [`Status::Unsupported`], [`Status::Value`] or [`Status::Dtype`].
    pub fn check(&self) -> Result<()> {
        if self.num_kv_heads == 0 || self.num_q_heads == 0 {
            let got = format!("{} query and {} KV heads", self.num_q_heads, self.num_kv_heads);
            return Err(Error::new(Status::Shape, "num_q_heads, num_kv_heads", "at least 1", got));
        }
        if !self.num_q_heads.is_multiple_of(self.num_kv_heads) {
            let wanted = format!("a multiple of num_kv_heads ({})", self.num_kv_heads);
            return Err(Error::new(Status::Shape, "num_q_heads", wanted, self.num_q_heads));
        }
        if self.group_size() > Self::MAX_GROUP {
            let wanted = format!("at most {} query heads per KV head", Self::MAX_GROUP);
            return Err(Error::new(Status::Unsupported, "num_q_heads", wanted, self.group_size()));
        }
        if !Self::HEAD_DIMS.contains(&self.head_dim) {
            return Err(Error::new(Status::Unsupported, "head_dim", "64, 96, 128 or 256", self.head_dim));
        }
        self.check_page_size()?;
        if !matches!(self.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32) {
            return Err(Error::new(Status::Dtype, "dtype", "bf16, f16 or f32", self.dtype.name()));
        }
        if self.kv_dtype != self.dtype && self.kv_dtype != Dtype::E4m3 {
            let wanted = format!("{}, the dtype of q, or e4m3", self.dtype.name());
            return Err(Error::new(Status::Dtype, "kv_dtype", wanted, self.kv_dtype.name()));
        }
        if !self.sm_scale.is_finite() || self.sm_scale <= 0.0 {
            return Err(Error::new(Status::Value, "sm_scale", "finite and > 0", self.sm_scale));
        }
        Ok(())
    }

    fn check_page_size(&self) -> Result<()> {
        if self.page_size == 0 {
            return Err(Error::new(Status::Value, "page_size", "16, 32, 64, 128 or 256", 0));
        }
        if self.page_size == 1 {
            let wanted = "16, 32, 64, 128 or 256 (one token a page makes every table entry a token and every read \
                          a gather; start the engine with a page size of 16 or more, e.g. --page-size 64)";
            return Err(Error::new(Status::Unsupported, "page_size", wanted, 1));
        }
        if !Self::PAGE_SIZES.contains(&self.page_size) {
            let wanted = "16, 32, 64, 128 or 256";
            return Err(Error::new(Status::Unsupported, "page_size", wanted, self.page_size));
        }
        Ok(())
    }

    /// Query heads per KV head.
    #[must_use]
    pub fn group_size(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }
}

/// How pages, blocks and boxes of one plan fit into each other; all powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Tokens per engine page.
    pub page_size: usize,
    /// Tokens per selection block; 1 for token-level selectors.
    pub block_size: usize,
}

impl Geometry {
    /// Block sizes a selection can use.
    pub const BLOCK_SIZES: [usize; 6] = [1, 16, 32, 64, 128, 256];

    /// Tokens that share a mean under mean correction. Means of 32 would be 16 times as many to attend to, for nothing
    /// that [`Geometry::MEAN_WEIGHT`] does not give (tests/bench/record/cpu/2026-11-23-coarse-means.txt).
    pub const MEAN_TOKENS: usize = 512;

    /// What a mean weighs for each token that is left out of it. exp is convex, so tokens weigh more than so many of
    /// their mean: 3 to 11 times on a trace, where outputs are nearest to dense ones with 1.5 to 2, as values have a mean
    /// of their own; on another model with 1 to 1.5 (tests/bench/record/cpu/2026-11-23-keep-rules.txt).
    pub const MEAN_WEIGHT: f32 = 1.5;

    /// Tokens one table entry names: `min(page_size, block_size)`.
    #[must_use]
    pub fn box_tokens(&self) -> usize {
        self.page_size.min(self.block_size)
    }

    /// Boxes in one page.
    #[must_use]
    pub fn boxes_per_page(&self) -> usize {
        self.page_size / self.box_tokens()
    }

    /// Boxes in one block.
    #[must_use]
    pub fn boxes_per_block(&self) -> usize {
        self.block_size / self.box_tokens()
    }

    /// Blocks that hold `tokens` KV tokens, the last one perhaps in part.
    #[must_use]
    pub fn blocks(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Whole blocks below `past` tokens: the candidates of selection. The rest is the open region.
    #[must_use]
    pub fn past_blocks(&self, past: usize) -> usize {
        past / self.block_size
    }

    /// Summary slots per page: one summary per block, kept under the page that holds the block's last token.
    #[must_use]
    pub fn summary_slots_per_page(&self) -> usize {
        (self.page_size / self.block_size).max(1)
    }

    /// The summary slot of whole block `block`, given the physical page of the block's last token.
    #[must_use]
    pub fn summary_slot(&self, last_page: usize, block: usize) -> usize {
        let slots = self.summary_slots_per_page();
        last_page * slots + block % slots
    }

    /// Blocks that one mean stands for under mean correction, [`Geometry::MEAN_TOKENS`] tokens together.
    #[must_use]
    pub fn blocks_per_mean(&self) -> usize {
        Self::MEAN_TOKENS / self.block_size
    }

    /// Logical page that holds the last token of `block`.
    #[must_use]
    pub fn last_page_of(&self, block: usize) -> usize {
        ((block + 1) * self.block_size - 1) / self.page_size
    }
}

// CUDA counts the blocks of a mean that a list skips in a byte, and finds their bits in one word.
const _: () = assert!(Geometry::MEAN_TOKENS / 16 <= 32 && Geometry::MEAN_TOKENS >= 256);

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape {
            num_q_heads: 9,
            num_kv_heads: 3,
            head_dim: 64,
            page_size: 16,
            dtype: Dtype::Bf16,
            kv_dtype: Dtype::Bf16,
            sm_scale: 0.125,
        }
    }

    #[test]
    fn page_size_one_is_refused_with_the_remedy() {
        let error = Shape { page_size: 1, ..shape() }.check().unwrap_err();
        assert_eq!(error.status(), Status::Unsupported);
        assert!(error.to_string().contains("--page-size"));
    }

    #[test]
    fn heads_that_do_not_group_are_refused() {
        assert_eq!(Shape { num_q_heads: 7, ..shape() }.check().unwrap_err().status(), Status::Shape);
        assert!(shape().check().is_ok());
    }

    #[test]
    fn summary_slots_are_distinct_within_and_across_pages() {
        for (page_size, block_size) in [(16, 128), (128, 16), (64, 64)] {
            let geometry = Geometry { page_size, block_size };
            let slots: Vec<_> = (0..32).map(|b| geometry.summary_slot(geometry.last_page_of(b), b)).collect();
            let distinct: std::collections::HashSet<_> = slots.iter().collect();
            assert_eq!(distinct.len(), slots.len());
        }
    }
}
