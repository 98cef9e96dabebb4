//! One caller-owned block of memory, cut into the stage buffers.

use bytemuck::{Pod, Zeroable};

use crate::error::{Error, Result, Status};
use crate::plan::Layout;

/// Elements of each stage buffer of the largest step, and the bytes that hold them all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// `[select spans, num_q_heads, max_blocks]` f32.
    pub scores: usize,
    /// `[select spans, num_q_heads, mask_words]` u32.
    pub masks: usize,
    /// `[list rows, mask_words]` u32.
    pub lists: usize,
    /// `[list rows]` i32: counts, and as many stream lengths.
    pub rows: usize,
    /// `[list rows, max_boxes]` i32.
    pub boxes: usize,
    /// `[splits, total_q * num_q_heads, head_dim]` f32.
    pub partial_out: usize,
    /// `[splits, total_q * num_q_heads]` f32.
    pub partial_lse: usize,
    /// All of them, each aligned.
    pub workspace_bytes: usize,
}

impl Sizes {
    /// Alignment of a workspace and of each buffer in it, in bytes.
    pub const ALIGNMENT: usize = 256;

    /// Sizes for one layer; growing with each limit.
    ///
    /// # Errors
    /// [`Status::Overflow`].
    pub fn of(layout: &Layout, splits: usize) -> Result<Self> {
        let product = |factors: &[usize]| {
            let all = factors.iter().try_fold(1_usize, |all, &x| all.checked_mul(x));
            all.filter(|&n| n < usize::MAX / 64)
                .ok_or_else(|| Error::new(Status::Overflow, "limits", "buffers within 63 bits", "more"))
        };
        let heads = layout.shape.num_q_heads;
        let select_rows = product(&[layout.max_select_spans(), heads])?;
        let list_rows = layout.max_list_rows();
        let rows = product(&[splits, layout.limits.max_total_q, heads])?;
        let mut sizes = Self {
            scores: product(&[select_rows, layout.max_blocks()])?,
            masks: product(&[select_rows, layout.mask_words()])?,
            lists: product(&[list_rows, layout.mask_words()])?,
            rows: list_rows,
            boxes: product(&[list_rows, layout.max_boxes()])?,
            partial_out: product(&[rows, layout.shape.head_dim])?,
            partial_lse: rows,
            workspace_bytes: 0,
        };
        let Self { scores, masks, lists, rows, boxes, partial_out, partial_lse, .. } = sizes;
        // Every buffer holds 4-byte elements.
        let buffers = [scores, masks, lists, rows, rows, boxes, partial_out, partial_lse];
        sizes.workspace_bytes = buffers.iter().map(|n| (n * 4).next_multiple_of(Self::ALIGNMENT)).sum();
        Ok(sizes)
    }
}

/// Owned host memory for [`Plan::forward`](crate::run::Plan::forward), aligned to [`Sizes::ALIGNMENT`]: for engines
/// without an allocator of their own. One call at a time; a plan has no part in it and may be dropped first.
#[derive(Debug)]
pub struct Workspace {
    memory: Box<[u8]>,
    start: usize,
    bytes: usize,
}

impl Workspace {
    /// Of so many bytes: [`Plan::workspace_bytes`](crate::run::Plan::workspace_bytes).
    ///
    /// # Errors
    /// [`Status::OutOfMemory`].
    ///
    /// ```
    /// let mut workspace = compactattn::workspace::Workspace::new(1000)?;
    /// assert_eq!(workspace.bytes_mut().len(), 1000);
    /// # Ok::<(), compactattn::Error>(())
    /// ```
    pub fn new(bytes: usize) -> Result<Self> {
        let memory: Box<[u8]> = zeros("workspace", bytes.saturating_add(Sizes::ALIGNMENT))?;
        let start = memory.as_ptr().addr().next_multiple_of(Sizes::ALIGNMENT) - memory.as_ptr().addr();
        Ok(Self { memory, start, bytes })
    }

    /// The aligned bytes.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.bytes]
    }
}

/// `len` zeros for `what`. The system zeroes them page by page as they are touched: what never is costs nothing.
pub(crate) fn zeros<T: Zeroable>(what: &str, len: usize) -> Result<Box<[T]>> {
    bytemuck::allocation::try_zeroed_slice_box(len).map_err(|()| {
        let wanted = format!("{} bytes of host memory", len.saturating_mul(size_of::<T>()));
        Error::new(Status::OutOfMemory, what, wanted, "none")
    })
}

