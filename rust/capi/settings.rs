//! `compactattn_settings` to and from [`Settings`], and `compactattn_plan_desc` to [`PlanDesc`].

use std::path::Path;

use super::read;
use super::structs::{compactattn_keep, compactattn_plan_desc, compactattn_settings};
use super::tensor;
use crate::error::{Error, Result, Status};
use crate::plan::Limits;
use crate::run::PlanDesc;
use crate::select::{Gate, Pairing, Rope};
use crate::settings::{DenseRules, FlashPrefill, Keep, KeepAt, Scope, Selector, Settings};
use crate::types::{Dtype, Shape};

/// Numbers to meaning.
pub(super) fn from_c(c: &compactattn_settings) -> Result<Settings> {
    let settings = Settings {
        selector: selector("settings.selector", c.selector)?,
        block_size: count("settings.block_size", c.block_size)?,
        scope: Scope {
            query_span: count("settings.query_span", c.query_span)?,
            heads_per_list: count("settings.heads_per_list", c.heads_per_list)?,
        },
        keep: keep(c.keep, c.keep_value)?,
        keep_at: if flag("settings.keep_at", c.keep_at)? { KeepAt::List } else { KeepAt::Row },
        min_density: c.min_density,
        max_density: c.max_density,
        sink_blocks: count("settings.sink_blocks", c.sink_blocks)?,
        local_blocks: count("settings.local_blocks", c.local_blocks)?,
        density_guard: c.density_guard,
        mean_correction: flag("settings.mean_correction", c.mean_correction)?,
        dense: DenseRules {
            below_kv_len: count("settings.dense_below_kv_len", c.dense_below_kv_len)?,
            max_q_len: count("settings.dense_max_q_len", c.dense_max_q_len)?,
            prefix_tokens: count("settings.dense_prefix_tokens", c.dense_prefix_tokens)?,
        },
        sample_rows: count("settings.sample_rows", c.sample_rows)?,
        flashprefill: FlashPrefill {
            non_voting_spans: count(
                "settings.flashprefill_non_voting_spans",
                c.flashprefill_non_voting_spans,
            )?,
            min_budget: count("settings.flashprefill_min_budget", c.flashprefill_min_budget)?,
            relative_to_past: flag(
                "settings.flashprefill_relative_to_past",
                c.flashprefill_relative_to_past,
            )?,
        },
        quoka_query_ratio: c.quoka_query_ratio,
        xattention_stride: count("settings.xattention_stride", c.xattention_stride)?,
        two_level_factor: c.two_level_factor,
    };
    settings.check()?;
    Ok(settings)
}

/// Meaning to numbers.
pub(super) fn to_c(settings: &Settings) -> compactattn_settings {
    let (keep, keep_value) = match settings.keep {
        Keep::Threshold(x) => (compactattn_keep::COMPACTATTN_KEEP_THRESHOLD, x),
        Keep::Mass(x) => (compactattn_keep::COMPACTATTN_KEEP_MASS, x),
        Keep::Density(x) => (compactattn_keep::COMPACTATTN_KEEP_DENSITY, x),
    };
    compactattn_settings {
        struct_size: 0,
        selector: settings.selector as i32,
        block_size: number(settings.block_size),
        query_span: number(settings.scope.query_span),
        heads_per_list: number(settings.scope.heads_per_list),
        keep: keep as i32,
        keep_value,
        keep_at: settings.keep_at as i32,
        min_density: settings.min_density,
        max_density: settings.max_density,
        sink_blocks: number(settings.sink_blocks),
        local_blocks: number(settings.local_blocks),
        density_guard: settings.density_guard,
        mean_correction: settings.mean_correction.into(),
        dense_below_kv_len: number(settings.dense.below_kv_len),
        dense_max_q_len: number(settings.dense.max_q_len),
        dense_prefix_tokens: number(settings.dense.prefix_tokens),
        sample_rows: number(settings.sample_rows),
        flashprefill_non_voting_spans: number(settings.flashprefill.non_voting_spans),
        flashprefill_min_budget: number(settings.flashprefill.min_budget),
        flashprefill_relative_to_past: settings.flashprefill.relative_to_past.into(),
        quoka_query_ratio: settings.quoka_query_ratio,
        xattention_stride: number(settings.xattention_stride),
        two_level_factor: settings.two_level_factor,
    }
}

