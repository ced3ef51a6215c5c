//! isopod tests.
