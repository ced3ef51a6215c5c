//! Every stored object in memory, once, ready to be sent.

mod object;

pub use object::Object;
