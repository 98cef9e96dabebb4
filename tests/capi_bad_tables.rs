//! Bad input through the C ABI: lengths and tables (classes 47-63 of the table of bad inputs), and, of them, what is
//! odd but legal. How each class is tried: see `capi_bad_tensors.rs`.
#![expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small random numbers")]

mod capi_world;

use capi_world::memory::Rng;
use capi_world::*;
use compactattn::capi::compactattn_status as status;

/// A request of the world at random.
fn some_req(world: &mut World) -> usize {
    world.rng.range(0, world.reqs.len() as i32) as usize
}

/// Entries of a request's table row that hold its tokens.
fn used(world: &World, req: usize) -> i32 {
    (world.reqs[req].1 + world.desc.page_size - 1) / world.desc.page_size
}

/// Overwrites one used table entry by `entry`.
fn spoil_entry(world: &mut World, entry: i32) -> Fault {
    let req = some_req(world);
    let i = world.rng.range(0, used(world, req)) as usize;
    let at = req * world.width + i;
    world.memory[TABLE].ints_mut()[at] = entry;
    Fault(status::COMPACTATTN_E_TABLE, Box::leak(format!("block_table[{req}][{i}]").into()))
}

#[test]
fn class_47_queries_that_do_not_start_at_0() {
    refused(|w| {
        w.memory[CU].ints_mut()[0] = *w.rng.pick(&[1, -1, i32::MAX, i32::MIN]);
        Fault(status::COMPACTATTN_E_VALUE, "cu_seqlens_q[0]")
    });
}

#[test]
fn class_48_queries_that_go_backwards() {
    refused(|w| {
        let i = some_req(w) + 1;
        let before = w.memory[CU].ints_mut()[i - 1];
        w.memory[CU].ints_mut()[i] = before - 1 - w.rng.range(0, 100);
        Fault(status::COMPACTATTN_E_VALUE, Box::leak(format!("cu_seqlens_q[{i}]").into()))
    });
}

#[test]
fn class_49_queries_that_end_elsewhere() {
    refused(|w| {
        let last = w.reqs.len();
        w.memory[CU].ints_mut()[last] += *w.rng.pick(&[1, 1000]);
        Fault(status::COMPACTATTN_E_VALUE, Box::leak(format!("cu_seqlens_q[{last}]").into()))
    });
}

#[test]
fn class_53_negative_lengths() {
    refused(|w| {
        let req = some_req(w);
        w.memory[LENS].ints_mut()[req] = *w.rng.pick(&[-1, -1000, i32::MIN]);
        Fault(status::COMPACTATTN_E_SEQLEN, Box::leak(format!("seq_lens[{req}]").into()))
    });
}

#[test]
fn class_54_lengths_beyond_the_table() {
    refused(|w| {
        let req = some_req(w);
        let most = w.width as i32 * w.desc.page_size;
        w.memory[LENS].ints_mut()[req] = *w.rng.pick(&[most + 1, i32::MAX]);
        Fault(status::COMPACTATTN_E_SEQLEN, Box::leak(format!("seq_lens[{req}]").into()))
    });
}

#[test]
fn class_55_entries_beyond_the_pool() {
    refused(|w| {
        let entry = w.num_pages + w.rng.range(0, 1000);
        spoil_entry(w, entry)
    });
}

#[test]
fn class_56_unset_entries_within_the_valid_prefix() {
    refused(|w| spoil_entry(w, -1));
}

#[test]
fn class_58_entries_that_would_wrap() {
    refused(|w| {
        let stride = (w.batch.k.stride[0] as i32).max(1);
        let entry = *w.rng.pick(&[i32::MAX, i32::MIN, i32::MAX / stride + w.num_pages, 1 << 30]);
        spoil_entry(w, entry)
    });
}

