//! The stages one by one through the C ABI give what the whole pass gives, and a table that came back from a caller
//! is checked before it is followed.
#![expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "sizes")]

mod capi_world;

use capi_world::memory::{Guarded, Rng};
use capi_world::*;
use compactattn::capi::{compactattn_status as status, *};

const I32: i32 = compactattn_dtype::COMPACTATTN_DTYPE_I32 as i32;
const U32: i32 = compactattn_dtype::COMPACTATTN_DTYPE_U32 as i32;
const F32: i32 = compactattn_dtype::COMPACTATTN_DTYPE_F32 as i32;

/// The buffers between the stages, at their largest.
struct Buffers {
    memory: Vec<Guarded>,
    selection: compactattn_selection,
    summaries: compactattn_summaries,
    lists: compactattn_tensor,
    table: compactattn_table,
}

/// Parts of [`Buffers::memory`]: mean keys, lists.
const MEANS: usize = 2;
const LISTS: usize = 3;
/// Part of [`Buffers::memory`] with the table's counts, stream lengths and boxes.
const COUNTS: usize = 4;
const STREAM_LENS: usize = 5;
const BOXES: usize = 6;

impl Buffers {
    fn of(world: &World) -> Self {
        let sizes = sizes(world.plan, 0);
        let (heads, dim) = (i64::from(world.desc.num_q_heads), i64::from(world.desc.head_dim));
        let means = [
            i64::from(world.num_pages),
            sizes.summary_slots_per_page,
            i64::from(world.desc.num_kv_heads),
            dim,
        ];
        let (rows, words) = (sizes.list_rows, sizes.mask_words);
        let shapes: [(i32, &[i64]); 7] = [
            (F32, &[sizes.select_rows, heads, sizes.max_blocks]),
            (U32, &[sizes.select_rows, heads, words]),
            (F32, &means),
            (U32, &[rows, words]),
            (I32, &[rows]),
            (I32, &[rows]),
            (I32, &[rows, sizes.max_boxes]),
        ];
        let memory: Vec<Guarded> = shapes
            .iter()
            .map(|(_, shape)| Guarded::new(shape.iter().product::<i64>() as usize * 4))
            .collect();
        let tensor = |i: usize| contiguous(&memory[i], shapes[i].0, shapes[i].1);
        Self {
            selection: compactattn_selection {
                struct_size: 200,
                reserved: 0,
                scores: tensor(0),
                masks: tensor(1),
            },
            summaries: compactattn_summaries {
                struct_size: 200,
                reserved: 0,
                k_mean: tensor(2),
                v_mean: zeroed(),
                seals: zeroed(),
            },
            lists: tensor(3),
            table: compactattn_table {
                struct_size: 296,
                reserved: 0,
                counts: tensor(COUNTS),
                stream_lens: tensor(STREAM_LENS),
                boxes: tensor(BOXES),
            },
            memory,
        }
    }

    /// Everything before attend; the list rows of the batch. `by_masks` unites masks instead of scores.
    fn build(&self, world: &World, by_masks: bool) -> i64 {
        let (plan, batch) = (world.plan, &raw const *world.batch);
        let mut from = self.selection;
        *(if by_masks { &mut from.scores } else { &mut from.masks }) = zeroed();
        let mut rows = 0;
        // SAFETY: the structs point into live memory of the sizes the plan told.
        ok(unsafe { compactattn_summaries_update(plan, 0, batch, 1, &raw const self.summaries) });
        // SAFETY: as above.
        ok(unsafe {
            compactattn_select(plan, 0, batch, &raw const self.summaries, &raw const self.selection)
        });
        // SAFETY: as above.
        ok(unsafe {
            compactattn_union(plan, 0, batch, &raw const from, &raw const self.lists, &raw mut rows)
        });
        // SAFETY: as above.
        ok(unsafe { compactattn_table_build(plan, 0, batch, &raw const self.lists, &raw const self.table) });
        rows
    }

    fn attend(&self, world: &World) -> compactattn_status {
        let args = compactattn_attend_args {
            struct_size: 256,
            layer: 0,
            batch: &raw const *world.batch,
            table: &raw const self.table,
            lists: std::ptr::null(),
            summaries: std::ptr::null(),
            out: world.args.out,
            lse: world.args.lse,
            workspace: world.args.workspace,
            workspace_bytes: world.args.workspace_bytes,
            stream: std::ptr::null_mut(),
        };
        // SAFETY: the structs point into live memory.
        unsafe { compactattn_attend(world.plan, &raw const args) }
    }
}

