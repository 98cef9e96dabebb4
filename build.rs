//! Builds what cargo cannot: the C++ side of the cxx bridge (feature `cxx`).

fn main() {}
