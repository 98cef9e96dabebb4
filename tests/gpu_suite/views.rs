//! The structs that describe a step's memory to the library.

use compactattn::capi::*;
use compactattn::select;
use compactattn::settings::{KeepAt, Selector};

use super::abi::{F32, I32, NONE, U32, tensor};
use super::device::struct_size;
use super::memory::Part;
use super::step::{Given, Step, lse_stride, total_q};
use crate::common::pool::Packed;

impl Step<'_, '_> {
    pub(crate) fn batch(&self) -> compactattn_batch {
        let (case, parts, shape) = (self.case, &self.parts, &self.case.shape);
        let reqs = case.seq_lens.len();
        let [k, v] = [false, true].map(|v| {
            let (at, strides) = case.pools.strides.of(v);
            let skip = at * shape.kv_dtype.size_bytes();
            let dims = [case.pools.num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim];
            let data = self.memory.address(parts.kv).wrapping_add(skip);
            tensor(data, parts.kv.len - skip, shape.kv_dtype as i32, &dims, Some(&strides))
        });
        let [k_scale, v_scale] = [0, 1].map(|i| match case.pools.scales[i].len() {
            0 => NONE,
            count => self.tensor(parts.scales[i], F32, &[count]),
        });
        let width = [case.table_stride, 1];
        compactattn_batch {
            struct_size: struct_size::<compactattn_batch>(),
            reserved: 0,
            q: self.packed(parts.q, &case.q),
            k,
            v,
            cu_seqlens_q: self.tensor(parts.cu, I32, &[reqs + 1]),
            seq_lens: self.tensor(parts.lens, I32, &[reqs]),
            block_table: tensor(
                self.memory.address(parts.table),
                parts.table.len,
                I32,
                &[reqs, case.table_width],
                Some(&width),
            ),
            stream: std::ptr::null_mut(),
            workspace: self.workspace.cast(),
            workspace_bytes: self.plan.sizes.workspace_bytes,
            k_scale,
            v_scale,
        }
    }

    fn packed(&self, part: Part, like: &Packed) -> compactattn_tensor {
        let (shape, total_q) = (&self.case.shape, total_q(self.case));
        let dims = [total_q, shape.num_q_heads, shape.head_dim];
        let strides = [like.stride_token, like.stride_head, 1];
        tensor(self.memory.address(part), part.len, shape.dtype as i32, &dims, Some(&strides))
    }

    pub(super) fn results(&self, [out, lse]: [Part; 2]) -> [compactattn_tensor; 2] {
        let dims = [self.case.shape.num_q_heads, total_q(self.case)];
        let strides = [lse_stride(self.case), 1];
        let lse = tensor(self.memory.address(lse), lse.len, F32, &dims, Some(&strides));
        [self.packed(out, &self.case.q), lse]
    }

    pub(super) fn summaries(&self) -> compactattn_summaries {
        let (sizes, shape) = (&self.plan.sizes, &self.case.shape);
        let slots = sizes.summary_slots_per_page as usize;
        let dims = [self.case.pools.num_pages, slots, shape.num_kv_heads, shape.head_dim];
        let seals = [dims[0], dims[1], dims[2], 2];
        compactattn_summaries {
            struct_size: struct_size::<compactattn_summaries>(),
            reserved: 0,
            k_mean: self.tensor(self.parts.k_mean, F32, &dims),
            v_mean: if self.corrects() { self.tensor(self.parts.v_mean, F32, &dims) } else { NONE },
            seals: if self.sealed { self.tensor(self.parts.seals, U32, &seals) } else { NONE },
        }
    }

    pub(super) fn selection(&self, scores: Part, masks: Part) -> compactattn_selection {
        let (sizes, heads) = (&self.plan.sizes, self.case.shape.num_q_heads);
        let rows = sizes.select_rows as usize;
        compactattn_selection {
            struct_size: struct_size::<compactattn_selection>(),
            reserved: 0,
            scores: self.tensor(scores, F32, &[rows, heads, sizes.max_blocks as usize]),
            masks: self.tensor(masks, U32, &[rows, heads, sizes.mask_words as usize]),
        }
    }

    pub(super) fn external(&self) -> Option<compactattn_selection> {
        let given = self.selection(self.parts.given, self.parts.given);
        match self.given {
            Given::Nothing | Given::Gate(_) => None,
            Given::Scores(_) => Some(compactattn_selection { masks: NONE, ..given }),
            Given::Masks(_) => Some(compactattn_selection { scores: NONE, ..given }),
        }
    }

    pub(super) fn lists(&self, part: Part) -> compactattn_tensor {
        let sizes = &self.plan.sizes;
        self.tensor(part, U32, &[sizes.list_rows as usize, sizes.mask_words as usize])
    }

    pub(super) fn table(&self) -> compactattn_table {
        let (sizes, parts) = (&self.plan.sizes, &self.parts);
        let rows = sizes.list_rows as usize;
        compactattn_table {
            struct_size: struct_size::<compactattn_table>(),
            reserved: 0,
            counts: self.tensor(parts.counts, I32, &[rows]),
            stream_lens: self.tensor(parts.stream_lens, I32, &[rows]),
            boxes: self.tensor(parts.boxes, I32, &[rows, sizes.max_boxes as usize]),
        }
    }

    pub(super) fn tensor(&self, part: Part, dtype: i32, shape: &[usize]) -> compactattn_tensor {
        tensor(self.memory.address(part), part.len, dtype, shape, None)
    }

    pub(crate) fn needs_summaries(&self) -> bool {
        self.corrects() || select::needs_summaries(self.case.settings.selector)
    }

    pub(crate) fn corrects(&self) -> bool {
        self.case.settings.mean_correction
    }

    pub(crate) fn keeps_rows(&self) -> bool {
        self.case.settings.keep_at == KeepAt::Row && self.case.settings.selector != Selector::External
    }
}