#[test]
fn class_62_a_row_stride_shorter_than_a_row() {
    refused(|w| {
        let rows = w.reqs.len();
        if rows == 1 {
            w.batch.block_table.stride[1] = 2;
        } else {
            w.batch.block_table.stride[0] = i64::from(w.rng.range(0, w.width as i32));
        }
        Fault(status::COMPACTATTN_E_STRIDE, "batch.block_table.stride")
    });
}

/// The world, with the same requests, after `change`; both must give the same results.
fn same_results(change: impl Fn(&mut World)) {
    for seed in 0..VARIANTS {
        let (plain, mut changed) = (World::random(seed), World::random(seed));
        change(&mut changed);
        assert!(plain.results() == changed.results(), "variant {seed}");
        assert!(changed.canaries_hold());
        plain.close();
        changed.close();
    }
}

#[test]
fn class_57_61_whatever_follows_the_valid_prefix_is_never_read() {
    same_results(|w| {
        let in_range = w.rng.range(0, w.num_pages);
        for req in 0..w.reqs.len() {
            for i in used(w, req) as usize..w.width {
                let tail = *w.rng.pick(&[-1, i32::MIN, i32::MAX, in_range]);
                let at = req * w.width + i;
                w.memory[TABLE].ints_mut()[at] = tail;
            }
        }
    });
}

#[test]
fn class_57_tokens_after_the_last_one_are_never_read() {
    same_results(|w| {
        // NaN in every slot of the pool that no request owns would spread if any were read.
        let page = w.desc.page_size;
        let mut owned = vec![false; (w.num_pages * page) as usize];
        for req in 0..w.reqs.len() {
            for token in 0..w.reqs[req].1 {
                let entry = w.memory[TABLE].ints_mut()[req * w.width + (token / page) as usize];
                owned[(entry * page + token % page) as usize] = true;
            }
        }
        for slot in (0..owned.len()).filter(|&slot| !owned[slot]) {
            w.poison(slot as i64 / i64::from(page), slot as i64 % i64::from(page));
        }
    });
}

/// Runs a world of these requests; its results.
fn of_requests(seed: u64, reqs: Vec<(i32, i32)>) -> (World, [Vec<f32>; 2]) {
    let world = World::with(Rng::new(seed), reqs);
    let results = world.results();
    let floats = world.floats(&results);
    (world, floats)
}

#[test]
fn class_50_51_rows_that_see_nothing_are_0_and_minus_infinity() {
    for seed in 0..VARIANTS {
        let mut rng = Rng::new(seed);
        let q_len = rng.range(2, 20);
        let kv_len = rng.range(0, q_len);
        let (world, [out, lse]) = of_requests(seed, vec![(q_len, kv_len), (3, 9)]);
        let (heads, dim) = (world.desc.num_q_heads as usize, world.desc.head_dim as usize);
        let blind = (q_len - kv_len) as usize;
        assert!(out[..blind * heads * dim].iter().all(|&x| x == 0.0), "variant {seed}");
        let total_q = lse.len() / heads;
        for (i, &x) in lse.iter().enumerate() {
            assert_eq!(x == f32::NEG_INFINITY, i % total_q < blind, "variant {seed}: lse {i} is {x}");
        }
        world.close();
    }
}

#[test]
fn class_52_63_requests_without_queries_are_legal() {
    for seed in 0..VARIANTS {
        let kv_len = Rng::new(seed).range(0, 60);
        // The last one is what graph padding looks like.
        let (world, [out, _]) = of_requests(seed, vec![(0, kv_len), (4, 30), (0, 0)]);
        assert!(out.iter().all(|x| x.is_finite()), "variant {seed}");
        world.close();
    }
}

#[test]
fn class_59_60_shared_pages_are_legal() {
    for seed in 0..VARIANTS {
        let mut world = World::random(seed);
        let first = world.memory[TABLE].ints_mut()[0];
        for req in 0..world.reqs.len() {
            for i in 0..used(&world, req) as usize {
                let at = req * world.width + i;
                world.memory[TABLE].ints_mut()[at] = first;
            }
        }
        world.results();
        assert!(world.canaries_hold());
        world.close();
    }
}
