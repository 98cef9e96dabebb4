//! Tests of which kernels a call takes, by its settings, shape and limits.

use super::*;

/// Of launches.
fn names(launches: &[String]) -> Vec<String> {
    launches.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

#[test]
fn slices_that_shared_memory_does_not_hold_are_scored_from_registers_or_by_kernels_of_their_own() {
    let base = Settings { block_size: 32, ..Settings::of(Selector::SampledExact) };
    let of_groups = Settings { scope: Scope::GROUP_CHUNK, ..base };
    let many_rows = Settings { sample_rows: 33, scope: Scope::HEAD_128, ..base };
    let kernels = |settings, max_kv_len| {
        let limits = Limits { max_kv_len, ..LIMITS };
        // Groups of 2 heads: 64 rows of each make one tile.
        let shape = fixture::shape(KV_HEADS, 2, 128, 16, Dtype::Bf16);
        let world = World::new("", PlanDesc { limits, shape, ..desc(settings, Dtype::Bf16, 128) }).unwrap();
        let launched = names(&world.run(world.stream()).unwrap());
        launched.into_iter().skip(3).take_while(|name| name != "compactattn_plan_work").collect::<Vec<_>>()
    };
    assert_eq!(kernels(base, 1 << 16), ["compactattn_mass_lists_short"]);
    assert_eq!(kernels(of_groups, 1 << 16), ["compactattn_cells_lists"]);
    assert_eq!(kernels(base, 1 << 17), ["compactattn_mass_lists"]);
    assert_eq!(kernels(of_groups, 1 << 17), ["compactattn_mass_lists", "compactattn_union_table_wide"]);
    let apart = ["compactattn_cells_mass", "compactattn_union_table_wide"];
    assert_eq!(kernels(base, (1 << 17) + 32), apart);
    assert_eq!(kernels(many_rows, 1 << 17), apart);
}

#[test]
fn a_key_is_read_once_for_two_select_spans_where_a_request_can_have_them() {
    let kernel = |selector, query_span| {
        let scope = Scope { query_span, heads_per_list: 1 };
        let world =
            World::new("", desc(Settings { scope, ..Settings::of(selector) }, Dtype::Bf16, 128)).unwrap();
        let launches = world.run(world.stream()).unwrap();
        let words: Vec<_> = launches.iter().map(|line| line.split(' ').collect::<Vec<_>>()).collect();
        words.iter().find(|words| words[0].contains("cells_read")).map(|words| words[0].to_owned()).unwrap()
    };
    let exact = Selector::SampledExact;
    // Of 600 query tokens.
    for several in [128, 256, 512] {
        assert_eq!(kernel(exact, several), "compactattn_cells_read_pairs_sm90_bf16_d128", "{several}");
    }
    assert_eq!(kernel(exact, 0), "compactattn_cells_read_sm90_bf16_d128");
    let listed = "compactattn_cells_read_candidates_sm90_bf16_d128";
    assert_eq!(kernel(Selector::TwoLevel, 256), listed);
}

/// Lists that an engine makes by stages are those that forward makes, so scores must be the same to the bit.
#[test]
fn scores_alone_are_made_by_the_kernels_that_make_those_of_lists() {
    let selectors = [Selector::SampledExact, Selector::PooledMass, Selector::TwoLevel, Selector::Oracle];
    for (selector, heads_per_list) in selectors.iter().flat_map(|&of| [0, 1, 2].map(|heads| (of, heads))) {
        for (keep_at, query_span) in [(KeepAt::List, 0), (KeepAt::List, 128), (KeepAt::Row, 0)] {
            let scope = Scope { query_span, heads_per_list };
            let settings = Settings { scope, keep_at, ..Settings::of(selector) };
            for desc in [desc(settings, Dtype::Bf16, 128), over_e4m3(settings, Dtype::Bf16, 128)] {
                let world = World::new("", desc).unwrap();
                let forward = names(&world.run(world.stream()).unwrap());
                // SAFETY: the fake driver follows no address.
                let select = |call: &Call| unsafe { world.plan.select(call, SOMEWHERE, 0) };
                let select = names(&world.launches_of(world.stream(), select).unwrap());
                assert!(
                    select.len() > 2 && forward.starts_with(&select),
                    "{settings:?}: {select:?} {forward:?}"
                );
            }
        }
    }
}

#[test]
fn mean_keys_are_scored_by_slices_only_for_lists_of_several_heads() {
    let kernels = |heads_per_list| {
        let scope = Scope { query_span: 0, heads_per_list };
        let settings = Settings { scope, ..Settings::of(Selector::PooledMass) };
        let world = World::new("", desc(settings, Dtype::Bf16, 128)).unwrap();
        names(&world.run(world.stream()).unwrap())[2..4].to_vec()
    };
    assert_eq!(kernels(1), ["compactattn_cells_pool_bf16", "compactattn_mass_lists_short"]);
    assert_eq!(kernels(0), ["compactattn_pooled_lists_bf16", "compactattn_plan_work"]);
}
