//! isopod runtime.