/// Hands out aligned, disjoint pieces of a workspace.
pub(crate) struct Carver<'a> {
    rest: &'a mut [u8],
}

impl<'a> Carver<'a> {
    /// Takes the workspace if it holds `needed` bytes at the right alignment.
    pub(crate) fn new(workspace: &'a mut [u8], needed: usize) -> Result<Self> {
        if workspace.len() < needed {
            return Err(Error::new(
                Status::Workspace,
                "workspace",
                format!("{needed} bytes"),
                workspace.len(),
            ));
        }
        if !workspace.as_ptr().addr().is_multiple_of(Sizes::ALIGNMENT) && needed > 0 {
            let wanted = format!("alignment to {} bytes", Sizes::ALIGNMENT);
            return Err(Error::new(Status::Workspace, "workspace", wanted, "a misaligned address"));
        }
        Ok(Self { rest: workspace })
    }

    /// The next `len` elements.
    pub(crate) fn take<T: Pod>(&mut self, len: usize) -> Result<&'a mut [T]> {
        let bytes = len * size_of::<T>();
        let rest = std::mem::take(&mut self.rest);
        let (piece, rest) = rest
            .split_at_mut_checked(bytes.next_multiple_of(Sizes::ALIGNMENT))
            .ok_or_else(|| Error::plain(Status::Internal, "workspace sizes disagree with their use"))?;
        self.rest = rest;
        bytemuck::try_cast_slice_mut(&mut piece[..bytes])
            .map_err(|_| Error::plain(Status::Internal, "workspace piece is misaligned"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owned_workspace_is_what_a_call_wants() {
        for bytes in [0, 1, 255, 256, 100_000] {
            let mut workspace = Workspace::new(bytes).unwrap();
            assert!(Carver::new(workspace.bytes_mut(), bytes).is_ok(), "{bytes}");
        }
    }

    #[test]
    fn a_workspace_beyond_all_memory_is_refused() {
        for bytes in [1 << 48, usize::MAX >> 1, usize::MAX] {
            assert_eq!(Workspace::new(bytes).unwrap_err().status(), Status::OutOfMemory, "{bytes}");
        }
    }

    use crate::plan::Limits;
    use crate::settings::{Selector, Settings};
    use crate::types::{Dtype, Shape};

    fn bytes(limits: Limits) -> usize {
        let shape = Shape {
            num_q_heads: 8,
            num_kv_heads: 2,
            head_dim: 64,
            page_size: 16,
            dtype: Dtype::Bf16,
            kv_dtype: Dtype::Bf16,
            sm_scale: 0.125,
        };
        let layout = Layout::new(shape, Settings::of(Selector::FlashPrefill), limits).unwrap();
        Sizes::of(&layout, 2).unwrap().workspace_bytes
    }

    #[test]
    fn the_workspace_grows_with_every_limit() {
        let limits = Limits { max_num_reqs: 4, max_total_q: 1024, max_kv_len: 8192 };
        let small = bytes(limits);
        assert!(small < bytes(Limits { max_num_reqs: 64, ..limits }));
        assert!(small < bytes(Limits { max_total_q: 2048, ..limits }));
        assert!(small < bytes(Limits { max_kv_len: 16384, ..limits }));
    }

    #[test]
    fn a_short_or_misaligned_workspace_is_refused_with_what_it_needs() {
        let mut memory = vec![0_u8; 4096];
        let start = memory.as_ptr().align_offset(Sizes::ALIGNMENT);
        assert!(Carver::new(&mut memory[start..start + 256], 256).is_ok());
        let error = Carver::new(&mut memory[start..start + 255], 256).err().unwrap();
        assert!(error.to_string().contains("256 bytes"), "{error}");
        assert_eq!(Carver::new(&mut memory[start + 4..], 256).err().unwrap().status(), Status::Workspace);
    }

    #[test]
    fn pieces_are_disjoint_and_aligned() {
        let mut memory = vec![0_u8; 4096];
        let start = memory.as_ptr().align_offset(Sizes::ALIGNMENT);
        let mut carver = Carver::new(&mut memory[start..], 1024).unwrap();
        let a: &mut [f32] = carver.take(3).unwrap();
        let b: &mut [i32] = carver.take(65).unwrap();
        a.fill(1.0);
        b.fill(-1);
        assert_eq!(a, [1.0; 3]);
        assert_eq!(b.as_ptr().addr() % Sizes::ALIGNMENT, 0);
    }
}
