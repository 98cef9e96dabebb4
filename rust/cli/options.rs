//! Options that several commands share.

use std::path::PathBuf;

use clap::Args;
use compactattn::select::Pairing;
use compactattn::settings::{Keep, Scope, Selector, Settings};
use compactattn::{Error, Parallel, Result, Status};

use crate::gpu::Device;
use crate::pool::KvLayout;
use crate::prefill::{Engine, GateFile, sparse};

/// The engine around the kernel.
#[derive(Clone, Debug, Args)]
pub(crate) struct EngineArgs {
    /// Tokens per KV page: 16, 32, 64, 128 or 256.
    #[arg(long, default_value_t = 16, value_name = "TOKENS")]
    page_size: usize,
    /// Order of tokens and heads within a page.
    #[arg(long, value_enum, default_value = "nhd")]
    kv_layout: KvLayout,
    /// Tokens per prefill chunk.
    #[arg(long, default_value_t = 1024, value_name = "TOKENS")]
    chunk: usize,
    /// Factor on q.k; default: the trace's own, else 1/sqrt(head_dim).
    #[arg(long, value_name = "X")]
    sm_scale: Option<f32>,
    /// CPU threads; 0 = as many as the system grants.
    #[arg(long, default_value_t = 0, value_name = "N")]
    threads: usize,
    /// A safetensors file with the weights of selector attn_gate, under their published names.
    #[arg(long, value_name = "FILE", requires = "rope_theta")]
    gate: Option<PathBuf>,
    /// Base of the model's rotary embedding, for attn_gate.
    #[arg(long, value_name = "BASE")]
    rope_theta: Option<f32>,
    /// Rotary pairs are neighbours (2i, 2i + 1), not halves, for attn_gate.
    #[arg(long)]
    rope_interleaved: bool,
}

impl EngineArgs {
    /// The engine these describe.
    pub(crate) fn engine(&self) -> Engine {
        Engine {
            page_size: self.page_size,
            kv_layout: self.kv_layout,
            chunk: self.chunk,
            sm_scale: self.sm_scale,
            parallel: Parallel::new(self.threads),
            gate: self.gate.clone().zip(self.rope_theta).map(|(path, theta)| GateFile {
                path,
                theta,
                pairing: if self.rope_interleaved { Pairing::Interleaved } else { Pairing::HalfSplit },
            }),
        }
    }

    /// Whether gate weights were named.
    pub(crate) fn has_gate(&self) -> bool {
        self.gate.is_some()
    }
}

/// Where to run.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct DeviceArgs {
    /// auto: the GPU where there is one that serves the trace, else the CPU; cuda: the GPU or an error.
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) device: Device,
}

/// What to keep and how far to share it.
#[derive(Clone, Debug, Args)]
pub(crate) struct SelectArgs {
    /// dense, sampled_exact, flashprefill, pooled_mass, two_level, attn_gate (with --gate), quoka, xattention, streaming
    /// or oracle.
    #[arg(long, value_parser = Selector::from_name)]
    selector: Option<Selector>,
    /// Who shares a list: `group` or `head` (or heads per list), then query tokens: `group:chunk`, `head:128`, `2:256`.
    #[arg(long, value_parser = scope, value_name = "HEADS[:TOKENS]")]
    scope: Option<Scope>,
    /// Keep this share of the past blocks; lifts floor and cap.
    #[arg(long, group = "keep", value_parser = share, value_name = "SHARE")]
    density: Option<f64>,
    /// Keep blocks that score at least this; lifts floor and cap.
    #[arg(long, group = "keep", value_parser = share, value_name = "SCORE")]
    threshold: Option<f64>,
    /// Keep the best blocks that hold this share of the score; lifts floor and cap.
    #[arg(long, group = "keep", value_parser = share, value_name = "SHARE")]
    mass: Option<f64>,
    /// Tokens per block: 16 to 256, or 1 with quoka.
    #[arg(long, value_name = "TOKENS")]
    block_size: Option<usize>,
    /// Means stand in for skipped blocks.
    #[arg(long)]
    mean_correction: bool,
}

impl SelectArgs {
    /// The settings these describe: the selector's own (`otherwise`, if none is named), changed where said.
    ///
    /// # Errors
    /// [`Status::Unsupported`] for a selector that needs more than a trace; those of [`Settings::check`].
    #[expect(clippy::cast_possible_truncation, reason = "settings are f32")]
    pub(crate) fn settings(&self, otherwise: &Settings) -> Result<Settings> {
        let mut settings = self.selector.map_or(*otherwise, sparse);
        settings.scope = self.scope.unwrap_or(settings.scope);
        settings.block_size = self.block_size.unwrap_or(settings.block_size);
        settings.mean_correction = self.mean_correction;
        let density = self.density.map(|x| Keep::Density(x as f32));
        let threshold = self.threshold.map(|x| Keep::Threshold(x as f32));
        let mass = self.mass.map(|x| Keep::Mass(x as f32));
        if let Some(keep) = density.or(threshold).or(mass) {
            settings = Settings { keep, min_density: 0.0, max_density: 1.0, density_guard: 1.0, ..settings };
        }
        if settings.selector == Selector::External {
            let got = "external, which needs a caller's masks";
            return Err(Error::new(Status::Unsupported, "--selector", "one that scores by itself", got));
        }
        settings.check()?;
        Ok(settings)
    }
}

/// Parses a share or a score.
pub(crate) fn share(text: &str) -> std::result::Result<f64, String> {
    let number = text.parse().ok().filter(|x: &f64| *x > 0.0 && *x <= 1.0);
    number.ok_or_else(|| format!("wanted a number in (0, 1], got {text:?}"))
}

/// Parses a scope.
pub(crate) fn scope(text: &str) -> std::result::Result<Scope, String> {
    let wrong = || format!("wanted HEADS[:TOKENS] such as group:chunk, head:128 or 2:256, got {text:?}");
    let (heads, span) = text.split_once(':').unwrap_or((text, "chunk"));
    let heads_per_list = match heads {
        "group" => 0,
        "head" => 1,
        n => n.parse().ok().filter(|&n: &usize| n > 0).ok_or_else(wrong)?,
    };
    let query_span = match span {
        "chunk" => 0,
        n => n.parse().ok().filter(|&n: &usize| n > 0).ok_or_else(wrong)?,
    };
    Ok(Scope { query_span, heads_per_list })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_read_as_they_are_written() {
        assert_eq!(scope("group"), Ok(Scope::GROUP_CHUNK));
        assert_eq!(scope("head:chunk"), Ok(Scope::HEAD_CHUNK));
        assert_eq!(scope("head:128"), Ok(Scope::HEAD_128));
        assert_eq!(scope("2:256"), Ok(Scope { query_span: 256, heads_per_list: 2 }));
        for wrong in ["", "0", "head:", "head:x", "row:128"] {
            assert!(scope(wrong).unwrap_err().contains("HEADS"), "{wrong}");
        }
    }
}
