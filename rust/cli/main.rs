//! The `compactattn` command-line tool.

fn main() {}
