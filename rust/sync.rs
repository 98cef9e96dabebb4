//! What threads meet through: the standard library's, or loom's, which runs a model once for each order that its threads'
//! operations can have (`make loom`).

#[cfg(all(test, loom))]
pub(crate) use loom::sync::{
    RwLock,
    atomic::{AtomicU64, Ordering},
};
#[cfg(not(all(test, loom)))]
pub(crate) use std::sync::{
    RwLock,
    atomic::{AtomicU64, Ordering},
};