fn contiguous(memory: &Guarded, dtype: i32, shape: &[i64]) -> compactattn_tensor {
    let mut tensor: compactattn_tensor = zeroed();
    (tensor.data, tensor.storage_bytes) = (memory.data().cast(), memory.len() as i64);
    (tensor.dtype, tensor.ndim) = (dtype, i32::try_from(shape.len()).unwrap_or(0));
    for (i, &extent) in shape.iter().enumerate() {
        (tensor.shape[i], tensor.stride[i]) = (extent, shape[i + 1..].iter().product());
    }
    tensor
}

fn ok(status: compactattn_status) {
    assert_eq!(status, status::COMPACTATTN_OK, "{}", last_error());
}

#[test]
fn stages_one_by_one_give_the_bits_of_the_whole_pass() {
    for seed in 0..VARIANTS {
        let mut world = World::random(seed);
        let wanted = world.results();
        let buffers = Buffers::of(&world);
        let by_row = world.settings.keep_at == 0;
        let rows = buffers.build(&world, by_row);
        assert!(rows >= world.reqs.len() as i64 && rows <= sizes(world.plan, 0).list_rows);
        for part in [OUT, LSE] {
            world.memory[part].bytes_mut().fill(0x11);
        }
        ok(buffers.attend(&world));
        assert!(world.memory[OUT].bytes() == wanted[0] && world.memory[LSE].bytes() == wanted[1], "{seed}");
        assert!(world.canaries_hold() && buffers.memory.iter().all(Guarded::canaries_hold));
        world.close();
    }
}

#[test]
fn a_table_with_a_bad_entry_is_refused_before_it_is_followed() {
    for seed in 0..VARIANTS {
        let world = World::random(seed);
        let mut buffers = Buffers::of(&world);
        let rows = i32::try_from(buffers.build(&world, world.settings.keep_at == 0)).unwrap_or(1);
        let mut rng = Rng::new(seed);
        let row = rng.range(0, rows) as usize;
        let most = sizes(world.plan, 0).max_boxes as usize;
        let (part, at, name) = match rng.range(0, 3) {
            0 => (COUNTS, row, "table.counts"),
            1 => (STREAM_LENS, row, "table.stream_lens"),
            _ => (BOXES, row * most, "table.boxes"),
        };
        let good = std::mem::replace(
            &mut buffers.memory[part].ints_mut()[at],
            *rng.pick(&[-1, i32::MIN, i32::MAX, 1 << 20]),
        );
        let before = world.snapshot();
        assert_eq!(buffers.attend(&world), status::COMPACTATTN_E_TABLE, "variant {seed}: {}", last_error());
        check_text(status::COMPACTATTN_E_TABLE, name);
        assert!(world.snapshot() == before);
        buffers.memory[part].ints_mut()[at] = good;
        ok(buffers.attend(&world));
        world.close();
    }
}

/// A refused step has not made sealed summaries anew either.
#[test]
fn a_refused_step_leaves_the_callers_summaries_alone() {
    let pooled = settings_of(compactattn_selector::COMPACTATTN_SELECTOR_POOLED_MASS);
    for seed in 0..VARIANTS {
        let mut world = World::random(seed);
        let mut buffers = Buffers::of(&world);
        let [pages, slots, heads, _] = buffers.summaries.k_mean.shape;
        let mut seals = Guarded::new((pages * slots * heads * 8) as usize);
        seals.bytes_mut().fill(0);
        buffers.summaries.seals = contiguous(&seals, U32, &[pages, slots, heads, 2]);
        let own =
            compactattn_settings { block_size: world.settings.block_size, dense_below_kv_len: 0, ..pooled };
        let corrected = compactattn_settings { mean_correction: 1, ..own };
        let halved = compactattn_settings { block_size: own.block_size * 2, ..own };
        world.args.summaries = &raw const buffers.summaries;
        for (own, wanted, name) in [
            (corrected, status::COMPACTATTN_E_NULL, "v_mean"),
            (halved, status::COMPACTATTN_E_VALUE, "settings.block_size"),
        ] {
            world.args.settings = &raw const own;
            let before = buffers.memory[MEANS].bytes().to_vec();
            let found = world.forward();
            // Means of other blocks mostly have another shape, which is seen first.
            if found != status::COMPACTATTN_E_SHAPE {
                assert_eq!(found, wanted, "variant {seed}: {}", last_error());
                check_text(wanted, name);
            }
            assert!(
                buffers.memory[MEANS].bytes() == before && seals.bytes().iter().all(|&x| x == 0),
                "{seed}"
            );
        }
        world.close();
    }
}

