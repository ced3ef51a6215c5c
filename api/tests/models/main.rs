//! Random input against small independent models: what a strategic merge leaves, what a
//! selector selects, what a quantity is worth.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod quantities;
mod selectors;
mod strategic;