/// The selector of that number.
pub(super) fn selector(name: &str, number: i32) -> Result<Selector> {
    let found = Selector::ALL.iter().find(|(selector, _)| *selector as i32 == number);
    let wanted = "a compactattn_selector (0..11)";
    found.map(|(selector, _)| *selector).ok_or_else(|| Error::new(Status::Value, name, wanted, number))
}

/// A plan's description, with everything it points to.
///
/// # Safety
/// The pointers in `desc` are NULL or as `compactattn_plan_desc` says.
pub(super) unsafe fn plan_desc(desc: &compactattn_plan_desc) -> Result<PlanDesc> {
    refuse_what_is_not_offered(desc)?;
    let limits = Limits {
        max_num_reqs: count("desc.max_num_reqs", desc.max_num_reqs)?,
        max_total_q: long("desc.max_total_q", desc.max_total_q)?,
        max_kv_len: long("desc.max_kv_len", desc.max_kv_len)?,
    };
    // SAFETY: this function's contract.
    let layers = unsafe { layers(desc) }?;
    let splits = count("desc.num_splits", desc.num_splits)?;
    let shape = shape(desc)?;
    shape.check()?;
    // SAFETY: this function's contract.
    let gate = unsafe { gate(desc, &shape, layers.len()) }?;
    Ok(PlanDesc { shape, limits, layers, splits, gate })
}

/// The gates of the file that `desc` names, if it names one.
///
/// # Safety
/// As [`plan_desc`].
unsafe fn gate(desc: &compactattn_plan_desc, shape: &Shape, num_layers: usize) -> Result<Option<Gate>> {
    // SAFETY: this function's contract.
    let Some(path) = (unsafe { read::path("desc.gate_weights_path", desc.gate_weights_path) })? else {
        return Ok(None);
    };
    // SAFETY: this function's contract; NULL and a negative length are refused inside.
    let inv_freq = unsafe { inv_freq(desc, shape) }?;
    let pairing = match desc.rope_interleaved {
        0 => Pairing::HalfSplit,
        1 => Pairing::Interleaved,
        other => return Err(Error::new(Status::Value, "desc.rope_interleaved", "0 or 1", other)),
    };
    let rope = Rope { inv_freq, gate_inv_freq: None, pairing, scale: 1.0 };
    Gate::load(Path::new(&path), shape, num_layers, rope).map(Some)
}

/// # Safety
/// As [`plan_desc`].
unsafe fn inv_freq(desc: &compactattn_plan_desc, shape: &Shape) -> Result<Vec<f32>> {
    let len = shape.head_dim / 2;
    if usize::try_from(desc.rope_inv_freq_len) != Ok(len) {
        let wanted = format!("{len} (head_dim / 2)");
        return Err(Error::new(Status::Shape, "desc.rope_inv_freq_len", wanted, desc.rope_inv_freq_len));
    }
    read::check_pointer("desc.rope_inv_freq", desc.rope_inv_freq)?;
    // SAFETY: not NULL, aligned; `len` elements by this function's contract.
    Ok(unsafe { tensor::array(desc.rope_inv_freq, len) }.to_vec())
}

fn shape(desc: &compactattn_plan_desc) -> Result<Shape> {
    let head_count =
        |name, x| usize::try_from(x).map_err(|_| Error::new(Status::Shape, name, "at least 1", x));
    let head_dim = usize::try_from(desc.head_dim)
        .map_err(|_| Error::new(Status::Unsupported, "desc.head_dim", "64, 96, 128 or 256", desc.head_dim))?;
    let float = [Dtype::Bf16, Dtype::F16, Dtype::F32].into_iter().find(|&d| d as i32 == desc.dtype);
    let dtype = float.ok_or_else(|| {
        Error::new(Status::Dtype, "desc.dtype", "bf16, f16 or f32", tensor::dtype_name(desc.dtype))
    })?;
    let known = [dtype, Dtype::E4m3].into_iter().find(|&d| d as i32 == desc.kv_dtype);
    let kv_dtype = known.or((desc.kv_dtype == 0).then_some(dtype)).ok_or_else(|| {
        let wanted = format!("0, {} (the dtype of q) or e4m3", dtype.name());
        Error::new(Status::Dtype, "desc.kv_dtype", wanted, tensor::dtype_name(desc.kv_dtype))
    })?;
    let default_scale = 1.0 / (head_dim as f32).sqrt();
    let shape = Shape {
        num_q_heads: head_count("desc.num_q_heads", desc.num_q_heads)?,
        num_kv_heads: head_count("desc.num_kv_heads", desc.num_kv_heads)?,
        head_dim,
        page_size: count("desc.page_size", desc.page_size)?,
        dtype,
        kv_dtype,
        sm_scale: if desc.sm_scale == 0.0 { default_scale } else { desc.sm_scale },
    };
    shape.check()?;
    Ok(shape)
}

