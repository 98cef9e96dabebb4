//! Random steps, the pipeline that serves them, and the judge.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod case;
pub(crate) mod gate;
pub(crate) mod history;
pub(crate) mod judge;
pub(crate) mod pipeline;
pub(crate) mod pool;
pub(crate) mod rng;
pub(crate) mod tenants;
pub(crate) mod variants;
