//! The `isopod-runtime` binary.
fn main() {}
