//! The `isopod` binary.
fn main() {}
