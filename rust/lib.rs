//! Chunked-prefill attention that reads only the KV pages that matter, in place in the engine's paged cache.
//!
//! ```text
//! batch ─► plan ─► select ─► union ─► table ─► attend ─► combine ─► out, lse
//! ```
//!
//! [`run::Plan`] checks a step and runs every stage. Who calls a stage by itself admits the batch first
//! ([`plan::Layout::admit`]) and brings buffers of [`workspace::Sizes`]; a stage panics on a shorter one.
#![deny(unsafe_code)]

pub mod attend;
pub mod batch;
#[cfg(feature = "cxx")]
#[allow(unsafe_code)]
pub mod bridge;
#[allow(unsafe_code)]
#[allow(rustdoc::broken_intra_doc_links, reason = "its docs are the C header, where [n] is a shape")]
pub mod capi;
pub mod check;
pub mod combine;
pub mod config;
pub mod config_file;
#[allow(unsafe_code)]
pub mod cuda;
pub mod e4m3;
pub mod error;
pub mod export;
#[cfg(test)]
mod fixture;
pub mod mask;
mod math;
mod parallel;
pub mod plan;
pub mod reference;
pub mod run;
pub mod seals;
pub mod select;
pub mod settings;
mod stage;
pub mod stats;
pub mod summaries;
mod sync;
pub mod table;
pub mod tensor;
pub mod types;
pub mod union;
pub mod workspace;

pub use error::{Error, Result, Status};
pub use parallel::Parallel;

/// The README's Rust code is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