/// # Safety
/// As [`plan_desc`].
unsafe fn layers(desc: &compactattn_plan_desc) -> Result<Vec<Settings>> {
    let num_layers = count("desc.num_layers", desc.num_layers)?.max(1);
    if num_layers > MAX_LAYERS {
        return Err(Error::new(
            Status::Value,
            "desc.num_layers",
            format!("at most {MAX_LAYERS}"),
            num_layers,
        ));
    }
    // SAFETY: this function's contract.
    let all = match unsafe { read::optional("desc.settings", desc.settings) }? {
        Some(c) => from_c(&c)?,
        None => Settings::of(Selector::SampledExact),
    };
    if desc.layer_settings.is_null() {
        return Ok(vec![all; num_layers]);
    }
    read::check_pointer("desc.layer_settings", desc.layer_settings)?;
    // SAFETY: not NULL, aligned; `num_layers` entries by this function's contract.
    let each = unsafe { tensor::array(desc.layer_settings, num_layers) };
    let of_layer = |one| -> Result<Settings> {
        // SAFETY: this function's contract.
        let Some(own) = (unsafe { read::optional("struct", one) })? else { return Ok(all) };
        let settings = from_c(&own)?;
        settings.check()?;
        Ok(settings)
    };
    let named =
        |(layer, &one)| of_layer(one).map_err(|error| error.of(&format!("desc.layer_settings[{layer}]")));
    each.iter().enumerate().map(named).collect()
}

fn refuse_what_is_not_offered(desc: &compactattn_plan_desc) -> Result<()> {
    for (name, asked) in [
        ("desc.sliding_window", desc.sliding_window != 0),
        ("desc.logits_soft_cap", desc.logits_soft_cap != 0.0),
        ("desc.attention_sinks", desc.attention_sinks != 0),
        ("desc.alibi", desc.alibi != 0),
    ] {
        if asked {
            let wanted = "0 (not offered; keep such layers on the engine's own attention)";
            return Err(Error::new(Status::Unsupported, name, wanted, "another value"));
        }
    }
    Ok(())
}

fn keep(kind: i32, value: f32) -> Result<Keep> {
    match kind {
        1 => Ok(Keep::Threshold(value)),
        2 => Ok(Keep::Mass(value)),
        3 => Ok(Keep::Density(value)),
        _ => Err(Error::new(Status::Value, "settings.keep", "a compactattn_keep (1, 2 or 3)", kind)),
    }
}

fn count(name: &'static str, x: i32) -> Result<usize> {
    usize::try_from(x).map_err(|_| Error::new(Status::Value, name, "at least 0", x))
}

fn long(name: &'static str, x: i64) -> Result<usize> {
    usize::try_from(x).map_err(|_| Error::new(Status::Value, name, "at least 0", x))
}

fn flag(name: &'static str, x: i32) -> Result<bool> {
    match x {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::new(Status::Value, name, "0 or 1", x)),
    }
}

/// Settings that came from a file may exceed what the struct holds; such a bound binds nothing either way.
fn number(x: usize) -> i32 {
    i32::try_from(x).unwrap_or(i32::MAX)
}

/// Beyond this a layer count is garbage.
const MAX_LAYERS: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_survives_the_way_to_c_and_back() {
        for (selector, name) in Selector::ALL {
            let settings = Settings::of(selector);
            assert_eq!(from_c(&to_c(&settings)), Ok(settings), "{name}");
        }
        for settings in [Settings::paper(), Settings::block_sparse()] {
            assert_eq!(from_c(&to_c(&settings)), Ok(settings));
        }
    }
}
