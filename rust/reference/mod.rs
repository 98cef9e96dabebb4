//! The f64 oracle of every stage, written to be obviously right.