#[test]
fn where_counts_go_is_looked_at_before_anything_is_written() {
    for seed in 0..VARIANTS {
        let world = World::random(seed);
        let mut buffers = Buffers::of(&world);
        buffers.build(&world, false);
        buffers.memory[LISTS].bytes_mut().fill(0x11);
        let (plan, batch, mut from) = (world.plan, &raw const *world.batch, buffers.selection);
        from.masks = zeroed();
        let mut rows = [0_i64; 2];
        let askew = (&raw mut rows).cast::<u8>().wrapping_add(1).cast();
        // SAFETY: the structs point into live memory; a misaligned pointer is refused, not written through.
        let found =
            unsafe { compactattn_union(plan, 0, batch, &raw const from, &raw const buffers.lists, askew) };
        assert_eq!(found, status::COMPACTATTN_E_ALIGN, "{seed}");
        check_text(status::COMPACTATTN_E_ALIGN, "out_rows");
        assert!(buffers.memory[LISTS].bytes().iter().all(|&x| x == 0x11));
        world.close();
    }
}

#[test]
fn exports_of_dense_lists_are_the_engines_own_table() {
    for seed in 0..VARIANTS {
        let world = World::random(seed);
        let dense = world.settings.selector == 0;
        let mut buffers = Buffers::of(&world);
        let rows = buffers.build(&world, world.settings.keep_at == 0) as usize;
        let lens = [rows + 1, rows * world.width, rows].map(|n| Guarded::new(n * 4));
        let tensor = |i: usize| contiguous(&lens[i], I32, &[lens[i].len() as i64 / 4]);
        let csr = compactattn_csr {
            struct_size: 296,
            reserved: 0,
            indptr: tensor(0),
            indices: tensor(1),
            last_page_len: tensor(2),
        };
        let mut entries = 0;
        let (batch, lists) = (&raw const *world.batch, &raw const buffers.lists);
        // SAFETY: the structs point into live memory.
        ok(unsafe {
            compactattn_table_export_csr(world.plan, 0, batch, lists, &raw const csr, &raw mut entries)
        });
        let [mut indptr, mut indices, _] = lens;
        assert_eq!(i64::from(indptr.ints_mut()[rows]), entries);
        let table = &world.memory[TABLE];
        let first_row: Vec<i32> = bytemuck::pod_collect_to_vec(table.bytes());
        let count = indptr.ints_mut()[1] as usize;
        let used = (world.reqs[0].1 + world.desc.page_size - 1) / world.desc.page_size;
        assert!(!dense || count == used as usize, "variant {seed}");
        assert!(indices.ints_mut()[..count].iter().all(|page| first_row[..used as usize].contains(page)));
        assert!(buffers.memory[COUNTS].ints_mut()[..rows].iter().all(|&boxes| boxes > 0));
        world.close();
    }
}

#[test]
fn combine_of_a_result_with_nothing_is_that_result() {
    for seed in 0..VARIANTS {
        let world = World::random(seed);
        let [out, lse] = world.results();
        let (nothing, empty) = (Guarded::new(out.len()), Guarded::new(lse.len()));
        let mut blind = empty;
        for word in blind.ints_mut() {
            *word = f32::NEG_INFINITY.to_bits().cast_signed();
        }
        let (to, to_lse) = (Guarded::new(out.len()), Guarded::new(lse.len()));
        let like = |tensor: compactattn_tensor, memory: &Guarded| compactattn_tensor {
            data: memory.data().cast(),
            ..tensor
        };
        let args = compactattn_combine_args {
            struct_size: 592,
            reserved: 0,
            out_a: world.args.out,
            lse_a: world.args.lse,
            out_b: like(world.args.out, &nothing),
            lse_b: like(world.args.lse, &blind),
            out: like(world.args.out, &to),
            lse: like(world.args.lse, &to_lse),
            stream: std::ptr::null_mut(),
        };
        // SAFETY: the tensors lie in live memory.
        ok(unsafe { compactattn_combine(world.plan, &raw const args) });
        assert!(to.bytes() == out && to_lse.bytes() == lse, "variant {seed}");
        let args = compactattn_combine_args { out: args.out_a, ..args };
        // SAFETY: as above; the overlap is what is tried.
        let aliased = unsafe { compactattn_combine(world.plan, &raw const args) };
        assert_eq!(aliased, status::COMPACTATTN_E_ALIAS);
        check_text(aliased, "args.out");
        world.close();
    }
}
