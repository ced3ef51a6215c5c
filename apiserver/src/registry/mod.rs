//! Reads and writes of stored objects: one generic path, a small strategy per kind.

pub mod strategy;
pub mod table;
