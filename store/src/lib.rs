//! Revisioned key-value store: commit (compare-and-swap batch), range, watch. Opaque bytes: knows nothing of Kubernetes.

mod error;

pub use error::Error;
